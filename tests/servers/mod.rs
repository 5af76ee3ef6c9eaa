//! Real servers for tests, each in a temporary folder.

pub mod mariadb;
