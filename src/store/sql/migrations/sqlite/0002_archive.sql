-- Everything is drained from the journals, by revision: what is older changes nothing. Rows belong to a user's number,
-- not to a name, and numbers are never used twice: a new account of an old name begins with nothing.
CREATE TABLE accounts (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL COLLATE BINARY UNIQUE,
    -- The revision that made the account, and that of its record (src/store/change.rs).
    added INTEGER NOT NULL,
    revision INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    disabled INTEGER NOT NULL,
    sha1_iterations INTEGER,
    sha1_salt_len INTEGER,
    sha256_iterations INTEGER,
    sha256_salt_len INTEGER,
    record BLOB NOT NULL
) STRICT;
INSERT INTO accounts
    SELECT id, name, 0, 0, created_at, updated_at, disabled, sha1_iterations, sha1_salt_len, sha256_iterations,
        sha256_salt_len, record FROM users;

-- One row for each archive that holds a message: cheaper than a shared row and two that point to it. The key is the
-- message's id, which grows with time: rows arrive in order, and a search by time is one by id.
CREATE TABLE archive (
    id INTEGER PRIMARY KEY,
    owner INTEGER NOT NULL,
    -- A hash of the peer's bare JID (src/store/sql/mod.rs), which lets a search for one peer stay in the index.
    peer_key INTEGER NOT NULL,
    -- what | kind << 8 | flags << 16 (src/store/change.rs).
    meta INTEGER NOT NULL,
    peer TEXT NOT NULL,
    stanza BLOB NOT NULL
) STRICT;
CREATE INDEX archive_owner ON archive (owner, id, peer_key);

-- What waits for a client; the stanza is here only if it is in no archive.
CREATE TABLE pending (
    id INTEGER PRIMARY KEY,
    owner INTEGER NOT NULL,
    meta INTEGER NOT NULL,
    stanza BLOB
) STRICT;
CREATE INDEX pending_owner ON pending (owner, id);

-- Their ids were unique for one user only; the new ones keep the order and are far below every id made from a clock.
-- 10: pending, received.
INSERT INTO pending SELECT row_number() OVER (ORDER BY user, id), user, 10, stanza FROM offline ORDER BY user, id;

-- An empty value was removed, at this revision.
CREATE TABLE documents (
    seq INTEGER PRIMARY KEY,
    owner INTEGER NOT NULL,
    doc_key TEXT NOT NULL COLLATE BINARY,
    revision INTEGER NOT NULL,
    value BLOB NOT NULL,
    UNIQUE (owner, doc_key)
) STRICT;
INSERT INTO documents SELECT seq, user, key, 0, value FROM document;

CREATE TABLE last_activities (
    owner INTEGER PRIMARY KEY,
    revision INTEGER NOT NULL,
    at INTEGER NOT NULL,
    status TEXT NOT NULL
) STRICT;
INSERT INTO last_activities SELECT user, 0, at, status FROM last_activity;

-- Accounts that are gone: what is older than the revision never comes back.
CREATE TABLE removed (
    name TEXT NOT NULL COLLATE BINARY PRIMARY KEY,
    revision INTEGER NOT NULL
) STRICT;

-- Numbers of accounts that are gone, whose rows are deleted little by little.
CREATE TABLE gone (
    owner INTEGER PRIMARY KEY
) STRICT;

-- Up to where each journal has been applied; `identity` tells a journal that began anew from its predecessor.
CREATE TABLE drained (
    identity INTEGER NOT NULL,
    journal INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    PRIMARY KEY (identity, journal)
) STRICT;

-- Journal records that this database refused, in parts that it takes.
CREATE TABLE quarantine (
    identity INTEGER NOT NULL,
    journal INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    part INTEGER NOT NULL,
    at INTEGER NOT NULL,
    reason TEXT NOT NULL,
    payload BLOB NOT NULL,
    PRIMARY KEY (identity, journal, seq, part)
) STRICT;

-- 'accounts' grows with each account that comes or goes: who remembers numbers of accounts looks here first.
CREATE TABLE state (
    name TEXT NOT NULL COLLATE BINARY PRIMARY KEY,
    value INTEGER NOT NULL
) STRICT;
INSERT INTO state VALUES ('accounts', 0);

DROP TABLE offline;
DROP TABLE document;
DROP TABLE last_activity;
DROP TABLE users;
ALTER TABLE accounts RENAME TO users;
CREATE INDEX users_keys ON users (sha1_iterations, sha1_salt_len, sha256_iterations, sha256_salt_len);
