//! The HTTP door: `/healthz` (200 while the shard turns), `/readyz` (200 while clients can log in, 503 while the server starts
//! or stops) and `/metrics`, which the collecting thread writes: the shard waits for the page like for any other answer.

use std::rc::Rc;
use std::time::Duration;

use super::{Inbound, Shard};
use crate::net::{Read, Socket, Transport};
use crate::observe::Format;
use crate::rt::{self, slot};

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
    let request = shard
        .with_readiness(
            &mut transport,
            deadline_ms,
            async |shard, transport, notify| {
                let mut head = Vec::new();
                loop {
                    if let Some(request) = parse(&head, most) {
                        return request;
                    }
                    let data = {
                        let mut scratch = shard.scratch.borrow_mut();
                        match transport.read(&mut scratch) {
                            Ok(Read::Data { bytes, .. }) => {
                                head.extend_from_slice(bytes);
                                true
                            }
                            Ok(Read::WouldBlock) => false,
                            _ => return Wanted::Nothing,
                        }
                    };
                    if !data {
                        notify.ready.wait().await;
                    }
                }
            },
        )
        .await
        .unwrap_or(Wanted::Refused(408, "Request Timeout", "too slow\n"));
    let left_ms = deadline_ms.saturating_sub(shard.slice.borrow().now.ms);
    let answer = match request {
        Wanted::Nothing => String::new(),
        Wanted::Refused(status, reason, text) => plain(status, reason, text),
        Wanted::Healthy => plain(200, "OK", "ok\n"),
        Wanted::Ready => match (shard.stopping.get(), shard.gauges.all_ready()) {
            (true, _) => plain(503, "Service Unavailable", "the server stops\n"),
            (_, false) => plain(503, "Service Unavailable", "the server starts\n"),
            _ => plain(200, "OK", "ready\n"),
        },
        Wanted::Metrics(format) => {
            let page = shard.metrics(format);
            match rt::timeout(Duration::from_millis(left_ms), page).await {
                Ok(Some(page)) => response(200, "OK", format.content_type(), &page),
                _ => plain(
                    503,
                    "Service Unavailable",
                    "too many ask for metrics at once\n",
                ),
            }
        }
    };
    let _ = transport.write(answer.as_bytes(), &mut shard.scratch.borrow_mut());
    shard.close_transport(transport);
    shard.http_open.set(shard.http_open.get() - 1);
}

impl Shard {
    /// The page, written elsewhere; `None`: it cannot be had now.
    async fn metrics(&self, format: Format) -> Option<String> {
        let ticket = self.page_tickets.get();
        self.page_tickets.set(ticket + 1);
        let (setter, page) = slot();
        let inbox = self.own_inbox.clone();
        let asked = self.pages.page(format, move |page| {
            // full: the reader waits until its deadline
            let _ = inbox.try_send(Inbound::Page(ticket, page));
        });
        if !asked {
            return None;
        }
        self.pages_waiting.borrow_mut().insert(ticket, setter);
        let _forgotten = Forgotten {
            shard: self,
            ticket,
        };
        page.take().await
    }

    /// A page has come.
    pub(super) fn page(&self, ticket: u64, page: String) {
        let waiting = self.pages_waiting.borrow_mut().remove(&ticket);
        if let Some(setter) = waiting {
            setter.set(page);
        }
    }
}

/// Who has stopped waiting does not leave his ticket behind.
struct Forgotten<'a> {
    shard: &'a Shard,
    ticket: u64,
}

impl Drop for Forgotten<'_> {
    fn drop(&mut self) {
        self.shard.pages_waiting.borrow_mut().remove(&self.ticket);
    }
}

#[derive(Debug, PartialEq)]
enum Wanted {
    Healthy,
    Ready,
    Metrics(Format),
    /// Status, reason, text.
    Refused(u16, &'static str, &'static str),
    /// The connection broke.
    Nothing,
}

/// What is wanted, once the request's head is complete.
fn parse(head: &[u8], most: usize) -> Option<Wanted> {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(head) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) if head.len() < most => return None,
        Ok(httparse::Status::Partial) => {
            return Some(Wanted::Refused(
                431,
                "Request Header Fields Too Large",
                "the request's head is too large\n",
            ));
        }
        Err(_) => {
            return Some(Wanted::Refused(
                400,
                "Bad Request",
                "this is not HTTP/1.1\n",
            ));
        }
    }
    let path = request.path.and_then(|path| path.split('?').next());
    Some(match (request.method, path) {
        (Some("GET" | "HEAD"), Some("/healthz")) => Wanted::Healthy,
        (Some("GET" | "HEAD"), Some("/readyz")) => Wanted::Ready,
        (Some("GET" | "HEAD"), Some("/metrics")) => {
            let accept = request
                .headers
                .iter()
                .filter(|header| header.name.eq_ignore_ascii_case("accept"))
                .filter_map(|header| std::str::from_utf8(header.value).ok());
            let accept: Vec<&str> = accept.collect();
            Wanted::Metrics(Format::accepted(&accept.join(",")))
        }
        (Some("GET" | "HEAD"), _) => Wanted::Refused(
            404,
            "Not Found",
            "there is nothing here; try /healthz, /readyz or /metrics\n",
        ),
        _ => Wanted::Refused(405, "Method Not Allowed", "only GET and HEAD\n"),
    })
}

fn plain(status: u16, reason: &str, body: &str) -> String {
    response(status, reason, "text/plain; charset=utf-8", body)
}

fn response(status: u16, reason: &str, content_type: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {status} {reason}\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n\
         Cache-Control: no-store\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_understood_when_its_head_is_complete() {
        let whole = b"GET /readyz?from=balancer HTTP/1.1\r\nHost: x\r\n\r\n";
        for cut in 0..whole.len() {
            assert_eq!(parse(&whole[..cut], 8192), None);
        }
        assert_eq!(parse(whole, 8192), Some(Wanted::Ready));
        let healthy = parse(b"HEAD /healthz HTTP/1.1\r\n\r\n", 8192);
        assert_eq!(healthy, Some(Wanted::Healthy));
    }

    #[test]
    fn a_reader_gets_the_format_that_it_asks_for() {
        let format = |accept: &str| {
            let head = format!("GET /metrics HTTP/1.1\r\naccept: {accept}\r\n\r\n");
            parse(head.as_bytes(), 8192)
        };
        assert_eq!(
            format("text/plain;version=0.0.4"),
            Some(Wanted::Metrics(Format::Prometheus))
        );
        assert_eq!(
            format("application/openmetrics-text,text/plain"),
            Some(Wanted::Metrics(Format::OpenMetrics))
        );
    }

    #[test]
    fn what_is_no_request_or_too_large_is_refused() {
        let status = |head: &[u8], most| match parse(head, most) {
            Some(Wanted::Refused(status, ..)) => status,
            other => panic!("{other:?}"),
        };
        assert_eq!(status(b"\x16\x03\x01 hello\r\n\r\n", 8192), 400);
        assert_eq!(status(&[b'G'; 100], 64), 431);
        assert_eq!(status(b"POST / HTTP/1.1\r\n\r\n", 8192), 405);
        assert_eq!(status(b"GET /x HTTP/1.1\r\n\r\n", 8192), 404);
    }
}
