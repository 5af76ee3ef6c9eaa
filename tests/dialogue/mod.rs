//! The dialogue runner: a script (`tests/dialogues/*.dlg`) goes in, a verdict comes out.
//!
//! `script` reads the text into steps, `run` plays them against a server, `connection` is one client, by TCP, `websocket` or
//! `bosh`, `xml` cuts a stream into elements, `pattern` decides whether an element is the one that a script expects.
//! The format is described in `tests/dialogues/README.md`.

pub mod bosh;
pub mod connection;
pub mod pattern;
pub mod run;
pub mod script;
pub mod websocket;
pub mod xml;
