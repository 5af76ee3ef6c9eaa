-- Accounts and what belongs to them. Integer keys: rows arrive in key order, which is the cheapest way to insert.
-- Names are compared byte by byte. The record is an archive with a version byte (src/store/record.rs); the columns
-- beside it repeat what an operator or the whole table is asked about.
CREATE TABLE users (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL COLLATE BINARY UNIQUE,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    disabled INTEGER NOT NULL,
    sha1_iterations INTEGER,
    sha1_salt_len INTEGER,
    sha256_iterations INTEGER,
    sha256_salt_len INTEGER,
    record BLOB NOT NULL
) STRICT;

-- What SCRAM shows to an unknown user follows what known ones have: read at each start.
CREATE INDEX users_keys ON users (sha1_iterations, sha1_salt_len, sha256_iterations, sha256_salt_len);

CREATE TABLE offline (
    seq INTEGER PRIMARY KEY,
    user INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    id INTEGER NOT NULL,
    stanza BLOB NOT NULL,
    UNIQUE (user, id)
) STRICT;

CREATE TABLE document (
    seq INTEGER PRIMARY KEY,
    user INTEGER NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    key TEXT NOT NULL COLLATE BINARY,
    value BLOB NOT NULL,
    UNIQUE (user, key)
) STRICT;

CREATE TABLE last_activity (
    user INTEGER PRIMARY KEY REFERENCES users (id) ON DELETE CASCADE,
    at INTEGER NOT NULL,
    status TEXT NOT NULL
) STRICT;
