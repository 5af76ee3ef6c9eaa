//! The HTTP door: `/healthz` (200 when the shard turns) and `/metrics` (OpenMetrics).

use std::rc::Rc;

use super::Shard;
use crate::net::{Read, Socket, Transport};

/// One request, one answer, then the connection closes.
pub async fn serve(shard: Rc<Shard>, socket: Socket) {
    let config = shard.config.borrow().clone();
    if shard.http_open.get() >= config.limits.http_connections_max {
        return;
    }
    shard.http_open.set(shard.http_open.get() + 1);
    let mut transport = Transport::plain(socket);
    let most = config.limits.http_head_bytes_max;
    let deadline_ms = shard.slice.borrow().now.ms + config.limits.http_seconds_max * 1000;
    let answer = shard
        .with_readiness(
            &mut transport,
            deadline_ms,
            async |shard, transport, notify| {
                let mut head = Vec::new();
                loop {
                    if let Some(answer) = answer(&head, most, || shard.metrics()) {
                        return answer;
                    }
                    let data = {
                        let mut scratch = shard.scratch.borrow_mut();
                        match transport.read(&mut scratch) {
                            Ok(Read::Data { bytes, .. }) => {
                                head.extend_from_slice(bytes);
                                true
                            }
                            Ok(Read::WouldBlock) => false,
                            _ => return String::new(),
                        }
                    };
                    if !data {
                        notify.ready.wait().await;
                    }
                }
            },
        )
        .await
        .unwrap_or_else(|| response(408, "Request Timeout", "too slow\n"));
    let _ = transport.write(answer.as_bytes(), &mut shard.scratch.borrow_mut());
    shard.close_transport(transport);
    shard.http_open.set(shard.http_open.get() - 1);
}

impl Shard {
    fn metrics(&self) -> String {
        let sql = self.lane.counters();
        let get = |counter: &std::sync::atomic::AtomicU64| {
            counter.load(std::sync::atomic::Ordering::Relaxed)
        };
        let redis = self.redis.as_ref().map(|redis| redis.figures().tables());
        self.gauges.render(
            &[
                (
                    "nitro_sql_statements",
                    "SQL statements, BEGIN and COMMIT included.",
                    get(&sql.statements),
                ),
                ("nitro_sql_loads", "Users asked for.", get(&sql.loads)),
                (
                    "nitro_sql_pages",
                    "Archive pages asked for.",
                    get(&sql.pages),
                ),
                (
                    "nitro_sql_drained",
                    "Records of journals that are in the database, or need not be.",
                    get(&sql.drained),
                ),
                (
                    "nitro_sql_rows",
                    "Rows that the drain wrote or deleted.",
                    get(&sql.rows),
                ),
                (
                    "nitro_sql_quarantined",
                    "Records that the database refused: look at its table `quarantine`.",
                    get(&sql.quarantined),
                ),
                (
                    "nitro_sql_transactions",
                    "Transactions committed.",
                    get(&sql.transactions),
                ),
                (
                    "nitro_sql_retries",
                    "Attempts repeated because the database was locked or gone.",
                    get(&sql.retries),
                ),
                (
                    "nitro_sql_failures",
                    "Requests answered by a failure.",
                    get(&sql.failures),
                ),
                (
                    "nitro_sql_refused",
                    "Batches refused because the lane's queue was full.",
                    get(&sql.refused),
                ),
            ],
            &redis.unwrap_or_default(),
        )
    }
}

/// The whole answer, once the request's head is complete.
fn answer(head: &[u8], most: usize, metrics: impl FnOnce() -> String) -> Option<String> {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(head) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) if head.len() < most => return None,
        Ok(httparse::Status::Partial) => {
            return Some(response(
                431,
                "Request Header Fields Too Large",
                "the request's head is too large\n",
            ));
        }
        Err(_) => return Some(response(400, "Bad Request", "this is not HTTP/1.1\n")),
    }
    Some(match (request.method, request.path) {
        (Some("GET" | "HEAD"), Some("/healthz")) => response(200, "OK", "ok\n"),
        (Some("GET" | "HEAD"), Some("/metrics")) => response(200, "OK", &metrics()),
        (Some("GET" | "HEAD"), _) => response(
            404,
            "Not Found",
            "there is nothing here; try /healthz or /metrics\n",
        ),
        _ => response(405, "Method Not Allowed", "only GET and HEAD\n"),
    })
}

fn response(status: u16, reason: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {status} {reason}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\n\
         Cache-Control: no-store\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_answered_when_its_head_is_complete() {
        let whole = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n";
        for cut in 0..whole.len() {
            assert_eq!(answer(&whole[..cut], 8192, String::new), None);
        }
        assert!(
            answer(whole, 8192, String::new)
                .unwrap()
                .starts_with("HTTP/1.1 200 OK\r\n")
        );
    }

    #[test]
    fn what_is_no_request_or_too_large_is_refused() {
        assert!(
            answer(b"\x16\x03\x01 hello\r\n\r\n", 8192, String::new)
                .unwrap()
                .starts_with("HTTP/1.1 400 ")
        );
        assert!(
            answer(&[b'G'; 100], 64, String::new)
                .unwrap()
                .starts_with("HTTP/1.1 431 ")
        );
        assert!(
            answer(b"POST / HTTP/1.1\r\n\r\n", 8192, String::new)
                .unwrap()
                .starts_with("HTTP/1.1 405 ")
        );
        assert!(
            answer(b"GET /x HTTP/1.1\r\n\r\n", 8192, String::new)
                .unwrap()
                .starts_with("HTTP/1.1 404 ")
        );
    }
}
