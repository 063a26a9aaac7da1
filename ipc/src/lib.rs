//! The wire between the processes of one VM.
#![forbid(unsafe_code)]

mod start_mode;

pub use start_mode::StartMode;
