//! SmolLM2-135M on kv8: a real language model whose attention goes through our sessions.
#![forbid(unsafe_code)]

pub mod accuracy;
pub mod agreement;
pub mod cache;
pub mod calibration;
pub mod command;
pub mod fetch;
pub mod generate;
pub mod matrix;
pub mod model;
pub mod sample;
pub mod score;
pub mod text;
pub mod transform;
pub mod vocabulary;
pub mod weights;
