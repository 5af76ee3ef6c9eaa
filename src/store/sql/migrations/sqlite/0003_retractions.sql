-- What was retracted is found by an id that its sender or the archive gave it (a hash of it in the index, the id itself is
-- compared). The entries themselves stay in `archive` as they were: only what clients are shown changes.
CREATE TABLE retractions (
    -- Of the message that retracts.
    id INTEGER PRIMARY KEY,
    owner INTEGER NOT NULL,
    target_key INTEGER NOT NULL,
    side INTEGER NOT NULL,
    peer TEXT NOT NULL,
    target TEXT NOT NULL,
    tombstone BLOB NOT NULL
) STRICT;
CREATE INDEX retractions_owner ON retractions (owner, target_key);
