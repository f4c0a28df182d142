//! Backends, selection and sessions.
