//! Placeholder until the blade is wired.

use std::process::ExitCode;

use crate::config::Config;

/// Runs the server until it is told to stop.
pub fn serve(_config: Config) -> ExitCode {
    eprintln!("nitro: serve is not wired yet");
    ExitCode::FAILURE
}
