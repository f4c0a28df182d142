//! Backends that are wrong on purpose: the suite must find every one. Each has one fault, of a kind that has shipped
//! somewhere; [`Fault::None`] has none and must pass, so that it is the fault that is found.

mod attend;
mod backend;
mod fault;

pub use backend::MutantBackend;
pub use fault::Fault;
