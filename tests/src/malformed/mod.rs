//! Named malformed calls: how a valid call is broken, and the typed error that must come of it.
//!
//! Every row starts from the same valid [`Bench`]. After the call the cache, the outputs and the launch counter must
//! be what they were.

mod append_rows;
mod bench;
mod counting;
mod format_rows;
mod fuzz;
mod pool_rows;
mod request_rows;
mod select_rows;
mod session_rows;

pub use bench::{Bench, Seen};
pub use counting::CountingBackend;
pub use fuzz::fuzz;

/// One named way to break a call.
pub struct Row {
    /// What is wrong, in words.
    pub name: &'static str,
    /// The error that must come, as a pattern.
    pub expected: &'static str,
    /// Breaks the call and makes it.
    pub call: fn(&mut Bench) -> Seen,
    /// Whether the outcome is the expected error.
    pub matches: fn(&Seen) -> bool,
}

/// A table of rows: `"name" => pattern, |bench| call;`.
macro_rules! rows {
    ($($name:literal => $pattern:pat $(if $guard:expr)?, $call:expr;)*) => {
        pub(super) fn rows() -> Vec<$crate::malformed::Row> {
            vec![$($crate::malformed::Row {
                name: $name,
                expected: stringify!($pattern),
                call: $call,
                matches: |seen| matches!(seen, $pattern $(if $guard)?),
            }),*]
        }
    };
}
use rows;

/// All rows.
pub fn table() -> Vec<Row> {
    [
        format_rows::rows(),
        append_rows::rows(),
        request_rows::rows(),
        session_rows::rows(),
        select_rows::rows(),
        pool_rows::rows(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Makes the call of one row and says what is wrong with the outcome, if anything.
pub fn check(row: &Row) -> Result<(), String> {
    let mut bench = Bench::new();
    let before = bench.snapshot();
    let seen = (row.call)(&mut bench);
    if !(row.matches)(&seen) {
        return Err(format!("{}: expected {}, got {seen:?}", row.name, row.expected));
    }
    if seen.to_string().len() < 10 {
        return Err(format!("{}: the error says nothing: {seen}", row.name));
    }
    if bench.snapshot() != before {
        return Err(format!("{}: refused, but cache or outputs changed", row.name));
    }
    // A backend that plans or decodes was reached.
    match bench.launches() {
        0 => Ok(()),
        launches => Err(format!("{}: refused, but {launches} launches were made", row.name)),
    }
}
