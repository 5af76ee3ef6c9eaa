-- The same table as SQLite's (../sqlite/0003_retractions.sql says what it is for).
CREATE TABLE IF NOT EXISTS retractions (
    id BIGINT NOT NULL PRIMARY KEY,
    owner INT NOT NULL,
    target_key BIGINT NOT NULL,
    side INT NOT NULL,
    peer VARBINARY(3071) NOT NULL,
    target VARBINARY(1023) NOT NULL,
    tombstone MEDIUMBLOB NOT NULL,
    KEY retractions_owner (owner, target_key)
) ENGINE=InnoDB ROW_FORMAT=DYNAMIC DEFAULT CHARSET=binary;
