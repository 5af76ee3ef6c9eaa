//! A lean load generator for any XMPP server, by its public port: `register`, `storm`, `chat`, `presence`, `room`, `soak`, `slow-readers`, `flood`,
//! `reconnect`, `replay`, `memory`, `archive`.
//!
//! One thread polls many connections ([`worker`]); each is a state machine without input or output of its own
//! ([`connection`]) behind a scanner that only looks for the ends of stanzas ([`scanner`]), or behind the frames of
//! [`websocket`]. The scenarios drive all
//! threads through one handle ([`fleet`]) and end in a [`report`], with the server's CPU time and memory read from
//! `/proc` ([`proc`]). The exit status is 0 when all went well, 1 when logins failed, messages were lost, duplicated
//! or reordered, or a limit of `--fail-if` was broken, 2 when the run could not be made.

#![deny(unsafe_code)]

mod archive;
mod chat;
mod connection;
mod element;
mod fleet;
mod flood;
mod html;
mod limits;
mod live;
mod memory;
mod metrics;
mod options;
mod plot;
mod presence;
mod proc;
mod reconnect;
mod register;
mod replay;
mod report;
mod room;
mod scanner;
mod scram;
mod slow_readers;
mod soak;
mod socket;
mod storm;
mod timeline;
mod websocket;
mod worker;

use std::process::ExitCode;

use clap::Parser;

use options::{Cli, Command};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let Cli { global, command } = Cli::parse();
    let report = match &command {
        Command::Register(options) => register::run(&global, options),
        Command::Storm(options) => storm::run(&global, options),
        Command::Chat(options) => chat::run(&global, options),
        Command::Soak(options) => soak::run(&global, options),
        Command::SlowReaders(options) => slow_readers::run(&global, options),
        Command::Flood(options) => flood::run(&global, options),
        Command::Presence(options) => presence::run(&global, options),
        Command::Room(options) => room::run(&global, options),
        Command::Reconnect(options) => reconnect::run(&global, options),
        Command::Replay(options) => replay::run(&global, options),
        Command::Archive(options) => archive::run(&global, options),
        Command::Memory(options) => memory::run(&global, options),
    };
    let published =
        report.and_then(|mut report| report.publish(&global).map(|()| report.is_failure()));
    match published {
        Ok(false) => ExitCode::SUCCESS,
        Ok(true) => ExitCode::FAILURE,
        Err(sentence) => {
            eprintln!("loadtest: {sentence}");
            ExitCode::from(2)
        }
    }
}
