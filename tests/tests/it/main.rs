//! The integration tests of the workspace, in one binary that can be carried to a machine with no Rust.

mod malformed;

use libtest_mimic::{Arguments, Trial};

fn main() {
    let arguments = Arguments::from_args();
    let mut trials: Vec<Trial> = Vec::new();
    trials.extend(malformed::trials());
    libtest_mimic::run(&arguments, trials).exit();
}
