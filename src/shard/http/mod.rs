//! The HTTP door: for operators (`http.listen`: health, metrics) and for clients (`web.listen`, `web.listen_tls`), apart. In:
//! accepted connections. Out: requests to whoever the table of routes names, one after the other, and their answers in that order.
//! Promise: an idle connection is one small task; every request has a bound for its head, its body and its time.
//!
//! | file | one reason to change |
//! |---|---|
//! | `request` | a request's head, and everything that smuggles another one in |
//! | `exchange` | one connection; one request: its body in pieces, its answer in pieces |
//! | `origin` | which web pages may come, CORS |
//! | `operators` | `/healthz`, `/readyz`, `/metrics` |
//!
//! A route: a row in [`CLIENTS`] (path, methods, who may come across origins), a variant of [`Resource`], and an arm in
//! [`handle`] that calls `async fn name(exchange: &mut Exchange<'_>) -> Result<After, Gone>`. HEAD, OPTIONS with CORS, 404 and 405,
//! `Expect: 100-continue`, keep-alive and deadlines are done here.

pub mod exchange;
mod operators;
mod origin;
mod request;

use std::net::SocketAddr;
use std::rc::Rc;

use super::doors::Pass;
use super::login::{Guest, WebStream};
use super::{Shard, login, web};
use crate::net::{Socket, Transport};
use crate::rt::{self, Queue};
use crate::shard::moves::Parcel;
use crate::xml::Framer;
use exchange::{Answer, Conn, Exchange, Gone};
use request::Head;

/// Who is served at a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Operators,
    Clients,
}

/// What becomes of the connection when a handler is done.
pub enum After {
    /// The request was answered; the next one, if any.
    Next,
    /// The request belongs to another shard; the connection goes with it and stays there.
    Move { shard: usize, body: Vec<u8> },
    /// It carries an XMPP stream from now on.
    Stream {
        /// As a believed proxy names it.
        client: SocketAddr,
        proxied: bool,
        /// On its whole way, as far as is known.
        encrypted: bool,
    },
}

/// What a path leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Resource {
    Healthy,
    Ready,
    Metrics,
    WebSocket,
    Bosh,
    HostMeta,
    HostMetaJson,
    Upload,
}

/// Which web pages may use a resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cors {
    /// Nobody asks for it from a page.
    No,
    /// Those that `web.origins` allows; others are refused.
    Origins,
    /// All.
    Anyone,
}

struct Route {
    /// The path, or where it ends in `/` all paths that begin so.
    path: &'static str,
    /// Beside OPTIONS, and HEAD where GET is.
    methods: &'static [&'static str],
    cors: Cors,
    resource: Resource,
}

const GET: &[&str] = &["GET"];

const OPERATORS: &[Route] = &[
    Route {
        path: "/healthz",
        methods: GET,
        cors: Cors::No,
        resource: Resource::Healthy,
    },
    Route {
        path: "/readyz",
        methods: GET,
        cors: Cors::No,
        resource: Resource::Ready,
    },
    Route {
        path: "/metrics",
        methods: GET,
        cors: Cors::No,
        resource: Resource::Metrics,
    },
];

const CLIENTS: &[Route] = &[
    Route {
        path: "/ws",
        methods: GET,
        cors: Cors::Origins,
        resource: Resource::WebSocket,
    },
    Route {
        path: "/bosh",
        methods: &["POST"],
        cors: Cors::Origins,
        resource: Resource::Bosh,
    },
    Route {
        path: "/.well-known/host-meta",
        methods: GET,
        cors: Cors::Anyone,
        resource: Resource::HostMeta,
    },
    Route {
        path: "/.well-known/host-meta.json",
        methods: GET,
        cors: Cors::Anyone,
        resource: Resource::HostMetaJson,
    },
    Route {
        path: crate::xmpp::feature::upload::PATH,
        methods: &["GET", "PUT"],
        // who knows an address may have what is there, and there are no cookies
        cors: Cors::Anyone,
        resource: Resource::Upload,
    },
];

/// What a client hears in the clear who is turned away before anything was read.
pub const BUSY: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 10\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";

async fn handle(resource: Resource, exchange: &mut Exchange<'_>) -> Result<After, Gone> {
    match resource {
        Resource::Healthy => operators::healthy(exchange).await,
        Resource::Ready => operators::ready(exchange).await,
        Resource::Metrics => operators::metrics(exchange).await,
        Resource::WebSocket => web::websocket::open(exchange).await,
        Resource::Bosh => web::bosh::post(exchange).await,
        Resource::HostMeta => web::host_meta::xml(exchange).await,
        Resource::HostMetaJson => web::host_meta::json(exchange).await,
        Resource::Upload => super::upload::serve(exchange).await,
    }
}

/// A connection at the operators' port.
pub async fn serve_operators(shard: Rc<Shard>, socket: Socket, peer: SocketAddr) {
    let most = shard.config.borrow().limits.http_connections_max;
    let Some(_place) = Place::take(&shard, most, Side::Operators) else {
        return;
    };
    if let Some(conn) = Conn::new(&shard, Transport::plain(socket), peer, Side::Operators) {
        // nobody switches to a stream there
        let _ = serve(&shard, conn, None).await;
    }
}

/// A connection at a clients' port, past the first gate.
pub async fn serve_client(
    shard: Rc<Shard>,
    socket: Socket,
    peer: SocketAddr,
    pass: Option<Pass>,
    tls: bool,
    accepted_us: u64,
    guest: Guest,
) {
    let side = Side::Clients;
    let most = shard.config.borrow().web.connections_max;
    let mut transport = Transport::plain(socket);
    let Some(place) = Place::take(&shard, most, side) else {
        shard.gauges.turned_away.one();
        if !tls {
            shard.close_transport(transport, BUSY);
        }
        return;
    };
    if tls && let Err(error) = transport.start_https(&shard.tls.borrow()) {
        tracing::error!(%error, "TLS cannot be started");
        return;
    }
    let Some(mut conn) = Conn::new(&shard, transport, peer, side) else {
        return;
    };
    conn.accepted_us = accepted_us;
    conn.pass = pass;
    conn.guest = Some(guest);
    let stream = serve(&shard, conn, None).await;
    drop(place);
    if let Some(stream) = stream {
        login::begin_stream(shard, stream).await;
    }
}

/// A request on its way to the shard that keeps its session, with its connection.
pub struct MovedRequest {
    transport: Transport,
    unread: Vec<u8>,
    peer: SocketAddr,
    pass: Option<Pass>,
    head: Head,
    cors: Option<String>,
    pub body: Vec<u8>,
}

/// A request has come from another shard.
pub fn arrived(shard: Rc<Shard>, moved: MovedRequest) {
    let side = Side::Clients;
    let most = shard.config.borrow().web.connections_max;
    let Some(place) = Place::take(&shard, most, side) else {
        shard.gauges.turned_away.one();
        return shard.close_transport(moved.transport, BUSY);
    };
    let Some(mut conn) = Conn::new(&shard, moved.transport, moved.peer, side) else {
        return;
    };
    conn.unread = moved.unread;
    conn.pass = moved.pass;
    rt::spawn(Queue::Login, async move {
        let request = Some((moved.head, moved.cors, moved.body));
        let stream = serve(&shard, conn, request).await;
        drop(place);
        if let Some(stream) = stream {
            login::begin_stream(shard, stream).await;
        }
    });
}

/// One request after the other; the stream that the last one has begun, if any.
async fn serve(
    shard: &Rc<Shard>,
    mut conn: Conn,
    mut moved: Option<(Head, Option<String>, Vec<u8>)>,
) -> Option<WebStream> {
    let mut first = true;
    let mut served = 0_u32;
    loop {
        // who sends requests faster than they are answered never lets this task wait
        served = served.wrapping_add(1);
        match served.is_multiple_of(16) {
            true => rt::yield_now().await,
            false => rt::yield_if_needed().await,
        }
        if let Some((head, cors, body)) = moved.take() {
            let mut exchange = Exchange::moved(shard, &mut conn, head);
            exchange.cors = cors;
            let answered = web::bosh::handle(&mut exchange, body).await;
            if answered.is_err() || !exchange.end().await {
                break;
            }
            first = false;
            continue;
        }
        let head = match conn.head(shard, first).await {
            Ok(Some(head)) => head,
            Ok(None) => break,
            Err(refusal) => {
                conn.refuse(shard, refusal).await;
                break;
            }
        };
        first = false;
        shard.gauges.http_requests.one();
        let mut exchange = Exchange::new(shard, &mut conn, head);
        let Ok(after) = route(&mut exchange).await else {
            break;
        };
        let (head, cors) = (exchange.head.clone(), exchange.cors.clone());
        match after {
            After::Next => {
                if !exchange.end().await {
                    break;
                }
            }
            After::Move { shard: other, body } => {
                conn.leave(shard);
                let request = Box::new(MovedRequest {
                    transport: conn.transport,
                    unread: conn.unread,
                    peer: conn.peer,
                    pass: conn.pass,
                    head,
                    cors,
                    body,
                });
                let mut ways = shard.ways.borrow_mut();
                ways.send(other, Parcel::Request(request), shard.now_us());
                return None;
            }
            After::Stream {
                client,
                proxied,
                encrypted,
            } => {
                conn.leave(shard);
                let Conn {
                    transport,
                    pass,
                    guest,
                    accepted_us,
                    ..
                } = conn;
                return Some(WebStream {
                    transport,
                    client,
                    proxied,
                    encrypted,
                    pass: pass?,
                    guest,
                    accepted_us,
                    framer: Framer::of_messages(),
                });
            }
        }
    }
    conn.close(shard);
    None
}

/// Finds the handler; answers what needs none.
async fn route(exchange: &mut Exchange<'_>) -> Result<After, Gone> {
    let (routes, hint) = match exchange.conn.side {
        Side::Operators => (
            OPERATORS,
            "there is nothing here; try /healthz, /readyz or /metrics",
        ),
        Side::Clients => (CLIENTS, "there is nothing here"),
    };
    let path = exchange.head.path.clone();
    let found = routes.iter().find(|route| match route.path.ends_with('/') {
        true => path.starts_with(route.path),
        false => *path == *route.path,
    });
    if found.is_none_or(|route| route.resource != Resource::WebSocket) {
        // it is no login
        exchange.conn.guest = None;
        if let Some(pass) = &mut exchange.conn.pass {
            pass.authenticated();
        }
    }
    let Some(route) = found else {
        let answer = match &*path {
            "*" => Answer::empty(204),
            _ => Answer::text(404, hint),
        };
        return exchange.answer(answer).await;
    };
    let mut methods = route.methods.to_vec();
    if methods.contains(&"GET") {
        methods.push("HEAD");
    }
    methods.push("OPTIONS");
    let allow = methods.join(", ");
    match origin::judge(&exchange.config, &exchange.head, route.cors, &allow) {
        Ok(cors) => exchange.cors = cors,
        Err(()) => {
            exchange.shard.gauges.http_origins_refused.one();
            let text = "this page may not come here: see web.origins of the server";
            return exchange.answer(Answer::text(403, text)).await;
        }
    }
    match &*exchange.head.method {
        "OPTIONS" => {
            exchange
                .answer(Answer::empty(204).with("Allow", allow))
                .await
        }
        method if methods.contains(&method) => handle(route.resource, exchange).await,
        _ => {
            let answer = Answer::text(405, &format!("only {allow}")).with("Allow", allow);
            exchange.answer(answer).await
        }
    }
}

/// A connection's place among those of its side, given back when dropped.
struct Place {
    shard: Rc<Shard>,
    side: Side,
}

impl Place {
    fn take(shard: &Rc<Shard>, most: usize, side: Side) -> Option<Place> {
        let open = shard.http_places(side);
        if open.get() >= most {
            return None;
        }
        open.set(open.get() + 1);
        Some(Place {
            shard: shard.clone(),
            side,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let open = self.shard.http_places(self.side);
        open.set(open.get() - 1);
    }
}

impl Shard {
    fn http_places(&self, side: Side) -> &std::cell::Cell<usize> {
        match side {
            Side::Operators => &self.http_open,
            Side::Clients => &self.web_open,
        }
    }
}
