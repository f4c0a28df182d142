//! Workspace commands; one file per command.

fn main() {}
