//! Bytes in and out of the blade.
