//! Pages of an archive, against a model that filters a list.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::*;
use crate::store::tier::{ArchiveQuery, Page};

const PEERS: [&str; 6] = [
    "juliet@example.com",
    "juliet@example.com/balcony",
    "juliet@example.com/chamber",
    "juliet@example.com0",
    "JULIET@example.com",
    "nurse@example.com/a/b",
];

const START_MS: u64 = 1_790_000_000_000;

fn ids() -> Vec<u64> {
    // Some share a millisecond, and two shards take turns.
    let id = |n: u64| Id::at(START_MS + n / 3).0 + ((n % 2) << 13) + n;
    let mut ids: Vec<u64> = (0..60).map(id).collect();
    ids.sort_unstable();
    ids
}

fn peer(n: usize) -> &'static str {
    PEERS[n * 7 % PEERS.len()]
}

fn expected(query: &ArchiveQuery) -> Page {
    let all: Vec<(u64, &str)> = ids()
        .into_iter()
        .enumerate()
        .map(|(n, id)| (id, peer(n)))
        .collect();
    let all = if &*query.name == "romeo" {
        all
    } else {
        Vec::new()
    };
    let with = |peer: &str| match query.with.as_deref() {
        None => true,
        Some(with) => {
            peer == with || (!with.contains('/') && peer.starts_with(&format!("{with}/")))
        }
    };
    let matching: Vec<(u64, &str)> = all
        .iter()
        .copied()
        .filter(|(id, peer)| {
            with(peer)
                && query.start_ms.is_none_or(|ms| Id(*id).unix_ms() >= ms)
                && query.end_ms.is_none_or(|ms| Id(*id).unix_ms() <= ms)
                && query.after_id.is_none_or(|bound| *id > bound)
                && query.before_id.is_none_or(|bound| *id < bound)
                && (query.ids.is_empty() || query.ids.contains(id))
        })
        .collect();
    let window: Vec<(u64, &str)> = matching
        .iter()
        .copied()
        .filter(|(id, _)| {
            query.after.is_none_or(|bound| *id > bound)
                && query.before.is_none_or(|bound| *id < bound)
        })
        .collect();
    let most = query.most as usize;
    let page = match query.backwards {
        true => &window[window.len().saturating_sub(most)..],
        false => &window[..window.len().min(most)],
    };
    let mut missing: Vec<u64> = [query.after, query.before, query.after_id, query.before_id]
        .into_iter()
        .flatten()
        .chain(query.ids.iter().copied())
        .filter(|id| !all.iter().any(|(one, _)| one == id))
        .collect();
    missing.sort_unstable();
    missing.dedup();
    let index = page
        .first()
        .map(|(first, _)| matching.iter().filter(|(id, _)| id < first).count() as u64);
    Page {
        entries: page
            .iter()
            .map(|(id, peer)| crate::store::tier::Entry {
                id: *id,
                what: BOTH,
                kind: 1,
                flags: 0x8001,
                peer: (*peer).into(),
                stanza: (*b"<message><body>hi</body></message>").into(),
            })
            .collect(),
        complete: page.len() == window.len(),
        count: query.count.then_some(matching.len() as u64),
        index: index.filter(|_| query.count),
        missing,
        retracted: false,
        last_id: all.last().map_or(0, |(id, _)| *id),
    }
}

fn query() -> impl Strategy<Value = ArchiveQuery> {
    let known = prop::sample::select(ids());
    let id = prop_oneof![9 => known.clone(), 1 => known.prop_map(|id| id + 1)];
    let ms = START_MS - 2..START_MS + 24;
    let bounds = (
        prop::option::weighted(0.2, id.clone()),
        prop::option::weighted(0.2, id.clone()),
        prop::option::weighted(0.3, id.clone()),
        prop::option::weighted(0.3, id.clone()),
        prop_oneof![4 => Just(Vec::new()), 1 => prop::collection::vec(id, 1..9)],
    );
    let filters = (
        prop::sample::select(vec!["romeo", "romeo", "romeo", "paris", "nobody"]),
        prop::option::of(prop::sample::select(PEERS.to_vec())),
        prop::option::weighted(0.3, ms.clone()),
        prop::option::weighted(0.3, ms),
    );
    (bounds, filters, any::<bool>(), 0..70_u32, any::<bool>()).prop_map(
        |(
            (after_id, before_id, after, before, ids),
            (name, with, start_ms, end_ms),
            backwards,
            most,
            count,
        )| {
            ArchiveQuery {
                name: name.into(),
                with: with.map(Into::into),
                start_ms,
                end_ms,
                after_id,
                before_id,
                ids,
                after,
                before,
                backwards,
                most,
                count,
            }
        },
    )
}

#[test]
fn a_page_is_what_the_filters_say_in_both_directions() {
    for place in places() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let mut sql = runtime.block_on(open(&place));
        let record = record(0);
        let mut changes = vec![add("romeo", 1, &record), add("paris", 2, &record)];
        changes.extend(
            ids()
                .into_iter()
                .enumerate()
                .map(|(n, id)| Change::Message(message("romeo", id, BOTH, peer(n)))),
        );
        runtime.block_on(apply(&mut sql, &changes)).unwrap();
        let sql = std::cell::RefCell::new(sql);
        let config = Config {
            cases: 400,
            failure_persistence: None,
            ..Config::default()
        };
        TestRunner::new(config)
            .run(&query(), |query| {
                let before = sql.borrow().counters.statements.load(Relaxed);
                let mut page = runtime
                    .block_on(sql.borrow_mut().archive_page(&query))
                    .unwrap();
                prop_assert_eq!(sql.borrow().counters.statements.load(Relaxed), before + 1);
                if page.entries.is_empty() {
                    // There is no first entry that anything could lie before.
                    page.index = None;
                }
                let expected = expected(&query);
                let ids = |page: &Page| page.entries.iter().map(|one| one.id).collect::<Vec<_>>();
                prop_assert_eq!(ids(&page), ids(&expected));
                prop_assert_eq!(page, expected);
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn whoever_seldom_wrote_is_found_in_the_index_alone() {
    for place in places() {
        run(async {
            let mut sql = open(&place).await;
            let record = record(0);
            let mut changes = vec![add("romeo", 1, &record)];
            changes.extend((10..2_010).map(|id| {
                let peer = if id == 20 {
                    "paris@x.y/z"
                } else {
                    "juliet@x.y"
                };
                Change::Message(message("romeo", id, BOTH, peer))
            }));
            apply(&mut sql, &changes).await.unwrap();
            for (with, count) in [
                (Some("paris@x.y"), false),
                (Some("paris@x.y"), true),
                (Some("paris@x.y/z"), true),
                (None, false),
                (None, true),
            ] {
                let query = ArchiveQuery {
                    name: "romeo".into(),
                    with: with.map(Into::into),
                    most: 50,
                    backwards: true,
                    count,
                    ..ArchiveQuery::default()
                };
                let page = sql.archive_page(&query).await.unwrap();
                assert_eq!(page.entries.len(), if with.is_some() { 1 } else { 50 });
                let plan = sql.explain_page(&query).await.unwrap();
                let archive = |line: &&String| line.starts_with("k ") || line.contains(" k ");
                let scans: Vec<&String> = plan.iter().filter(archive).collect();
                // the highest id, the page, and a count: what matches is what lies before a page's end
                let parts = 2 + usize::from(count);
                // MySQL knows the highest id while it plans
                assert!(scans.len() >= parts - 1, "{plan:?}");
                for line in &scans {
                    assert!(line.contains("archive_owner"), "{plan:?}");
                }
                // MySQL's rows are looked at only where the index says so: behind it, by their key
                let covered = scans.iter().filter(|line| line.contains("Using index"));
                if place.server.is_some() && with.is_some() {
                    assert!(covered.count() >= parts - 1, "{plan:?}");
                    let rows = plan.iter().filter(|line| line.starts_with("a PRIMARY"));
                    assert_eq!(rows.count(), parts - 1, "{plan:?}");
                }
            }
        });
    }
}

#[test]
fn a_long_archive_is_counted_only_for_who_asks_for_nothing_else() {
    for place in places() {
        run(async {
            let mut sql = open(&place).await;
            let record = record(0);
            apply(&mut sql, &[add("romeo", 1, &record)]).await.unwrap();
            let count_max = Sql::COUNT_MAX;
            let mut page = async |ids: std::ops::Range<u64>, most, backwards| {
                let change = |id| Change::Message(message("romeo", id, BOTH, "juliet@x.y"));
                let changes: Vec<_> = ids.map(change).collect();
                for changes in changes.chunks(4_000) {
                    apply(&mut sql, changes).await.unwrap();
                }
                let query = ArchiveQuery {
                    name: "romeo".into(),
                    with: Some("juliet@x.y".into()),
                    most,
                    backwards,
                    count: true,
                    ..ArchiveQuery::default()
                };
                let page = sql.archive_page(&query).await.unwrap();
                assert_eq!(page.entries.len(), most as usize);
                (page.count, page.index)
            };
            let exact = (Some(count_max), Some(count_max - 50));
            assert_eq!(page(10..10 + count_max, 50, true).await, exact);
            assert_eq!(page(0..0, 50, false).await, (Some(count_max), Some(0)));
            let one_more = 10 + count_max..11 + count_max;
            assert_eq!(page(one_more, 50, true).await, (None, None));
            assert_eq!(page(0..0, 50, false).await, (None, Some(0)));
            assert_eq!(page(0..0, 0, true).await.0, Some(count_max + 1));
        });
    }
}

#[test]
fn many_ids_are_found_by_one_statement() {
    for place in places() {
        run(async {
            let mut sql = open(&place).await;
            let record = record(0);
            let mut changes = vec![add("romeo", 1, &record)];
            changes.extend((10..510).map(|id| Change::Message(message("romeo", id, BOTH, "x@y"))));
            apply(&mut sql, &changes).await.unwrap();
            let query = ArchiveQuery {
                name: "romeo".into(),
                ids: (10..600).step_by(3).collect(),
                most: 1_000,
                ..ArchiveQuery::default()
            };
            let page = sql.archive_page(&query).await.unwrap();
            assert_eq!(page.entries.len(), 167);
            assert_eq!(page.missing.len(), query.ids.len() - 167);
        });
    }
}
