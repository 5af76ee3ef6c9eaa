//! What is read: users, documents, pages of an archive, and what operators ask.

use fnv::FnvHashMap;
use sqlx::AssertSqlSafe;

use super::connection::{Dialect, Row, SqlError, Value};
use super::statements::{self, ASK_MAX};
use super::{Position, Sql, peer_key, split_jid};
use crate::store::change::Id;
use crate::store::record::{Record, RecordError};
use crate::store::tier::{
    ArchiveQuery, Entry, Last, Loaded, Page, Pending, Retraction, StoredRoom,
};

/// What a load found for one name.
pub type Found = Result<Option<Loaded>, RecordError>;

/// How many accounts have keys of one shape; what an unknown user is shown follows this distribution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyShape {
    /// Iterations and bytes of salt, for SCRAM-SHA-1.
    pub sha1: Option<(u32, usize)>,
    /// The same for SCRAM-SHA-256.
    pub sha256: Option<(u32, usize)>,
    pub users: u64,
}

/// One line of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    pub name: String,
    /// Unix seconds.
    pub created_at: u64,
    /// Unix seconds of the record's last change.
    pub updated_at: u64,
    pub disabled: bool,
}

impl Sql {
    /// Names that one [`Sql::load`] takes at most.
    pub const LOADS_MAX: usize = ASK_MAX;

    /// Ids that one [`ArchiveQuery`] may name.
    pub const IDS_MAX: usize = 5_000;

    /// More entries than this are not counted beside a page: a page of a long archive must not read all of its index. It then
    /// has neither count nor index, which XEP-0059 2.6 allows. Who asks for the count only (its 2.7) is told.
    pub const COUNT_MAX: u64 = 10_000;

    /// Loads up to [`Sql::LOADS_MAX`] users with one statement. The answers stand in the order of `names`.
    pub async fn load(&mut self, names: &[&str]) -> Result<Vec<Found>, SqlError> {
        let rows = self
            .conn
            .ask_about(&statements::LOAD, names, 2, |values, name| {
                values.push(Value::Text(name));
            })
            .await?;
        let mut loaded: FnvHashMap<&[u8], Found> = FnvHashMap::default();
        let mut owners: FnvHashMap<i64, &[u8]> = FnvHashMap::default();
        let mut pending: FnvHashMap<i64, Vec<Pending>> = FnvHashMap::default();
        for row in &rows {
            let owner = row.int(1)?;
            if row.int(0)? == 1 {
                let waiting = pending.entry(owner).or_default();
                waiting.push(pending_of(row)?);
                continue;
            }
            let name = row.bytes(2)?;
            let last = match row.optional_int(4)? {
                Some(at) => Some(Last {
                    at: at as u64,
                    status: row.text(6)?.into(),
                }),
                None => None,
            };
            let revision = row.id(3)?;
            let record = Record::from_bytes(row.bytes(5)?);
            owners.insert(owner, name);
            loaded.insert(
                name,
                record.map(|record| {
                    Some(Loaded {
                        record,
                        revision,
                        pending: Vec::new(),
                        last,
                        index: None,
                    })
                }),
            );
        }
        for (owner, mut waiting) in pending {
            waiting.sort_by_key(|one| one.id);
            let found = owners.get(&owner).and_then(|name| loaded.get_mut(name));
            if let Some(Ok(Some(user))) = found {
                user.pending = waiting;
            }
        }
        // nobody is asked for twice in one statement
        let found = |name: &&str| loaded.remove(name.as_bytes()).unwrap_or(Ok(None));
        Ok(names.iter().map(found).collect())
    }

    /// Reads documents, each (name, key), up to 50 with one statement.
    pub async fn documents(
        &mut self,
        wanted: &[(&str, &str)],
    ) -> Result<Vec<Option<Box<[u8]>>>, SqlError> {
        let mut found = vec![None; wanted.len()];
        let dialect = self.conn.dialect();
        let mut asked: Vec<_> = wanted
            .iter()
            .enumerate()
            .map(|(n, (name, key))| (n, *name, Sql::stored_key(dialect, key)))
            .collect();
        // What came from MySQL has long keys in their short form, until it is written again.
        let own = asked.len();
        for (n, (name, key)) in wanted.iter().enumerate() {
            let short = Sql::short_key(key);
            if dialect == Dialect::Sqlite && short != *key {
                asked.push((own + n, *name, short));
            }
        }
        let mut came = vec![None; own];
        let mut is_own = vec![false; own];
        for asked in asked.chunks(ASK_MAX) {
            let rows = self.conn.ask_about(
                &statements::DOCUMENTS,
                asked,
                1,
                |values, (n, name, key)| {
                    values.extend([Value::Int(*n as i64), Value::Text(name), Value::Text(key)]);
                },
            );
            for row in rows.await? {
                let (n, value) = (row.int(0)? as usize, row.bytes(1)?);
                let value = (!value.is_empty()).then(|| value.into());
                match n < own {
                    true => (found[n], is_own[n]) = (value, true),
                    false => came[n - own] = value,
                }
            }
        }
        for (n, came) in came.into_iter().enumerate().filter(|(n, _)| !is_own[*n]) {
            found[n] = came;
        }
        Ok(found)
    }

    /// Retractions of entries that are named by ids with one of these keys, in the order of their ids.
    pub async fn retractions(
        &mut self,
        name: &str,
        keys: &[i64],
    ) -> Result<Vec<Retraction>, SqlError> {
        let mut found = Vec::new();
        for keys in keys.chunks(ASK_MAX) {
            let rows = self
                .conn
                .ask_about(&statements::RETRACTIONS, keys, 1, |values, key| {
                    values.extend([Value::Text(name), Value::Int(*key)])
                });
            for row in rows.await? {
                found.push(Retraction {
                    id: row.id(0)?,
                    side: row.int(1)? as u8,
                    peer: row.text(2)?.into(),
                    target: row.text(3)?.into(),
                    tombstone: row.bytes(4)?.into(),
                });
            }
        }
        found.sort_by_key(|one| one.id);
        found.dedup_by_key(|one| one.id);
        Ok(found)
    }

    /// Chat rooms behind a row, in order of their rows.
    pub async fn rooms(&mut self, after: u64, most: u32) -> Result<Vec<StoredRoom>, SqlError> {
        let values = [Value::from(after), Value::from(u64::from(most))];
        let rows = self.conn.ask(statements::ROOMS, &values).await?;
        let mut found = Vec::with_capacity(rows.len());
        for row in &rows {
            let name = row.text(1)?;
            let record = Record::from_bytes(row.bytes(2)?);
            if let Err(error) = &record {
                tracing::error!(room = name, %error, "the record of a room cannot be read");
            }
            let maker = row.optional_bytes(3)?.unwrap_or_default();
            found.push(StoredRoom {
                number: row.id(0)?,
                name: name.into(),
                record: record.ok(),
                maker: String::from_utf8_lossy(maker).into(),
            });
        }
        Ok(found)
    }

    /// One page of an archive, with one statement.
    pub async fn archive_page(&mut self, query: &ArchiveQuery) -> Result<Page, SqlError> {
        if query.ids.len() > Sql::IDS_MAX {
            let (asked, most) = (query.ids.len(), Sql::IDS_MAX);
            return Err(SqlError::refused(format!(
                "{asked} ids are more than the {most} that one page may name"
            )));
        }
        let resources = resources(query);
        let (text, values) = PageStatement::of(query, resources.as_ref(), self.conn.dialect());
        let rows = self.conn.ask(AssertSqlSafe(text), &values).await?;
        let mut page = Page::default();
        let mut mentioned = query.mentioned();
        for row in &rows {
            match row.int(0)? {
                0 => {
                    page.last_id = row.id(1)?;
                    page.retracted = row.optional_bytes(4)?.is_some();
                    if query.count {
                        let most = if query.most == 0 {
                            u64::MAX
                        } else {
                            Sql::COUNT_MAX
                        };
                        let exact = |n: i64| u64::try_from(n).ok().filter(|n| *n <= most);
                        let (all, before) = (row.int(2)?, row.int(3)?);
                        page.count = exact(all);
                        // Those before the page: counted up to where it begins, or up to where it ends.
                        page.index = exact(if before == SAME { all } else { before });
                    }
                }
                1 => page.entries.push(entry_of(row)?),
                _ => {
                    let id = row.id(1)?;
                    mentioned.retain(|one| *one != id);
                }
            }
        }
        // Databases deliver the rows of a limited part in its order, but do not promise it behind UNION ALL.
        page.entries.sort_by_key(|entry| entry.id);
        page.complete = page.entries.len() <= query.most as usize;
        if !page.complete {
            match query.backwards {
                true => drop(page.entries.remove(0)),
                false => drop(page.entries.pop()),
            }
        }
        if let (true, Some(index)) = (query.backwards, &mut page.index) {
            *index = index.saturating_sub(page.entries.len() as u64);
        }
        page.missing = mentioned;
        Ok(page)
    }

    /// What the database says of the way to a page: a line for each table.
    #[cfg(test)]
    pub(super) async fn explain_page(
        &mut self,
        query: &ArchiveQuery,
    ) -> Result<Vec<String>, SqlError> {
        let dialect = self.conn.dialect();
        let resources = resources(query);
        let (text, values) = PageStatement::of(query, resources.as_ref(), dialect);
        let (explain, columns) = match dialect {
            Dialect::Sqlite => ("EXPLAIN QUERY PLAN ", &[3][..]),
            // table, key, ref, Extra
            Dialect::MySql => ("EXPLAIN ", &[2, 5, 7, 9][..]),
        };
        let rows = self
            .conn
            .ask(AssertSqlSafe(explain.to_owned() + &text), &values)
            .await?;
        let line = |row: &Row| {
            let texts: Result<Vec<&str>, _> = columns.iter().map(|at| row.text(*at)).collect();
            Ok(texts?.join(" "))
        };
        rows.iter().map(line).collect()
    }

    /// Up to where each journal is applied.
    pub async fn positions(&mut self) -> Result<Vec<Position>, SqlError> {
        let rows = self.conn.ask(statements::POSITIONS, &[]).await?;
        rows.iter()
            .map(|row| {
                Ok(Position {
                    identity: row.id(0)?,
                    journal: row.int(1)? as u16,
                    seq: row.id(2)?,
                })
            })
            .collect()
    }

    /// No id or revision here is higher, but that of an account's record (which a load shows): new ids must be, or they
    /// would be taken for old ones.
    pub async fn highest_id(&mut self) -> Result<u64, SqlError> {
        let rows = self.conn.ask(statements::HIGHEST, &[]).await?;
        let ids = rows.iter().map(|row| row.id(0));
        ids.collect::<Result<Vec<_>, _>>()
            .map(|ids| ids.into_iter().max().unwrap_or(0))
    }

    /// Counts of accounts by the shape of their keys; without any, nobody logs in: rooms, for instance.
    pub async fn key_shapes(&mut self) -> Result<Vec<KeyShape>, SqlError> {
        let rows = self.conn.ask(statements::KEY_SHAPES, &[]).await?;
        let shape = |row: &Row, at: usize| -> Result<Option<(u32, usize)>, SqlError> {
            let (iterations, salt_len) = (row.optional_int(at)?, row.optional_int(at + 1)?);
            Ok(iterations
                .zip(salt_len)
                .map(|(iterations, salt_len)| (iterations as u32, salt_len as usize)))
        };
        let shapes = rows.iter().map(|row| {
            Ok(KeyShape {
                sha1: shape(row, 0)?,
                sha256: shape(row, 2)?,
                users: row.id(4)?,
            })
        });
        let logs_in = |shape: &KeyShape| shape.sha1.is_some() || shape.sha256.is_some();
        shapes
            .filter(|shape| shape.as_ref().map_or(true, logs_in))
            .collect()
    }

    /// Accounts whose name begins with `prefix` and comes after `after`, in order of their bytes.
    pub async fn list(
        &mut self,
        prefix: &str,
        after: &str,
        limit: usize,
    ) -> Result<Vec<Listed>, SqlError> {
        // No name that begins with the prefix is behind the prefix and Unicode's last character.
        let behind = format!("{prefix}\u{10ffff}");
        let values = [
            Value::Text(prefix),
            Value::Text(&behind),
            Value::Text(after),
            Value::from(limit as u64),
        ];
        let rows = self.conn.ask(statements::LIST, &values).await?;
        rows.iter()
            .map(|row| {
                Ok(Listed {
                    name: row.text(0)?.to_owned(),
                    created_at: row.id(1)?,
                    updated_at: row.id(2)?,
                    disabled: row.int(3)? != 0,
                })
            })
            .collect()
    }

    /// How many accounts there are.
    pub async fn count(&mut self) -> Result<u64, SqlError> {
        self.number(statements::COUNT).await
    }

    /// How many records lie in `quarantine`.
    pub async fn quarantined(&mut self) -> Result<u64, SqlError> {
        self.number(statements::QUARANTINED).await
    }

    async fn number(&mut self, statement: &'static str) -> Result<u64, SqlError> {
        let rows = self.conn.ask(statement, &[]).await?;
        rows.first().map_or(Ok(0), |row| row.id(0))
    }
}

fn pending_of(row: &Row) -> Result<Pending, SqlError> {
    let (what, kind, flags) = meta_parts(row.int(4)?);
    Ok(Pending {
        id: row.id(3)?,
        what,
        kind,
        flags,
        stanza: row.bytes(5)?.into(),
    })
}

fn entry_of(row: &Row) -> Result<Entry, SqlError> {
    let (what, kind, flags) = meta_parts(row.int(2)?);
    Ok(Entry {
        id: row.id(1)?,
        what,
        kind,
        flags,
        peer: row.text(4)?.into(),
        stanza: row.bytes(5)?.into(),
    })
}

/// `meta` of the tables: what | kind << 8 | flags << 16.
pub(super) fn meta(what: u8, kind: u8, flags: u16) -> i64 {
    i64::from(what) | i64::from(kind) << 8 | i64::from(flags) << 16
}

fn meta_parts(meta: i64) -> (u8, u8, u16) {
    (meta as u8, (meta >> 8) as u8, (meta >> 16) as u16)
}

impl ArchiveQuery {
    /// Ids that must be in the archive, each once.
    fn mentioned(&self) -> Vec<u64> {
        let bounds = [self.after, self.before, self.after_id, self.before_id];
        let bounds = bounds.into_iter().flatten();
        let mut ids: Vec<u64> = bounds.chain(self.ids.iter().copied()).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }
}

/// Writes the statement of a page: a head (type 0: highest id, count, index, a retraction), the page (1), and those of the ids
/// mentioned that exist (2). Every part is about one owner and a range of ids, so `archive_owner` serves all.
struct PageStatement<'q> {
    query: &'q ArchiveQuery,
    /// [`resources`] of it.
    resources: Option<&'q [String; 2]>,
    values: Vec<Value<'q>>,
    dialect: Dialect,
}

/// Ids from `.0` to `.1`, both inclusive.
type Range = (u64, u64);

/// Where a query is for a bare JID: what all its full JIDs are behind, and before. '0' is the byte behind '/'.
fn resources(query: &ArchiveQuery) -> Option<[String; 2]> {
    match split_jid(query.with.as_deref()?) {
        (bare, None) => Some([format!("{bare}/"), format!("{bare}0")]),
        _ => None,
    }
}

impl<'q> PageStatement<'q> {
    fn of(
        query: &'q ArchiveQuery,
        resources: Option<&'q [String; 2]>,
        dialect: Dialect,
    ) -> (String, Vec<Value<'q>>) {
        let mut statement = PageStatement {
            query,
            resources,
            values: Vec::new(),
            dialect,
        };
        let text = statement.write();
        (text, statement.values)
    }

    fn write(&mut self) -> String {
        let query = self.query;
        let filter = cut(
            (
                query.start_ms.map_or(0, |ms| Id::at(ms.min(LAST_MS)).0),
                query
                    .end_ms
                    .map_or(u64::MAX, |ms| Id::at(ms.min(LAST_MS) + 1).0 - 1),
            ),
            query.after_id,
            query.before_id,
        );
        let page = cut(filter, query.after, query.before);
        let mut text = format!(
            "SELECT 0, (SELECT max(k.id) FROM {} WHERE k.owner = {OWNER}), ",
            statements::archive(self.dialect, false).0
        );
        self.values.push(Value::Text(&query.name));
        if query.count {
            // Forwards a page begins behind `after`; backwards it ends before `before`, and its length is taken off.
            let before_page = match (query.backwards, query.after, query.before) {
                (false, None, _) => (1, 0),
                (false, Some(after), _) => cut((filter.0, after.min(filter.1)), None, None),
                (true, _, before) => cut(filter, None, before),
            };
            text += &format!("({}), ", self.count(filter));
            text += &match before_page == filter {
                true => SAME.to_string(),
                false => format!("({})", self.count(before_page)),
            };
        } else {
            text += "0, 0";
        }
        let (_, row) = statements::archive(self.dialect, query.with.is_some());
        self.values.push(Value::Text(&query.name));
        text += &format!(
            ", (SELECT r.target FROM retractions r WHERE r.owner = {OWNER} LIMIT 1), NULL UNION ALL SELECT * FROM (SELECT 1 AS part, k.id, {row}.meta, 0 AS unused, {row}.peer, {row}.stanza FROM "
        );
        text += &self.matches(page);
        text += match query.backwards {
            true => " ORDER BY k.id DESC LIMIT ?) AS page",
            false => " ORDER BY k.id LIMIT ?) AS page",
        };
        self.values.push(Value::Int(i64::from(query.most) + 1));
        let mentioned = query.mentioned();
        if !mentioned.is_empty() {
            text += &format!(
                " UNION ALL SELECT 2, id, 0, 0, NULL, NULL FROM archive WHERE owner = {OWNER} AND id IN ("
            );
            self.values.push(Value::Text(&query.name));
            self.list(&mentioned, &mut text);
        }
        text
    }

    fn count(&mut self, range: Range) -> String {
        let matches = self.matches(range);
        match self.query.most {
            // the count is all that is asked for
            0 => format!("SELECT count(*) FROM {matches}"),
            _ => format!(
                "SELECT count(*) FROM (SELECT 1 FROM {matches} LIMIT {COUNT_BEHIND}) AS counted"
            ),
        }
    }

    /// The archive and the filter's conditions within a range of ids.
    fn matches(&mut self, (first, last): Range) -> String {
        let (archive, row) = statements::archive(self.dialect, self.query.with.is_some());
        let mut text = format!("{archive} WHERE k.owner = {OWNER} AND k.id >= ? AND k.id <= ?");
        self.values.extend([
            Value::Text(&self.query.name),
            Value::from(first),
            Value::from(last),
        ]);
        if let Some(with) = &self.query.with {
            text += " AND k.peer_key = ?";
            self.values.push(Value::Int(peer_key(with)));
            self.values.push(Value::Text(with));
            match self.resources {
                None => text += &format!(" AND {row}.peer = ?"),
                Some([first, behind]) => {
                    text +=
                        &format!(" AND ({row}.peer = ? OR ({row}.peer > ? AND {row}.peer < ?))");
                    self.values
                        .extend([Value::Text(first), Value::Text(behind)]);
                }
            }
        }
        if !self.query.ids.is_empty() {
            text += " AND k.id IN (";
            self.list(&self.query.ids, &mut text);
        }
        text
    }

    /// `?,?,?)`: filled up with the last id again, so that there are few different statements.
    fn list(&mut self, ids: &[u64], text: &mut String) {
        let size = match ids.len() {
            0..=4 => 4,
            len => len.next_multiple_of(ASK_MAX),
        };
        *text += &statements::marks(size);
        *text += ")";
        let last = ids.last().copied().unwrap_or(0);
        let ids = ids.iter().copied().chain(std::iter::repeat(last));
        self.values.extend(ids.take(size).map(Value::from));
    }
}

/// The number of a user in one of the page's parts; nobody has NULL.
const OWNER: &str = "(SELECT u.id FROM users u WHERE u.name = ?)";

/// Stands for a count that is the one before it.
const SAME: i64 = -1;

/// Where counting stops: what is there is more than [`Sql::COUNT_MAX`].
const COUNT_BEHIND: u64 = Sql::COUNT_MAX + 1;

/// Milliseconds that an id can carry without leaving `i64`.
const LAST_MS: u64 = (1 << 42) - 2;

/// What of a range lies between two exclusive bounds.
fn cut((first, last): Range, after: Option<u64>, before: Option<u64>) -> Range {
    let first = after.map_or(first, |after| first.max(after.saturating_add(1)));
    let last = match before {
        Some(0) => return (1, 0),
        Some(before) => last.min(before - 1),
        None => last,
    };
    (first, last)
}
