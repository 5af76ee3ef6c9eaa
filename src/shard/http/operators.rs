//! What operators ask: `/healthz` (200 while the shard turns), `/readyz` (200 while clients can log in, 503 while the server starts
//! or stops) and `/metrics`, which the collecting thread writes: the shard waits for the page like for any other answer.

use std::time::Duration;

use super::After;
use super::exchange::{Answer, Exchange, Gone};
use crate::observe::Format;
use crate::rt::{self, slot};
use crate::shard::{Inbound, Shard};

pub async fn healthy(exchange: &mut Exchange<'_>) -> Result<After, Gone> {
    exchange.answer(Answer::text(200, "ok")).await
}

pub async fn ready(exchange: &mut Exchange<'_>) -> Result<After, Gone> {
    let shard = exchange.shard;
    let answer = match (shard.stopping.get(), shard.gauges.all_ready()) {
        (true, _) => Answer::text(503, "the server stops"),
        (_, false) => Answer::text(503, "the server starts"),
        _ => Answer::text(200, "ready"),
    };
    exchange.answer(answer).await
}

pub async fn metrics(exchange: &mut Exchange<'_>) -> Result<After, Gone> {
    let accept: Vec<&str> = exchange.head.all("accept").collect();
    let format = Format::accepted(&accept.join(","));
    let within = Duration::from_secs(exchange.config.limits.http_seconds_max);
    let answer = match rt::timeout(within, exchange.shard.metrics(format)).await {
        Ok(Some(page)) => Answer::new(200, format.content_type(), page),
        _ => Answer::text(503, "too many ask for metrics at once"),
    };
    exchange.answer(answer).await
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
    pub(in crate::shard) fn page(&self, ticket: u64, page: String) {
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
