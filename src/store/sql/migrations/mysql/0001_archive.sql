-- The same tables as SQLite's (../sqlite/0002_archive.sql says what they are for). Names, JIDs and keys are bytes: no
-- collation may find that josé = jose. Every statement may be repeated: here a migration is not one transaction.
CREATE TABLE IF NOT EXISTS users (
    id INT NOT NULL AUTO_INCREMENT PRIMARY KEY,
    name VARBINARY(1023) NOT NULL,
    added BIGINT NOT NULL,
    revision BIGINT NOT NULL,
    created_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    disabled BIGINT NOT NULL,
    sha1_iterations BIGINT,
    sha1_salt_len BIGINT,
    sha256_iterations BIGINT,
    sha256_salt_len BIGINT,
    record MEDIUMBLOB NOT NULL,
    UNIQUE KEY users_name (name),
    KEY users_keys (sha1_iterations, sha1_salt_len, sha256_iterations, sha256_salt_len)
) ENGINE=InnoDB ROW_FORMAT=DYNAMIC DEFAULT CHARSET=binary;

CREATE TABLE IF NOT EXISTS archive (
    id BIGINT NOT NULL PRIMARY KEY,
    owner INT NOT NULL,
    peer_key INT NOT NULL,
    meta BIGINT NOT NULL,
    peer VARBINARY(3071) NOT NULL,
    stanza MEDIUMBLOB NOT NULL,
    KEY archive_owner (owner, id, peer_key)
) ENGINE=InnoDB ROW_FORMAT=DYNAMIC DEFAULT CHARSET=binary;

CREATE TABLE IF NOT EXISTS pending (
    id BIGINT NOT NULL PRIMARY KEY,
    owner INT NOT NULL,
    meta BIGINT NOT NULL,
    stanza MEDIUMBLOB,
    KEY pending_owner (owner, id)
) ENGINE=InnoDB ROW_FORMAT=DYNAMIC DEFAULT CHARSET=binary;

-- `doc_key` is the key, or, if that is long, its begin and its hash (src/store/sql/mod.rs).
CREATE TABLE IF NOT EXISTS documents (
    owner INT NOT NULL,
    doc_key VARBINARY(1100) NOT NULL,
    revision BIGINT NOT NULL,
    value MEDIUMBLOB NOT NULL,
    PRIMARY KEY (owner, doc_key)
) ENGINE=InnoDB ROW_FORMAT=DYNAMIC DEFAULT CHARSET=binary;

CREATE TABLE IF NOT EXISTS last_activities (
    owner INT NOT NULL PRIMARY KEY,
    revision BIGINT NOT NULL,
    at BIGINT NOT NULL,
    status MEDIUMBLOB NOT NULL
) ENGINE=InnoDB ROW_FORMAT=DYNAMIC DEFAULT CHARSET=binary;

CREATE TABLE IF NOT EXISTS removed (
    name VARBINARY(1023) NOT NULL PRIMARY KEY,
    revision BIGINT NOT NULL
) ENGINE=InnoDB ROW_FORMAT=DYNAMIC DEFAULT CHARSET=binary;

CREATE TABLE IF NOT EXISTS gone (
    owner INT NOT NULL PRIMARY KEY
) ENGINE=InnoDB ROW_FORMAT=DYNAMIC DEFAULT CHARSET=binary;

CREATE TABLE IF NOT EXISTS drained (
    identity BIGINT NOT NULL,
    journal INT NOT NULL,
    seq BIGINT NOT NULL,
    PRIMARY KEY (identity, journal)
) ENGINE=InnoDB ROW_FORMAT=DYNAMIC DEFAULT CHARSET=binary;

CREATE TABLE IF NOT EXISTS quarantine (
    identity BIGINT NOT NULL,
    journal INT NOT NULL,
    seq BIGINT NOT NULL,
    part INT NOT NULL,
    at BIGINT NOT NULL,
    reason MEDIUMBLOB NOT NULL,
    payload MEDIUMBLOB NOT NULL,
    PRIMARY KEY (identity, journal, seq, part)
) ENGINE=InnoDB ROW_FORMAT=DYNAMIC DEFAULT CHARSET=binary;

CREATE TABLE IF NOT EXISTS state (
    name VARBINARY(64) NOT NULL PRIMARY KEY,
    value BIGINT NOT NULL
) ENGINE=InnoDB ROW_FORMAT=DYNAMIC DEFAULT CHARSET=binary;
INSERT INTO state (name, value) VALUES ('accounts', 0) ON DUPLICATE KEY UPDATE value = value;
