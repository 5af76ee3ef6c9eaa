//! The opening handshake of WebSocket (RFC 6455 section 4.2) with the subprotocol `xmpp` (RFC 7395 section 3.1). In: a request. Out: the
//! connection, which from then on carries a stream and logs in as one that came by TCP. Who may not come hears it as HTTP, before
//! anything is switched.
//!
//! No extension is agreed on, so no permessage-deflate: compressing what others wrote beside one's own secrets tells their
//! contents by their length (CRIME, BREACH), and each connection would own a window of 32 KiB or more each way.

use aws_lc_rs::digest;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use crate::net::WebSocketLimits;
use crate::shard::http::After;
use crate::shard::http::exchange::{Answer, Exchange, Gone};

/// RFC 6455 section 1.3.
const GUID: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
/// Bytes of the nonce in `Sec-WebSocket-Key`.
const NONCE_BYTES: usize = 16;

pub async fn open(exchange: &mut Exchange<'_>) -> Result<After, Gone> {
    let head = &exchange.head;
    let wants = head.is_1_1
        && head.has_token("upgrade", "websocket")
        && head.has_token("connection", "upgrade");
    if !wants || head.get("sec-websocket-version") != Some("13") {
        let answer = Answer::text(426, "this is for WebSocket (RFC 6455), version 13")
            .with("Upgrade", "websocket")
            .with("Sec-WebSocket-Version", "13");
        return exchange.answer(answer).await;
    }
    let key = head.get("sec-websocket-key").unwrap_or_default();
    if BASE64_STANDARD.decode(key).map(|nonce| nonce.len()) != Ok(NONCE_BYTES) {
        let answer = Answer::text(400, "Sec-WebSocket-Key is no nonce of 16 bytes");
        return exchange.answer(answer).await;
    }
    if head.body_bytes > 0 {
        let answer = Answer::text(400, "a handshake has no body");
        return exchange.answer(answer).await;
    }
    if !head.has_token("sec-websocket-protocol", "xmpp") {
        let answer = Answer::text(400, "name the subprotocol xmpp (RFC 7395)");
        return exchange.answer(answer).await;
    }
    let accept = accept(key);
    let (client, encrypted) = exchange.client();
    let shard = exchange.shard;
    // even if it does not name its client: that one is not on this machine
    let proxied = exchange.config.is_web_proxy(exchange.conn.peer.ip());
    let config = exchange.config.clone();
    let full = shard.has_too_many_logins() || shard.stopping.get();
    let entered = match &mut exchange.conn.pass {
        _ if full => false,
        // ordinary requests may have come before on this connection
        Some(pass) => pass.begins_login(&config).is_ok(),
        none => match shard.doors.enter(client.ip(), true, &config) {
            Ok(pass) => none.replace(pass).is_none(),
            Err(_) => false,
        },
    };
    if !entered {
        shard.gauges.turned_away.one();
        let answer = Answer::text(503, "too many connections").with("Retry-After", "10");
        return exchange.answer(answer).await;
    }
    let answer = format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Accept: {accept}\r\nSec-WebSocket-Protocol: xmpp\r\n\r\n"
    );
    exchange.switch(answer.as_bytes()).await?;
    let limits = &exchange.config.limits;
    let limits = WebSocketLimits {
        message_bytes_max: limits.stanza_bytes_max,
        fragments_max: limits.websocket_fragments_max,
    };
    let conn = &mut *exchange.conn;
    let early = std::mem::take(&mut conn.unread);
    conn.transport.start_websocket(limits, early);
    shard.gauges.websockets.one();
    Ok(After::Stream {
        client,
        proxied,
        encrypted,
    })
}

fn accept(key: &str) -> String {
    let proof = format!("{key}{GUID}");
    let hash = digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, proof.as_bytes());
    BASE64_STANDARD.encode(hash)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_key_is_answered_as_in_the_example_of_rfc_6455() {
        assert_eq!(
            super::accept("dGhlIHNhbXBsZSBub25jZQ=="),
            "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        );
    }
}
