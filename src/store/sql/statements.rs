//! Every statement's text, in both dialects and in few fixed sizes, so that each is prepared once.

use std::sync::OnceLock;

use super::connection::{Connection, Dialect, Row, SqlError, Value};
use crate::store::change::Message;

/// Names that one question takes at most.
pub(super) const ASK_MAX: usize = 50;
/// Rows that one change takes at most: more gains nothing, and a failing one costs more.
pub(super) const ROWS_MAX: usize = 100;

const ASK_SIZES: [usize; 3] = [1, 10, ASK_MAX];
const ROW_SIZES: [usize; 5] = [1, 3, 10, 30, ROWS_MAX];

/// One statement for any number of rows.
pub(super) struct Statement {
    write: fn(Dialect, usize) -> String,
    /// By dialect and size.
    texts: [OnceLock<Texts>; 2],
    sizes: &'static [usize],
}

/// One for each size.
type Texts = Box<[(usize, String)]>;

impl Statement {
    const fn ask(write: fn(Dialect, usize) -> String) -> Statement {
        Statement {
            write,
            texts: [OnceLock::new(), OnceLock::new()],
            sizes: &ASK_SIZES,
        }
    }

    pub(super) const fn change(write: fn(Dialect, usize) -> String) -> Statement {
        Statement {
            write,
            texts: [OnceLock::new(), OnceLock::new()],
            sizes: &ROW_SIZES,
        }
    }

    fn text(&'static self, dialect: Dialect, size: usize) -> &'static str {
        let texts = self.texts[dialect as usize].get_or_init(|| {
            let text = |size: &usize| (*size, (self.write)(dialect, *size));
            self.sizes.iter().map(text).collect()
        });
        let found = texts.iter().find(|(one, _)| *one == size);
        &found.expect("callers ask for sizes that exist").1
    }
}

impl Connection {
    /// Asks about up to [`ASK_MAX`] rows, filled up to the next size with the last one again. `bind` adds one row's
    /// values; the whole is repeated `times`, for statements that name them more than once.
    pub async fn ask_about<'v, R>(
        &mut self,
        statement: &'static Statement,
        rows: &'v [R],
        times: usize,
        bind: impl Fn(&mut Vec<Value<'v>>, &'v R),
    ) -> Result<Vec<Row>, SqlError> {
        let Some(last) = rows.last() else {
            return Ok(Vec::new());
        };
        debug_assert!(rows.len() <= ASK_MAX);
        let mut sizes = statement.sizes.iter().copied();
        let size = sizes.find(|size| *size >= rows.len()).unwrap_or(ASK_MAX);
        let mut values = Vec::new();
        for _ in 0..times {
            for n in 0..size {
                bind(&mut values, rows.get(n).unwrap_or(last));
            }
        }
        self.ask(statement.text(self.dialect(), size), &values)
            .await
    }

    /// Runs a change for all rows, as many at a time as a size and a packet take; how many rows it touched.
    pub async fn run_for<'v, R>(
        &mut self,
        statement: &'static Statement,
        mut rows: &'v [R],
        bind: impl Fn(&mut Vec<Value<'v>>, &'v R),
    ) -> Result<u64, SqlError> {
        let mut touched = 0;
        // Half a packet, so that estimates need not be exact.
        let bytes_max = self.packet_max / 2;
        let mut values: Vec<Value<'v>> = Vec::new();
        while !rows.is_empty() {
            let mut sizes = statement.sizes.iter().rev().copied();
            let mut size = sizes.find(|size| *size <= rows.len()).unwrap_or(1);
            loop {
                values.clear();
                for row in &rows[..size] {
                    bind(&mut values, row);
                }
                let bytes: usize = values.iter().map(|value| value.bytes() + 16).sum();
                if size == 1 || bytes <= bytes_max {
                    break;
                }
                size = sizes.next().unwrap_or(1);
            }
            touched += self
                .run(statement.text(self.dialect(), size), &values)
                .await?;
            rows = &rows[size..];
        }
        Ok(touched)
    }
}

/// Rows that are one name, one number of an account, or one id.
pub(super) fn name<'v>(values: &mut Vec<Value<'v>>, name: &'v &str) {
    values.push(Value::Text(name));
}

pub(super) fn number(values: &mut Vec<Value<'_>>, number: &i64) {
    values.push(Value::Int(*number));
}

pub(super) fn id(values: &mut Vec<Value<'_>>, id: &u64) {
    values.push(Value::from(*id));
}

/// `(?,?),(?,?)`: rows of values.
pub(super) fn rows(count: usize, width: usize) -> String {
    let row = format!("({})", marks(width));
    vec![row; count].join(",")
}

/// `?,?`: a list.
pub(super) fn marks(count: usize) -> String {
    vec!["?"; count].join(",")
}

/// A join in the order written: from few names to large tables, never the other way.
fn then(dialect: Dialect) -> &'static str {
    match dialect {
        Dialect::Sqlite => "CROSS JOIN",
        Dialect::MySql => "STRAIGHT_JOIN",
    }
}

/// The archive, entered by its owner and never by the ids alone, which planners like better and which is a scan; and the
/// table that has what the index `k` has not.
///
/// For MySQL a search for one peer is a join of the index with the rows: in a range that is read backwards it would fetch
/// the row of each index entry before it looks at the peer's hash in it (there is no index condition pushdown in that
/// direction), which is many times the work for a peer who seldom wrote. SQLite looks at what the index has first.
pub(super) fn archive(dialect: Dialect, one_peer: bool) -> (&'static str, char) {
    match (dialect, one_peer) {
        (Dialect::Sqlite, _) => ("archive AS k INDEXED BY archive_owner", 'k'),
        (Dialect::MySql, false) => ("archive AS k FORCE INDEX (archive_owner)", 'k'),
        (Dialect::MySql, true) => (
            "archive AS k FORCE INDEX (archive_owner) STRAIGHT_JOIN archive AS a ON a.id = k.id",
            'a',
        ),
    }
}

/// `INSERT` of rows whose keys may be there already: then `columns` take the new values, if `newer` is greater than
/// what is there.
fn upsert(
    dialect: Dialect,
    table: &str,
    keys: &str,
    columns: &[&str],
    newer: Option<&str>,
    n: usize,
) -> String {
    let width = keys.split(',').count() + columns.len();
    let head = format!(
        "INSERT INTO {table} ({keys}, {}) VALUES {}",
        columns.join(", "),
        rows(n, width)
    );
    let sets = |set: &dyn Fn(&str) -> String| {
        let sets: Vec<String> = columns.iter().map(|column| set(column)).collect();
        sets.join(", ")
    };
    match (dialect, newer) {
        (Dialect::Sqlite, newer) => {
            let sets = sets(&|column| format!("{column} = excluded.{column}"));
            let newer = newer.map_or(String::new(), |by| {
                format!(" WHERE excluded.{by} > {table}.{by}")
            });
            format!("{head} ON CONFLICT ({keys}) DO UPDATE SET {sets}{newer}")
        }
        (Dialect::MySql, None) => {
            let sets = sets(&|column| format!("{column} = VALUES({column})"));
            format!("{head} ON DUPLICATE KEY UPDATE {sets}")
        }
        // Assignments happen in their order, so the revision, which all compare, must be the last column.
        (Dialect::MySql, Some(by)) => {
            debug_assert_eq!(columns.last(), Some(&by));
            let sets = sets(&|column| {
                format!("{column} = IF(VALUES({by}) > {by}, VALUES({column}), {column})")
            });
            format!("{head} ON DUPLICATE KEY UPDATE {sets}")
        }
    }
}

/// `INSERT` that leaves alone what is there. Never `IGNORE`, which on MySQL also cuts what does not fit.
fn insert_once(dialect: Dialect, table: &str, key: &str, columns: &str, n: usize) -> String {
    let width = columns.split(',').count();
    let head = format!("INSERT INTO {table} ({columns}) VALUES {}", rows(n, width));
    match dialect {
        Dialect::Sqlite => format!("{head} ON CONFLICT DO NOTHING"),
        Dialect::MySql => format!("{head} ON DUPLICATE KEY UPDATE {key} = {key}"),
    }
}

/// Names, twice: accounts with last activity, and what waits for them.
pub(super) static LOAD: Statement = Statement::ask(|dialect, n| {
    format!(
        "SELECT 0, u.id, u.name, u.revision, l.at, u.record, l.status
            FROM users u LEFT JOIN last_activities l ON l.owner = u.id WHERE u.name IN ({names})
        UNION ALL
        SELECT 1, p.owner, NULL, p.id, p.meta, COALESCE(p.stanza, a.stanza), NULL
            FROM users u {then} pending p ON p.owner = u.id
            LEFT JOIN archive a ON a.id = p.id AND p.stanza IS NULL WHERE u.name IN ({names})",
        names = marks(n),
        then = then(dialect)
    )
});

/// (number, name, key). The number's type is said: MySQL 8.0.22 and later decide it when they prepare the statement, and
/// a parameter that stands alone is text for them.
pub(super) static DOCUMENTS: Statement = Statement::ask(|dialect, n| {
    let integer = match dialect {
        Dialect::Sqlite => "INTEGER",
        Dialect::MySql => "SIGNED",
    };
    let one = format!(
        "SELECT CAST(? AS {integer}), d.value FROM users u {} documents d ON d.owner = u.id WHERE u.name = ? AND d.doc_key = ?",
        then(dialect)
    );
    vec![one; n].join(" UNION ALL ")
});

/// Names: their numbers and revisions.
pub(super) static FIND: Statement = Statement::ask(|_, n| {
    format!(
        "SELECT id, name, added, revision FROM users WHERE name IN ({})",
        marks(n)
    )
});

/// The same before a change of the accounts themselves: nobody else changes them meanwhile.
pub(super) static FIND_TO_CHANGE: Statement = Statement::ask(|dialect, n| {
    let lock = match dialect {
        Dialect::Sqlite => "",
        Dialect::MySql => " FOR UPDATE",
    };
    format!(
        "SELECT id, name, added, revision FROM users WHERE name IN ({}){lock}",
        marks(n)
    )
});

pub(super) static FIND_REMOVED: Statement = Statement::ask(|_, n| {
    format!(
        "SELECT name, revision FROM removed WHERE name IN ({})",
        marks(n)
    )
});

pub(super) static ADD_USERS: Statement = Statement::change(|_, n| {
    format!(
        "INSERT INTO users (name, added, created_at, updated_at, disabled, sha1_iterations, sha1_salt_len,
            sha256_iterations, sha256_salt_len, record, revision) VALUES {}",
        rows(n, 11)
    )
});

pub(super) static PUT_USERS: Statement = Statement::change(|dialect, n| {
    let columns = [
        "name",
        "added",
        "created_at",
        "updated_at",
        "disabled",
        "sha1_iterations",
        "sha1_salt_len",
        "sha256_iterations",
        "sha256_salt_len",
        "record",
        "revision",
    ];
    upsert(dialect, "users", "id", &columns, Some("revision"), n)
});

pub(super) static DROP_USERS: Statement =
    Statement::change(|_, n| format!("DELETE FROM users WHERE id IN ({})", marks(n)));

pub(super) static PUT_PURGE: Statement =
    Statement::change(|dialect, n| insert_once(dialect, "gone", "owner", "owner", n));

pub(super) static PUT_REMOVED: Statement = Statement::change(|dialect, n| {
    upsert(
        dialect,
        "removed",
        "name",
        &["revision"],
        Some("revision"),
        n,
    )
});

pub(super) static DROP_REMOVED: Statement =
    Statement::change(|_, n| format!("DELETE FROM removed WHERE name IN ({})", marks(n)));

pub(super) static PUT_ARCHIVE: Statement = Statement::change(|dialect, n| {
    insert_once(
        dialect,
        "archive",
        "id",
        "id, owner, peer_key, meta, peer, stanza",
        n,
    )
});

pub(super) static PUT_PENDING: Statement = Statement::change(|dialect, n| {
    insert_once(dialect, "pending", "id", "id, owner, meta, stanza", n)
});

pub(super) static DROP_ARCHIVE: Statement =
    Statement::change(|_, n| format!("DELETE FROM archive WHERE id IN ({})", marks(n)));

pub(super) static DROP_PENDING: Statement =
    Statement::change(|_, n| format!("DELETE FROM pending WHERE id IN ({})", marks(n)));

pub(super) static PUT_RETRACTIONS: Statement = Statement::change(|dialect, n| {
    insert_once(
        dialect,
        "retractions",
        "id",
        "id, owner, target_key, side, peer, target, tombstone",
        n,
    )
});

pub(super) static DROP_RETRACTIONS: Statement =
    Statement::change(|_, n| format!("DELETE FROM retractions WHERE id IN ({})", marks(n)));

/// What waits and is to be in no archive keeps its text itself.
pub(super) static UNARCHIVE_PENDING: Statement = Statement::change(|_, n| {
    let rest = u32::MAX - u32::from(Message::ARCHIVE);
    format!(
        "UPDATE pending SET stanza = COALESCE(stanza, (SELECT a.stanza FROM archive a WHERE a.id = pending.id)),
            meta = meta & {rest} WHERE id IN ({})",
        marks(n)
    )
});

/// (name, key): retractions of entries that are named by an id with this key.
pub(super) static RETRACTIONS: Statement = Statement::ask(|dialect, n| {
    let one = format!(
        "SELECT r.id, r.side, r.peer, r.target, r.tombstone FROM users u {} retractions r ON r.owner = u.id
            WHERE u.name = ? AND r.target_key = ?",
        then(dialect)
    );
    vec![one; n].join(" UNION ALL ")
});

/// Takes [`Message::UNDECIDED`](crate::store::change::Message::UNDECIDED) out of `meta`, which has 32 bits.
pub(super) static DECIDE: Statement = Statement::change(|_, n| {
    let rest = u32::MAX - u32::from(Message::UNDECIDED);
    format!(
        "UPDATE pending SET meta = meta & {rest} WHERE id IN ({})",
        marks(n)
    )
});

pub(super) static PUT_DOCUMENTS: Statement = Statement::change(|dialect, n| {
    upsert(
        dialect,
        "documents",
        "owner, doc_key",
        &["value", "revision"],
        Some("revision"),
        n,
    )
});

pub(super) static PUT_LAST: Statement = Statement::change(|dialect, n| {
    upsert(
        dialect,
        "last_activities",
        "owner",
        &["at", "status", "revision"],
        Some("revision"),
        n,
    )
});

pub(super) static PUT_DRAINED: Statement = Statement::change(|dialect, n| {
    upsert(dialect, "drained", "identity, journal", &["seq"], None, n)
});

pub(super) static PUT_QUARANTINE: Statement = Statement::change(|dialect, n| {
    insert_once(
        dialect,
        "quarantine",
        "part",
        "identity, journal, seq, part, at, reason, payload",
        n,
    )
});

pub(super) const EPOCH: &str = "SELECT value FROM state WHERE name = 'accounts'";
pub(super) const NEXT_EPOCH: &str = "UPDATE state SET value = value + 1 WHERE name = 'accounts'";
pub(super) const POSITIONS: &str = "SELECT identity, journal, seq FROM drained";
pub(super) const HIGHEST: &str = "SELECT max(id) FROM archive UNION ALL SELECT max(id) FROM pending UNION ALL SELECT max(revision) FROM removed";
/// Rooms and others that no person logs in as have an `@` in their names.
pub(super) const COUNT: &str = "SELECT count(*) FROM users WHERE name NOT LIKE '%@%'";
pub(super) const KEY_SHAPES: &str =
    "SELECT sha1_iterations, sha1_salt_len, sha256_iterations, sha256_salt_len, count(*)
    FROM users GROUP BY 1, 2, 3, 4 ORDER BY 5 DESC";
/// After, limit. Rooms have no keys to log in with: the index finds them among any number of accounts, in order of the rows.
pub(super) const ROOMS: &str = "SELECT u.id, u.name, u.record, d.value FROM users u
    LEFT JOIN documents d ON d.owner = u.id AND d.doc_key = 'room-maker'
    WHERE u.sha1_iterations IS NULL AND u.sha1_salt_len IS NULL AND u.sha256_iterations IS NULL
    AND u.sha256_salt_len IS NULL AND u.id > ? AND u.name LIKE '%@rooms' ORDER BY u.id LIMIT ?";
/// Prefix, behind the prefix, after, limit.
pub(super) const LIST: &str = "SELECT name, created_at, updated_at, disabled FROM users
    WHERE name >= ? AND name < ? AND name > ? AND name NOT LIKE '%@%' ORDER BY name LIMIT ?";
pub(super) const NEXT_ROOM: &str =
    "SELECT name FROM users WHERE name > ? AND name LIKE '%@rooms' ORDER BY name LIMIT 1";
pub(super) const QUARANTINED: &str = "SELECT count(*) FROM quarantine WHERE part = 0";

pub(super) const TO_PURGE: &str = "SELECT owner FROM gone LIMIT 1";
/// Those of one owner, 1,000 at a time.
pub(super) fn purge_archive(dialect: Dialect) -> &'static str {
    match dialect {
        Dialect::Sqlite => {
            "DELETE FROM archive WHERE id IN (SELECT id FROM archive WHERE owner = ? LIMIT 1000)"
        }
        Dialect::MySql => "DELETE FROM archive WHERE owner = ? LIMIT 1000",
    }
}
pub(super) const PURGE_REST: [&str; 5] = [
    "DELETE FROM pending WHERE owner = ?",
    "DELETE FROM retractions WHERE owner = ?",
    "DELETE FROM documents WHERE owner = ?",
    "DELETE FROM last_activities WHERE owner = ?",
    "DELETE FROM gone WHERE owner = ?",
];
