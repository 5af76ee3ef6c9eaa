//! The ring against real redis-server processes on unix sockets in temporary folders.

mod driver;
mod faults;
mod model;
mod server;
