//! Migrations.

use super::*;

#[test]
fn what_the_first_schema_held_is_kept() {
    let place = sqlite();
    let Database::Sqlite(path) = &place.database else {
        unreachable!()
    };
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    run(async {
        use sqlx::Connection as _;
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let options = sqlx::sqlite::SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true);
        let mut old = sqlx::SqliteConnection::connect_with(&options)
            .await
            .unwrap();
        crate::store::sql::schema::first_of_sqlite()
            .run(&mut old)
            .await
            .unwrap();
        for n in 0..3_i64 {
            let user = "INSERT INTO users (id, name, created_at, updated_at, disabled, record) VALUES (?, ?, 1, 1, 0, ?)";
            let record = record(n as usize);
            let user = sqlx::query(user).bind(n).bind(format!("trader{n}"));
            user.bind(record.bytes()).execute(&mut old).await.unwrap();
            for id in [7, 3, 5] {
                let stanza = format!("<message id='{n}-{id}'/>").into_bytes();
                let row = sqlx::query("INSERT INTO offline (user, id, stanza) VALUES (?, ?, ?)");
                let row = row.bind(n).bind(id).bind(stanza);
                row.execute(&mut old).await.unwrap();
            }
            let row = sqlx::query("INSERT INTO document (user, key, value) VALUES (?, 'vcard', ?)");
            let row = row.bind(n).bind(vec![n as u8; 3]);
            row.execute(&mut old).await.unwrap();
            let row = sqlx::query("INSERT INTO last_activity VALUES (?, 77, 'bye')");
            row.bind(n).execute(&mut old).await.unwrap();
        }
        old.close().await.unwrap();
    });
    run(async {
        let mut sql = open(&place).await;
        for n in 0..3_usize {
            let name = format!("trader{n}");
            let loaded = load(&mut sql, &name).await.unwrap();
            assert_eq!(loaded.record, record(n));
            assert_eq!(loaded.last.unwrap().at, 77);
            let stanzas: Vec<_> = loaded
                .pending
                .iter()
                .map(|one| String::from_utf8_lossy(&one.stanza).into_owned())
                .collect();
            assert_eq!(
                stanzas,
                [3, 5, 7].map(|id| format!("<message id='{n}-{id}'/>"))
            );
            let ids: Vec<u64> = loaded.pending.iter().map(|one| one.id).collect();
            let what = loaded.pending[0].what;
            assert_eq!(what, Message::PENDING | Message::RECEIVED);
            let marks = Change::Marks(Marks {
                done: &ids,
                ..Marks::default()
            });
            apply(&mut sql, &[marks]).await.unwrap();
            assert!(load(&mut sql, &name).await.unwrap().pending.is_empty());
            let vcard = sql.documents(&[(&name, "vcard")]).await.unwrap();
            assert_eq!(vcard, [Some(vec![n as u8; 3].into())]);
        }
        let put = record(9);
        let change = Change::PutUser {
            name: "trader1",
            revision: 1,
            record: put.bytes(),
        };
        apply(&mut sql, &[change]).await.unwrap();
        assert_eq!(load(&mut sql, "trader1").await.unwrap().record, put);
    });
}

#[test]
fn a_newer_schema_is_refused_with_a_sentence() {
    for place in places() {
        run(async {
            let mut sql = open(&place).await;
            sql.conn
                .batch("INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) VALUES (9999, 'later', 1, 'x', 0)")
                .await
                .unwrap();
        });
        let sentence = Bench::try_with(&place.database, vec![], |_| {})
            .err()
            .unwrap();
        assert!(
            sentence.contains("schema 9999") && sentence.contains("newer nitro"),
            "{sentence}"
        );
    }
}

/// Not a test by itself: what the processes of the next one do.
#[test]
fn a_process_that_opens_what_it_is_told() {
    if let Ok(address) = std::env::var("NITRO_TEST_OPEN") {
        let database = Database::parse(&address).unwrap();
        run(async {
            let sql = Sql::open(&database, 1 << 20, Default::default()).await;
            assert_eq!(sql.unwrap().count().await.unwrap(), 0);
        });
    }
}

#[test]
fn processes_that_migrate_at_once_do_it_once() {
    for place in places() {
        let program = std::env::current_exe().unwrap();
        let processes: Vec<_> = (0..6)
            .map(|_| {
                std::process::Command::new(&program)
                    .args([
                        "--exact",
                        "store::sql::tests::schema::a_process_that_opens_what_it_is_told",
                    ])
                    .env("NITRO_TEST_OPEN", &place.address)
                    .stdout(std::process::Stdio::piped())
                    .spawn()
                    .unwrap()
            })
            .collect();
        for process in processes {
            let output = process.wait_with_output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(
                output.status.success() && text.contains("1 passed"),
                "{text}"
            );
        }
        run(async {
            let mut sql = open(&place).await;
            let applied = sql.conn.ask("SELECT count(*) FROM _sqlx_migrations", &[]);
            let applied = applied.await.unwrap()[0].int(0).unwrap();
            assert_eq!(
                applied,
                crate::store::sql::schema::count(sql.conn.dialect())
            );
        });
    }
}

#[test]
fn what_is_wrong_with_a_server_is_said_in_a_sentence() {
    let Some(server) = mariadb() else { return };
    let wrong = |change: &dyn Fn(&str) -> String| {
        let database = Database::parse(&change(&server.url())).unwrap();
        Bench::try_with(&database, vec![], |_| {}).err().unwrap()
    };
    let sentence = wrong(&|url| url.replace("secret", "guess"));
    assert!(
        sentence.contains("Access denied") && !sentence.contains("guess"),
        "{sentence}"
    );
    let sentence = wrong(&|url| url.replace("/nitro?", "/nothing?"));
    assert!(sentence.contains("nothing"), "{sentence}");
    server.sql("CREATE DATABASE readable; GRANT SELECT ON readable.* TO 'nitro'@'localhost'");
    let sentence = wrong(&|url| url.replace("/nitro?", "/readable?"));
    assert!(
        sentence.contains("denied") && sentence.contains("schema"),
        "{sentence}"
    );
}
