//! Numbered lessons; each runs by itself: `cargo run -p attn-examples --example 01_quantize_a_page`.
//!
//! The code blocks of the workspace's README are compiled and run as this package's documentation tests.
#![forbid(unsafe_code)]
#![doc = include_str!("../../README.md")]
