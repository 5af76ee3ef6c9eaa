//! A file by HTTP: the body that is put, piece by piece onto the disk, and the file that is got, piece by piece to the client.

use std::io;
use std::sync::Arc;

use super::answer::{self, Asked, HEADERS, Offered, Refusal};
use super::{PIECE_BYTES, Place};
use crate::shard::http::After;
use crate::shard::http::exchange::{Answer, Exchange, Gone};
use crate::store::upload::{self, Entry, NotTaken, Owner, Refused, Writing};
use crate::xmpp::feature::upload::parse_path;

const NOTHING: Refusal = (404, "there is no such file");
const BUSY: Refusal = (503, "too many files come and go at once");
const FULL: Refusal = (507, "there is no room for the file");
const EXPIRED: Refusal = (410, "the slot has expired");
const BROKEN: Refusal = (500, "the file cannot be written or read");

/// Anything behind [`crate::xmpp::feature::upload::PATH`].
pub async fn serve(exchange: &mut Exchange<'_>) -> Result<After, Gone> {
    let path = exchange.head.path.clone();
    let on = exchange.shard.slice.borrow().env.upload.is_some();
    let file = parse_path(&path).filter(|_| on);
    let done = match (file, &*exchange.head.method) {
        (None, _) => Err(NOTHING),
        (Some(file), "PUT") => put(exchange, file).await?,
        (Some(file), _) => get(exchange, file).await?,
    };
    match done {
        Ok(()) => Ok(After::Next),
        Err((status, text)) => {
            exchange
                .answer(with_headers(Answer::text(status, text)))
                .await
        }
    }
}

fn with_headers(answer: Answer) -> Answer {
    let headers = HEADERS.iter();
    headers.fold(answer, |answer, (name, value)| answer.with(name, *value))
}

/// One of the transfers that may be at once.
fn place(exchange: &Exchange<'_>) -> Result<Place, Refusal> {
    let files = exchange.shard.files.as_ref().ok_or(NOTHING)?;
    files
        .place(&exchange.config, exchange.client().0.ip())
        .ok_or_else(|| {
            exchange.shard.gauges.upload_refused.one();
            BUSY
        })
}

async fn put(
    exchange: &mut Exchange<'_>,
    (owner, entry, filename): (Owner, Entry, &str),
) -> Result<Result<(), Refusal>, Gone> {
    let shard = exchange.shard.clone();
    let now = crate::shard::unix();
    let right = {
        let slice = shard.slice.borrow();
        let key = slice.env.upload_key.as_ref();
        key.is_some_and(|key| key.is_token(exchange.head.query.as_bytes(), owner, &entry, filename))
    };
    if !right {
        shard.gauges.upload_refused.one();
        return Ok(Err((403, "the token is not for this")));
    }
    let offered = Offered {
        length: exchange
            .head
            .get("content-length")
            .map(|_| exchange.head.body_bytes),
        content_type: exchange.head.get("content-type"),
    };
    let slot_seconds = exchange.config.upload.slot_seconds;
    if let Err(refusal) = answer::put(&entry, &offered, slot_seconds, now) {
        shard.gauges.upload_refused.one();
        return Ok(Err(refusal));
    }
    let _place = match place(exchange) {
        Ok(place) => place,
        Err(refusal) => return Ok(Err(refusal)),
    };
    let begun = shard
        .with_folder(move |folder| folder.begin(owner, entry, now))
        .await;
    let writing = match begun {
        Some(Ok(writing)) => writing,
        refused => {
            shard.gauges.upload_refused.one();
            return Ok(Err(match refused {
                Some(Err(NotTaken::Replayed)) => (409, "the slot was used"),
                Some(Err(NotTaken::Gone)) => EXPIRED,
                Some(Err(NotTaken::Refused(Refused::Broken))) => BROKEN,
                Some(Err(NotTaken::Refused(_))) => FULL,
                _ => BUSY,
            }));
        }
    };
    let mut writing = Body {
        shard: shard.clone(),
        writing: Some(writing),
    };
    let mut piece = Vec::new();
    loop {
        let more = exchange.read_body(&mut piece).await?;
        if piece.len() >= PIECE_BYTES || (!more && !piece.is_empty()) {
            let Some(mut file) = writing.writing.take() else {
                return Ok(Err(BROKEN));
            };
            let bytes = std::mem::take(&mut piece);
            let written = shard.with_folder(move |_| {
                let written = file.write(&bytes);
                (file, bytes, written)
            });
            match written.await {
                Some((file, mut bytes, Ok(()))) => {
                    writing.writing = Some(file);
                    bytes.clear();
                    piece = bytes;
                }
                Some((file, _, Err(error))) => {
                    writing.writing = Some(file);
                    tracing::error!(%error, "upload.dir: a file cannot be written");
                    return Ok(Err(match error.kind() {
                        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => FULL,
                        _ => BROKEN,
                    }));
                }
                None => return Ok(Err(BUSY)),
            }
        }
        if !more {
            break;
        }
    }
    let Some(file) = writing.writing.take() else {
        return Ok(Err(BROKEN));
    };
    match shard.with_folder(move |folder| folder.finish(file)).await {
        Some(Ok(())) => {}
        // the account was removed meanwhile
        Some(Err(error)) if error.kind() == io::ErrorKind::NotFound => return Ok(Err(EXPIRED)),
        Some(Err(error)) => {
            tracing::error!(%error, "upload.dir: a file cannot be kept");
            return Ok(Err(BROKEN));
        }
        None => return Ok(Err(BUSY)),
    }
    shard.gauges.upload_files.one();
    shard.gauges.upload_bytes_in.add(entry.bytes);
    exchange.answer(with_headers(Answer::empty(201))).await?;
    Ok(Ok(()))
}

/// A body on its way: what is not whole is removed, on a thread of the folder's.
struct Body {
    shard: std::rc::Rc<crate::shard::Shard>,
    writing: Option<Writing>,
}

impl Drop for Body {
    fn drop(&mut self) {
        if let (Some(writing), Some(files)) = (self.writing.take(), &self.shard.files) {
            files.discard(self.shard.own_inbox.clone(), writing);
        }
    }
}

async fn get(
    exchange: &mut Exchange<'_>,
    (owner, entry, filename): (Owner, Entry, &str),
) -> Result<Result<(), Refusal>, Gone> {
    let shard = exchange.shard.clone();
    let now = crate::shard::unix();
    let _place = match place(exchange) {
        Ok(place) => place,
        Err(refusal) => return Ok(Err(refusal)),
    };
    let file = match shard
        .with_folder(move |folder| folder.read(owner, &entry, now))
        .await
    {
        Some(Ok(Some(file))) => Arc::new(file),
        Some(Ok(None)) => return Ok(Err(NOTHING)),
        Some(Err(error)) => {
            tracing::error!(%error, "upload.dir: a file cannot be read");
            return Ok(Err(BROKEN));
        }
        None => return Ok(Err(BUSY)),
    };
    let keep = exchange.config.upload.keep_days * 86_400;
    let left = match keep {
        0 => 0,
        keep => (entry.at + keep).saturating_sub(now).max(1),
    };
    let asked = Asked {
        range: exchange.head.get("range"),
        if_range: exchange.head.get("if-range"),
        if_none_match: exchange.head.get("if-none-match"),
    };
    let found = answer::get(&entry, filename, &asked, left);
    let mut answer = with_headers(Answer::empty(found.status));
    answer.headers.extend(found.headers);
    let body = found.body;
    exchange.begin(answer, body.end - body.start).await?;
    if &*exchange.head.method == "HEAD" {
        return Ok(Ok(()));
    }
    let mut at = body.start;
    while at < body.end {
        let bytes =
            usize::try_from(body.end - at).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES));
        let reading = file.clone();
        let piece = shard
            .with_folder(move |_| upload::piece(&reading, at, bytes))
            .await;
        let piece = match piece {
            Some(Ok(piece)) if !piece.is_empty() => piece,
            // the head is out: all that can be said is that the rest does not come
            _ => return Err(Gone),
        };
        at += piece.len() as u64;
        shard.gauges.upload_bytes_out.add(piece.len() as u64);
        exchange.send(&piece).await?;
    }
    Ok(Ok(()))
}
