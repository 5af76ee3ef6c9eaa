//! Chat rooms are found among the accounts.

use super::*;
use crate::store::room::{MAKER_KEY, RoomRecord};
use crate::store::tier::StoredRoom;

/// A record of a room that nobody can log in as.
fn room(created_at: u64) -> Record {
    Record::room(&RoomRecord {
        created_at,
        ..RoomRecord::default()
    })
}

async fn all(sql: &mut Sql, most: u32) -> Vec<StoredRoom> {
    let (mut found, mut after) = (Vec::new(), 0);
    loop {
        let page = sql.rooms(after, most).await.unwrap();
        assert!(page.len() <= most as usize);
        let Some(last) = page.last() else {
            return found;
        };
        assert!(page.is_sorted_by_key(|one| one.number) && page[0].number > after);
        after = last.number;
        found.extend(page);
    }
}

#[test]
fn rooms_are_found_page_by_page_with_who_has_made_them() {
    for place in places() {
        run(async {
            let mut sql = open(&place).await;
            let user = record(1);
            let rooms: Vec<Record> = (0..7).map(room).collect();
            let names: Vec<String> = (0..7).map(|n| format!("r{n}@rooms")).collect();
            let mut changes = vec![add("romeo", 100, &user), add("r1", 101, &user)];
            for (n, (name, record)) in (110..).step_by(10).zip(names.iter().zip(&rooms)) {
                changes.push(add(name, n, record));
                changes.push(Change::PutDocument {
                    name,
                    revision: n + 1,
                    key: "vcard",
                    value: b"<x/>",
                });
                if n > 110 {
                    changes.push(Change::PutDocument {
                        name,
                        revision: n + 2,
                        key: MAKER_KEY,
                        value: b"romeo@x",
                    });
                }
            }
            changes.push(Change::RemoveUser {
                name: "r6@rooms",
                revision: 300,
            });
            apply(&mut sql, &changes).await.unwrap();
            for most in [2, 100] {
                let found = all(&mut sql, most).await;
                let names: Vec<&str> = found.iter().map(|one| &*one.name).collect();
                let wanted = [
                    "r0@rooms", "r1@rooms", "r2@rooms", "r3@rooms", "r4@rooms", "r5@rooms",
                ];
                assert_eq!(names, wanted);
                let makers: Vec<&str> = found.iter().map(|one| &*one.maker).collect();
                assert_eq!(makers, [&[""][..], &["romeo@x"; 5]].concat());
                assert_eq!(found[3].record, Some(rooms[3].clone()));
            }
        });
    }
}
