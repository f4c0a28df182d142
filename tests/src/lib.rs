//! Testkit of the workspace.
