//! One pipelined connection to a Redis server, without its socket.
//!
//! In: commands with a tag each, and the bytes that came from the server. Out: the bytes to write, and each reply with
//! the tag of its command. Promises: replies are matched first in, first out, as the protocol has it (RESP2, no
//! pushes); commands and bytes in flight are bounded; whatever is not a reply, or one that nobody asked for, is a
//! [`Broken`], after which nothing that comes may be believed and the connection must be closed.
//!
//! The `redis` crate encodes commands and parses replies; it parses from whole replies only, so they are cut out here.

use std::collections::VecDeque;

use redis::{Cmd, Value};
use smallvec::SmallVec;

/// Bounds of one connection.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Commands without reply.
    pub commands_max: usize,
    /// Bytes of commands that wait to be written.
    pub out_bytes_max: usize,
    /// Bytes of one reply.
    pub reply_bytes_max: usize,
    /// How long a command may wait for its reply while nothing at all is answered, microseconds. A server that goes on
    /// answering is slow and not dead: it has [`PATIENCE`] times as long.
    pub timeout_us: u64,
}

/// How many time-outs the oldest command may wait while those before it are being answered.
pub const PATIENCE: u64 = 8;

/// The server does not speak the protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    #[error("it answered something that is not Redis' protocol")]
    Garbage,
    #[error("it answered more than was asked")]
    Unasked,
    #[error("a reply is larger than {0} bytes")]
    TooLarge(usize),
}

/// A reply and what it answers.
#[derive(Debug)]
pub struct Reply<T> {
    pub tag: T,
    pub value: Value,
    /// From sending the command.
    pub round_trip_us: u64,
}

/// See the module's page.
pub struct Connection<T> {
    limits: Limits,
    out: Vec<u8>,
    written: usize,
    input: Vec<u8>,
    parsed: usize,
    framer: Framer,
    in_flight: VecDeque<InFlight<T>>,
    /// When the last reply came.
    heard_us: u64,
}

/// What a buffer keeps when it is empty.
const IDLE_BYTES_MAX: usize = 256 << 10;

struct InFlight<T> {
    tag: T,
    sent_us: u64,
}

impl<T> Connection<T> {
    pub fn new(limits: Limits) -> Connection<T> {
        Connection {
            limits,
            out: Vec::new(),
            written: 0,
            input: Vec::new(),
            parsed: 0,
            framer: Framer::default(),
            in_flight: VecDeque::new(),
            heard_us: 0,
        }
    }

    /// May another command be sent? The bytes are looked at before a command, so they may exceed the bound by one.
    pub fn has_room(&self) -> bool {
        self.in_flight.len() < self.limits.commands_max
            && self.out.len() - self.written < self.limits.out_bytes_max
    }

    /// The same for a command for which nobody waits: a quarter of the room is kept for what log-ins read.
    pub fn has_room_to_spare(&self) -> bool {
        self.in_flight.len() < self.limits.commands_max - self.limits.commands_max / 4
            && self.out.len() - self.written < self.limits.out_bytes_max
    }

    /// Adds a command behind the others. The caller looks at [`Connection::has_room`] first where the command is new.
    pub fn send(&mut self, command: &Cmd, tag: T, now_us: u64) {
        command.write_packed_command(&mut self.out);
        self.in_flight.push_back(InFlight {
            tag,
            sent_us: now_us,
        });
    }

    /// What is to be written next.
    pub fn outgoing(&self) -> &[u8] {
        &self.out[self.written..]
    }

    /// The first `bytes` of [`Connection::outgoing`] were written.
    pub fn written(&mut self, bytes: usize) {
        self.written += bytes;
        assert!(
            self.written <= self.out.len(),
            "more was written than there was"
        );
        if self.written == self.out.len() || self.written >= IDLE_BYTES_MAX {
            self.out.drain(..self.written);
            self.written = 0;
        }
        if self.out.is_empty() {
            self.out.shrink_to(IDLE_BYTES_MAX);
        }
    }

    /// Takes bytes from the server; then take the replies with [`Connection::next`].
    pub fn feed(&mut self, bytes: &[u8]) {
        self.input.extend_from_slice(bytes);
    }

    /// The next whole reply of what was fed.
    pub fn next(&mut self, now_us: u64) -> Result<Option<Reply<T>>, Broken> {
        let rest = &self.input[self.parsed..];
        let Some(end) = self.framer.frame(rest, self.limits.reply_bytes_max)? else {
            self.input.drain(..self.parsed);
            self.parsed = 0;
            if self.input.is_empty() {
                self.input.shrink_to(IDLE_BYTES_MAX);
            }
            return Ok(None);
        };
        let value = redis::parse_redis_value(&rest[..end]).map_err(|_| Broken::Garbage)?;
        self.parsed += end;
        let asked = self.in_flight.pop_front().ok_or(Broken::Unasked)?;
        self.heard_us = now_us;
        Ok(Some(Reply {
            tag: asked.tag,
            value,
            round_trip_us: now_us.saturating_sub(asked.sent_us),
        }))
    }

    /// When the oldest command without reply has waited too long: a time-out from when it was sent or from the last reply,
    /// whichever is later, but [`PATIENCE`] of them at most.
    pub fn deadline_us(&self) -> Option<u64> {
        let sent_us = self.in_flight.front()?.sent_us;
        let silent_us = sent_us.max(self.heard_us) + self.limits.timeout_us;
        Some(silent_us.min(sent_us + PATIENCE * self.limits.timeout_us))
    }

    /// Commands without reply.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// The tags of all commands that got no reply, in order: nobody knows what has become of them.
    pub fn into_unanswered(self) -> impl Iterator<Item = T> {
        self.in_flight.into_iter().map(|sent| sent.tag)
    }
}

/// Finds the end of a reply; what it has seen of one is not looked at again when more comes.
#[derive(Default)]
struct Framer {
    /// Begin of the next element, from the begin of the reply.
    at: usize,
    /// Elements missing in each array that is open.
    open: SmallVec<[usize; 4]>,
}

/// Of a header, an error or a status.
const LINE_BYTES_MAX: usize = 64 << 10;
const ELEMENTS_MAX: usize = 1 << 20;
/// Nothing that is asked here is answered deeper; the parser is recursive.
const DEPTH_MAX: usize = 8;

impl Framer {
    /// Length of the reply at the begin of `input`, or `None` if it is not whole yet.
    fn frame(&mut self, input: &[u8], bytes_max: usize) -> Result<Option<usize>, Broken> {
        loop {
            let rest = &input[self.at..];
            let Some(kind) = rest.first() else {
                return Ok(None);
            };
            if !b"+-:$*".contains(kind) {
                return Err(Broken::Garbage);
            }
            let head = &rest[..rest.len().min(LINE_BYTES_MAX)];
            let Some(newline) = memchr::memchr(b'\n', head) else {
                return match head.len() {
                    LINE_BYTES_MAX => Err(Broken::Garbage),
                    _ => Ok(None),
                };
            };
            let line = head[1..newline]
                .strip_suffix(b"\r")
                .ok_or(Broken::Garbage)?;
            let mut end = self.at + newline + 1;
            let mut elements = 0;
            match kind {
                b'$' => {
                    if let Some(length) = length(line, bytes_max)? {
                        end += length + 2;
                        if end > bytes_max {
                            return Err(Broken::TooLarge(bytes_max));
                        }
                        if input.len() < end {
                            return Ok(None);
                        }
                        if &input[end - 2..end] != b"\r\n" {
                            return Err(Broken::Garbage);
                        }
                    }
                }
                b'*' => elements = length(line, ELEMENTS_MAX)?.unwrap_or(0),
                _ => {}
            }
            self.at = end;
            if end > bytes_max {
                return Err(Broken::TooLarge(bytes_max));
            }
            if elements > 0 {
                if self.open.len() == DEPTH_MAX {
                    return Err(Broken::Garbage);
                }
                self.open.push(elements);
                continue;
            }
            while let Some(missing) = self.open.last_mut() {
                *missing -= 1;
                if *missing > 0 {
                    break;
                }
                self.open.pop();
            }
            if self.open.is_empty() {
                return Ok(Some(std::mem::take(&mut self.at)));
            }
        }
    }
}

/// The number in a header; -1 is "nothing".
fn length(line: &[u8], most: usize) -> Result<Option<usize>, Broken> {
    if line == b"-1" {
        return Ok(None);
    }
    if line.is_empty() || line.len() > 19 || !line.iter().all(u8::is_ascii_digit) {
        return Err(Broken::Garbage);
    }
    let number = line
        .iter()
        .fold(0u64, |n, digit| n * 10 + u64::from(digit - b'0'));
    match usize::try_from(number) {
        Ok(number) if number <= most => Ok(Some(number)),
        _ => Err(Broken::TooLarge(most)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: Limits = Limits {
        commands_max: 3,
        out_bytes_max: 1000,
        reply_bytes_max: 10_000,
        timeout_us: 100,
    };

    fn connection(commands: usize) -> Connection<usize> {
        let mut connection = Connection::new(LIMITS);
        (0..commands).for_each(|tag| connection.send(&redis::cmd("PING"), tag, 5));
        connection
    }

    #[test]
    fn replies_find_their_commands_in_order_however_they_are_cut() {
        let replies = b"+OK\r\n$5\r\nab\r\nc\r\n*3\r\n:1\r\n$-1\r\n*1\r\n$0\r\n\r\n-ERR no\r\n";
        for cut in 1..replies.len() {
            let mut connection = connection(4);
            let mut got = Vec::new();
            for part in replies.chunks(cut) {
                connection.feed(part);
                while let Some(reply) = connection.next(12).unwrap() {
                    assert_eq!(reply.round_trip_us, 7);
                    got.push((reply.tag, reply.value));
                }
            }
            let tags: Vec<_> = got.iter().map(|(tag, _)| *tag).collect();
            assert_eq!(tags, [0, 1, 2, 3], "pieces of {cut}");
            assert_eq!(got[1].1, Value::BulkString(b"ab\r\nc".to_vec()));
            assert!(matches!(&got[2].1, Value::Array(items) if items.len() == 3));
            assert!(matches!(&got[3].1, Value::ServerError(_)));
            assert!(connection.input.is_empty());
        }
    }

    #[test]
    fn what_is_not_a_reply_breaks_the_connection() {
        for (bytes, error) in [
            (&b"HTTP/1.1 400 Bad Request\r\n"[..], Broken::Garbage),
            (b"$x\r\n", Broken::Garbage),
            (b"$-2\r\n", Broken::Garbage),
            (b"$3\r\nabcde", Broken::Garbage),
            (b"+OK\n", Broken::Garbage),
            (b"$99999\r\n", Broken::TooLarge(10_000)),
            (b"*99999999999999999999\r\n", Broken::Garbage),
            (b"*9999999999\r\n", Broken::TooLarge(ELEMENTS_MAX)),
            (&b"*1\r\n".repeat(9), Broken::Garbage),
        ] {
            let mut connection = connection(1);
            connection.feed(bytes);
            assert_eq!(connection.next(0).unwrap_err(), error, "{bytes:?}");
        }
        let mut connection = connection(0);
        connection.feed(b"+OK\r\n");
        assert_eq!(connection.next(0).unwrap_err(), Broken::Unasked);
    }

    #[test]
    fn commands_in_flight_are_bounded_and_the_oldest_sets_the_deadline() {
        let mut connection = connection(2);
        assert!(connection.has_room());
        connection.send(&redis::cmd("PING"), 2, 50);
        assert!(!connection.has_room());
        assert_eq!(connection.deadline_us(), Some(105));
        connection.feed(b"+PONG\r\n+PONG\r\n");
        while connection.next(60).unwrap().is_some() {}
        assert!(connection.has_room());
        // sent at 50, but what was before it was answered at 60
        assert_eq!(connection.deadline_us(), Some(160));
        assert_eq!(connection.into_unanswered().collect::<Vec<_>>(), [2]);
    }

    #[test]
    fn a_server_that_goes_on_answering_is_slow_and_not_dead_but_not_for_ever() {
        let mut connection = connection(2);
        connection.send(&redis::cmd("PING"), 2, 5);
        connection.feed(b"+PONG\r\n");
        while connection.next(100).unwrap().is_some() {}
        assert_eq!(
            connection.deadline_us(),
            Some(200),
            "one time-out of silence"
        );
        connection.feed(b"+PONG\r\n");
        while connection.next(790).unwrap().is_some() {}
        assert_eq!(
            connection.deadline_us(),
            Some(805),
            "eight since it was sent"
        );
        connection.feed(b"+PONG\r\n");
        while connection.next(800).unwrap().is_some() {}
        assert_eq!(connection.deadline_us(), None);
        connection.send(&redis::cmd("PING"), 3, 2_000);
        assert_eq!(
            connection.deadline_us(),
            Some(2_100),
            "silence counts from the question"
        );
    }

    #[test]
    fn a_quarter_of_the_room_is_kept_for_what_somebody_waits_for() {
        let mut connection = Connection::new(Limits {
            commands_max: 4,
            ..LIMITS
        });
        (0..3).for_each(|tag| connection.send(&redis::cmd("PING"), tag, 0));
        assert!(connection.has_room() && !connection.has_room_to_spare());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(
            prop_oneof![Just(b'*'), Just(b'$'), Just(b'1'), Just(b'\r'), Just(b'\n'), Just(b'-'), any::<u8>()], 0..200,
        )) {
            let mut connection = connection(50);
            connection.feed(&bytes);
            while let Ok(Some(_)) = connection.next(0) {}
        }
    }
}
