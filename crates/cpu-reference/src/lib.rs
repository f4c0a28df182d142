//! The f64 oracle and the CPU backend.
