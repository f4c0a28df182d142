//! Tries one backend in a process of its own: a task in JSON on standard input, the verdict in JSON on standard output.
//!
//! `attn-backend` starts it (see its module `trial`), enforces the time limit and kills it. Exit code 2: no task.
#![forbid(unsafe_code)]

use std::io::{Read, Write};
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut task = String::new();
    let read = std::io::stdin().read_to_string(&mut task).map_err(|error| error.to_string());
    let answer = read.and_then(|_| attn_backend::trial::answer(&task));
    let (text, code) = match &answer {
        Ok(verdict) => (verdict, ExitCode::SUCCESS),
        Err(error) => (error, ExitCode::from(2)),
    };
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}
