//! The readiness task of the live queue: one turn takes what sockets, other threads and the clock have brought, and ends by
//! carrying out all effects at once.

use std::rc::Rc;
use std::time::{Duration, Instant};

use super::admission::Next;
use super::moves::Parcel;
use super::{Begins, Inbound, Kind, Shard, give_job, http, limits, login};
use crate::net::{Read, Transport};
use crate::observe::{Stage, exchange};
use crate::rt;
use crate::xml::{FrameKind, Framer};
use crate::xmpp::error::StreamError;
use crate::xmpp::session::SessionId;
use crate::xmpp::slice::{Closing, Computed, Slice};

/// How long the shard sleeps in its readiness set before it sleeps in the ring; timers may be late by as much.
const NAP: Duration = Duration::from_millis(1);
/// How long a full way to another shard is given.
const CONGESTED_PAUSE: Duration = Duration::from_micros(100);
/// Presences that go out in one turn for each login that may compute: each costs a fraction of a login's step.
const PRESENCES_PER_PLACE: usize = 2;
/// Sessions that get in each turn what rooms say to many, however short a turn should be.
const FANNED_MIN: usize = 4;
/// Connections that have ended are taken leave of in each turn, however short a turn should be.
const LEAVING_MIN: usize = 4;
/// Reads of one connection in one turn.
pub(super) const READS_MAX: usize = 4;
/// How long a connection may take to hear its last words.
const FAREWELL_MS: u64 = 3000;
/// And how much of what it goes on sending is read away meanwhile, to let it hear them.
const FAREWELL_BYTES_MAX: usize = 256 << 10;

impl Shard {
    /// Turns until the shard has stopped.
    pub(super) async fn live(self: Rc<Self>) {
        let mut events = Vec::with_capacity(256);
        let (mut inbound, mut parcels) = (Vec::new(), Vec::new());
        let mut looked = Instant::now();
        loop {
            events.clear();
            self.turned();
            let busy = !self.unread.borrow().is_empty()
                || !self.leaving.borrow().is_empty()
                || rt::others_runnable()
                || self.admission.is_wanted()
                || self.slice.borrow().pace.waiting() > 0
                || !self.slice.borrow().fx.fanned.is_empty()
                || !self.slice.borrow().regrouping.is_empty()
                || self.slice.borrow().overlay.is_behind();
            let commit = self.journal.wait(&self.slice.borrow());
            let mut slept = None;
            let harvested = match busy {
                true => self.readiness.harvest(&mut events),
                false => {
                    let most = commit.map_or(NAP, |wait| wait.min(NAP));
                    slept = Some((self.now_us(), most));
                    self.readiness.nap(&mut events, most)
                }
            };
            if let Err(error) = harvested {
                tracing::error!(%error, "epoll_wait failed");
            }
            self.clock();
            self.looked(slept, !events.is_empty());
            let now_us = self.slice.borrow().now.us;
            self.turn_began_us.set(now_us);
            self.flushed_us.set(now_us);
            for event in &events {
                self.ready(event);
                self.breathe().await;
            }
            self.slice.borrow_mut().overlay.forget_some();
            self.inbox_depth.saw(self.inbox.drain(&mut inbound) as u64);
            for message in inbound.drain(..) {
                self.inbound(message);
            }
            let now_us = self.slice.borrow().now.us;
            self.ways.borrow_mut().receive(&mut parcels, now_us);
            for parcel in parcels.drain(..) {
                self.parcel(parcel);
                self.breathe().await;
            }
            let again = self.unread.borrow().len();
            self.unread_depth.saw(again as u64);
            for _ in 0..again {
                if self.ways.borrow().congested() {
                    break;
                }
                let Some(link) = self.unread.borrow_mut().pop_front() else {
                    break;
                };
                self.read(link, true);
                self.breathe().await;
            }
            self.leave();
            if !self.ways.borrow().congested() {
                self.slice.borrow_mut().regroup_some();
            }
            self.flush();
            self.fan_out();
            self.admit();
            if self.stopping.get() && self.all_closed() && self.all_durable() {
                return;
            }
            if self.ways.borrow().congested() {
                rt::sleep(CONGESTED_PAUSE).await;
                self.ways.borrow_mut().retry();
            } else if events.is_empty() && !busy && self.may_sleep() {
                // nothing for a whole nap: sleep in the ring
                self.admission.asleep.set(true);
                let from_us = self.now_us();
                self.readiness.wait().await;
                self.admission.asleep.set(false);
                let now_us = self.now_us();
                self.lag.borrow_mut().slept(from_us, now_us, now_us);
                looked = Instant::now();
                self.turn_began_us.set(now_us);
                continue;
            }
            rt::others_first().await;
            if looked.elapsed() >= NAP {
                rt::look_at_rings().await;
                looked = Instant::now();
            }
        }
    }

    /// Measures how late this turn is. `slept`: since when, and for how long at most.
    fn looked(&self, slept: Option<(u64, Duration)>, woken: bool) {
        let now_us = self.slice.borrow().now.us;
        let mut lag = self.lag.borrow_mut();
        match slept {
            Some((from_us, _)) if woken => lag.slept(from_us, now_us, now_us),
            Some((from_us, most)) => lag.slept(from_us, from_us + most.as_micros() as u64, now_us),
            None => lag.looked(now_us),
        }
    }

    /// The sockets are looked at again: what has become ready since the turn began has waited for so long. Control steers by
    /// each turn; what people look at is sampled by [`Shard::looked`], where turns weigh by their length.
    fn turned(&self) {
        let took_us = self.now_us().saturating_sub(self.turn_began_us.get());
        self.admission.turn(took_us);
    }

    /// Live traffic has had its turn: those who log in have theirs.
    fn admit(self: &Rc<Self>) {
        let now_ms = self.now_ms();
        let places = self.admission.open();
        self.loads.publish(self.number, self.admission.knocks());
        let (mut wrote, waiting) = {
            let mut slice = self.slice.borrow_mut();
            let waited = slice.pace.waiting() > 0;
            slice.release(places * PRESENCES_PER_PLACE);
            let waiting = slice.pace.waiting();
            if !waited && !self.admission.is_wanted() {
                return;
            }
            (waited, waiting)
        };
        // those who are told of others first: they are in
        let begun = match waiting > self.config.borrow().storm.presence_waiting_max {
            true => usize::MAX,
            false => self.negotiating.get(),
        };
        if waiting > 0 {
            self.admission.limit();
        }
        while let Some(next) = self.admission.next(now_ms, begun) {
            match next {
                Next::Told => {}
                Next::Begin(knock) => login::let_in(self.clone(), *knock),
                Next::Late(knock) => login::too_late(self.clone(), *knock),
                Next::Read(link) => {
                    self.read_beginning(link, now_ms);
                    self.admission.done();
                    wrote = true;
                }
            }
        }
        if wrote {
            self.flush();
        }
    }

    /// Reads a session that has just begun.
    fn read_beginning(&self, link: u64, now_ms: u64) {
        let mut to_the_end = false;
        if let Some(Kind::Live(live)) = self.links.borrow_mut().get_mut(link)
            && let Begins::Until { queued, closed, .. } = &mut live.begins
        {
            *queued = false;
            to_the_end = *closed;
        }
        if self.ways.borrow().congested() {
            self.unread.borrow_mut().push_back(link);
            return;
        }
        self.read(link, to_the_end);
        if let Some(Kind::Live(live)) = self.links.borrow_mut().get_mut(link)
            && let Begins::Until { ms, .. } = live.begins
            && now_ms >= ms
        {
            live.begins = Begins::No;
        }
    }

    /// Nothing waits to be written, for a commit that nobody else would tell of (marks wait for the next tick), or for a deadline of
    /// Redis.
    fn may_sleep(&self) -> bool {
        let slice = self.slice.borrow();
        let durable = slice.ledger.waiting() == 0 || slice.ledger.is_flying();
        durable
            && slice.fx.dirty.is_empty()
            && slice.fx.fanned.is_empty()
            && self.redis.as_ref().is_none_or(|redis| !redis.is_restless())
    }

    /// The shard stops: what it has decided is in its journal, marks too, and those of accounts that have left uploads.
    fn all_durable(&self) -> bool {
        let mut slice = self.slice.borrow_mut();
        slice.ledger.hurry();
        let ms = slice.now.ms;
        slice.ledger.due_ms(ms).is_none()
            && !slice.ledger.is_flying()
            && slice.fx.uploads_gone.is_empty()
            && !self.upload_forgets.get()
    }

    /// Between two pieces of a turn that may become long: what was decided so far does not wait for its end, and others run if
    /// their time has come.
    async fn breathe(&self) {
        if rt::need_preempt() {
            self.flush();
            rt::yield_now().await;
        } else if self.now_us() >= self.flushed_us.get() + self.piece_us() {
            self.flush();
        }
    }

    fn ready(&self, event: &rt::Ready) {
        let link = event.token;
        let mut begins = false;
        let live = {
            let mut links = self.links.borrow_mut();
            match links.get_mut(link) {
                Some(Kind::Waits(waits)) => {
                    if event.closed {
                        waits.closed.set(true);
                    }
                    waits.ready.notify();
                    false
                }
                Some(Kind::Login(login)) => {
                    if event.closed {
                        login.closed.set(true);
                    }
                    // room to write is news only for who waits for it
                    if event.readable || event.closed || login.blocked.get() {
                        self.admission.ready(login, self.now_ms());
                    }
                    false
                }
                Some(Kind::Listener(notify)) => {
                    self.admission.accept(notify, self.now_ms());
                    false
                }
                Some(Kind::Live(live)) => match &mut live.begins {
                    Begins::No => true,
                    Begins::Until { queued, closed, .. } => {
                        *closed |= event.closed;
                        if (event.readable || event.closed) && !std::mem::replace(queued, true) {
                            self.admission.begins(link, self.now_ms());
                        }
                        begins = true;
                        true
                    }
                },
                Some(Kind::Component(_)) => {
                    drop(links);
                    self.component_ready(link, event);
                    false
                }
                Some(Kind::Closing { transport, .. }) => {
                    // room to write is news only for who has something to write
                    if event.readable || event.closed || transport.pending() > 0 {
                        self.leaving.borrow_mut().push_back(link);
                    }
                    false
                }
                Some(Kind::Bosh) => {
                    drop(links);
                    self.bosh_ready(link);
                    false
                }
                Some(Kind::Redis(instance)) => {
                    let instance = *instance;
                    drop(links);
                    self.redis_ready(instance, event);
                    false
                }
                Some(Kind::Inbox | Kind::Mesh) | None => false,
            }
        };
        if !live {
            return;
        }
        if event.writable {
            self.write_rest(link);
        }
        if (event.readable || event.closed) && !begins {
            if event.closed {
                self.leaving.borrow_mut().push_back(link);
            } else if self.ways.borrow().congested() {
                self.unread.borrow_mut().push_back(link);
            } else {
                self.read(link, false);
            }
        }
    }

    /// Reads connections that have ended and says farewell to those whose sessions have, a few in a turn: whoever has lost a network
    /// or a blade has lost thousands at once, thousands log out at a time, and the others go on.
    fn leave(&self) {
        let waiting = self.leaving.borrow().len();
        if waiting == 0 {
            return;
        }
        self.leaving_depth.saw(waiting as u64);
        let turn_until_us = self.turn_began_us.get() + self.config.borrow().storm.lag_us_target;
        let until_us = turn_until_us.min(self.now_us() + self.piece_us());
        for taken in 1..=waiting {
            if self.ways.borrow().congested() {
                return;
            }
            let Some(link) = self.leaving.borrow_mut().pop_front() else {
                return;
            };
            self.read(link, true);
            self.go_on_closing(link);
            if taken >= LEAVING_MIN && self.now_us() >= until_us {
                return;
            }
        }
    }

    /// How long a turn may go on with what can be done in pieces; microseconds.
    fn piece_us(&self) -> u64 {
        self.config.borrow().storm.lag_us_target / 2
    }

    /// Reads a live connection and hands its elements to the slice. `to_the_end`: until the kernel says that there is no
    /// more, because an end that came with the last bytes is not reported again.
    pub(super) fn read(&self, link: u64, to_the_end: bool) {
        let mut links = self.links.borrow_mut();
        let live = match links.get_mut(link) {
            Some(Kind::Live(live)) => live,
            Some(Kind::Component(_)) => {
                drop(links);
                return self.component_read(link, to_the_end);
            }
            _ => return,
        };
        let mut slice = self.slice.borrow_mut();
        let mut scratch = self.scratch.borrow_mut();
        let sid = live.session;
        // bytes that came with the end of the login
        let mut end = Ok(());
        if !live.rest.is_empty() {
            let rest = std::mem::take(&mut live.rest);
            end = take_frames(&mut slice, sid, &mut live.framer, &rest, &mut live.rest);
        }
        let mut drained = false;
        for turn in 0..=READS_MAX {
            if end.is_err() || drained {
                break;
            }
            if turn == READS_MAX {
                self.unread.borrow_mut().push_back(link);
                break;
            }
            end = match live.transport.read(&mut scratch) {
                Ok(Read::Data { bytes: data, more }) => {
                    drained = !more && !to_the_end;
                    if live.rest.is_empty() {
                        take_frames(&mut slice, sid, &mut live.framer, data, &mut live.rest)
                    } else {
                        let mut all = std::mem::take(&mut live.rest);
                        all.extend_from_slice(data);
                        take_frames(&mut slice, sid, &mut live.framer, &all, &mut live.rest)
                    }
                }
                Ok(Read::HandshakeDone) => Ok(()),
                Ok(Read::WouldBlock) if !live.transport.is_broken() => break,
                Ok(Read::WouldBlock | Read::Eof) => Err(End::Lost),
                Err(error) => {
                    tracing::debug!(%error, "a connection broke");
                    Err(End::Lost)
                }
            };
        }
        let Err(end) = end else { return };
        match end {
            End::Lost => {
                let gone = links.remove(link);
                // a socket that is closed leaves the readiness set by itself
                if let Some(Kind::Live(mut live)) = gone {
                    confirm(&mut slice, &mut live.transport, sid);
                    slice.link_lost(sid);
                    drop((links, slice, scratch));
                    if live.transport.has_said_farewell() {
                        self.close_transport(live.transport, &[]);
                    }
                }
            }
            End::Stream(error) => {
                if let Some(Kind::Live(live)) = links.get_mut(link) {
                    confirm(&mut slice, &mut live.transport, sid);
                }
                slice.end(sid, error);
            }
        }
    }

    fn write_rest(&self, link: u64) {
        let mut links = self.links.borrow_mut();
        let Some(Kind::Live(live)) = links.get_mut(link) else {
            return;
        };
        if live.transport.pending() == 0 {
            return;
        }
        let sid = live.session;
        match live.transport.flush() {
            Ok(_) => {
                let unsent = live.transport.pending();
                let mut slice = self.slice.borrow_mut();
                if let Some(session) = slice.sessions.get_mut(sid) {
                    session.unsent = unsent;
                }
                slice.requeue(sid);
            }
            Err(_) => {
                drop(links);
                self.leaves(link);
            }
        }
    }

    /// Its session has ended, or writing has failed (what the peer has sent before is read first): [`Shard::leave`] comes to it.
    fn leaves(&self, link: u64) {
        self.leaving.borrow_mut().push_back(link);
        if self.admission.asleep.replace(false) {
            self.nudge();
        }
    }

    fn inbound(self: &Rc<Self>, message: Inbound) {
        match message {
            Inbound::Answers(answers) => self.slice.borrow_mut().answers(answers),
            Inbound::Committed(committed) => {
                self.journal
                    .landed(&mut self.slice.borrow_mut(), *committed);
            }
            Inbound::Drained(at) => self.slice.borrow_mut().drained(at),
            Inbound::Computed(ticket, outcome) => self.slice.borrow_mut().computed(ticket, outcome),
            Inbound::Redis(reply) => self.redis_reply(reply),
            Inbound::Admin(call) => super::admin::call(&mut self.slice.borrow_mut(), call),
            Inbound::Decoy(decoy) => *self.decoy.borrow_mut() = decoy,
            Inbound::Reload(config, tls, components) => {
                let mut slice = self.slice.borrow_mut();
                slice.env.limits = limits(&config, slice.env.ring.members());
                slice.component_configure(components, super::component::settings(&config));
                drop(slice);
                if let Some(files) = &self.files {
                    files.configure(&config);
                }
                self.admission.configure(&config);
                *self.config.borrow_mut() = config;
                *self.tls.borrow_mut() = tls;
            }
            Inbound::Groups(groups) => self.slice.borrow_mut().regroup(groups),
            Inbound::Histograms(n, empty, reply) => {
                // nobody waits any more: the next one gets them
                let _ = reply.send((n, exchange(empty)));
            }
            Inbound::Page(ticket, page) => self.page(ticket, page),
            Inbound::Uploaded(done) => self.uploaded(done),
            Inbound::Nudge => {}
            Inbound::Stop => {
                self.stopping.set(true);
                // listeners and those who are logging in look again, and hear that it is over
                for (_, link) in &self.links.borrow().slab {
                    match &link.kind {
                        Kind::Waits(waits) => waits.ready.notify(),
                        Kind::Login(login) => login.told.notify(),
                        Kind::Listener(notify) => notify.notify(),
                        _ => {}
                    }
                }
                login::turn_all_away(self);
                self.component_stop();
                let mut slice = self.slice.borrow_mut();
                slice.end_all(&StreamError::text("system-shutdown", "the server stops"));
            }
        }
    }

    /// A parcel of another shard.
    pub(super) fn parcel(self: &Rc<Self>, parcel: Parcel) {
        match parcel {
            Parcel::Batch(batch) => self.slice.borrow_mut().batch(&batch),
            Parcel::Moved(moved) => login::arrived(self.clone(), *moved),
            Parcel::Request(request) => http::arrived(self.clone(), *request),
            Parcel::Knock(knock) => {
                let arrived_ms = knock.arrived_ms;
                self.admission.knock(knock, arrived_ms);
                if self.stopping.get() {
                    login::turn_all_away(self);
                }
            }
        }
    }

    /// Carries out what the slice has decided: output, farewells, requests, batches, jobs.
    pub(super) fn flush(&self) {
        self.flushed_us.set(self.now_us());
        let mut slice = self.slice.borrow_mut();
        self.redis_hear(&mut slice);
        self.journal.hand_over(&mut slice);
        slice.cut_slow_readers();
        while let Some(sid) = slice.fx.dirty.pop() {
            self.write_out(&mut slice, sid);
        }
        if !slice.fx.fanned.is_empty() && self.admission.asleep.replace(false) {
            self.nudge();
        }
        self.component_flush(&mut slice);
        let closing = std::mem::take(&mut slice.fx.closing);
        let ending = std::mem::take(&mut slice.components.ending);
        if !slice.fx.slots.is_empty() || !slice.fx.uploads_gone.is_empty() {
            self.ask_for_slots(&mut slice);
        }
        for (ticket, job) in std::mem::take(&mut slice.fx.jobs) {
            if !give_job(&self.helpers, &self.own_inbox, ticket, job) {
                slice.computed(ticket, Computed::Busy);
            }
        }
        self.redis_tell(&mut slice);
        let mut requests = std::mem::take(&mut slice.fx.behind);
        if self.redis.is_none() {
            requests.append(&mut slice.fx.requests);
        }
        if !requests.is_empty()
            && let Err(back) = self.lane.try_send(self.number, requests)
        {
            // the lane is full: they wait here, in order, and logins with them
            slice.fx.behind = back;
        }
        let mut ways = self.ways.borrow_mut();
        ways.retry();
        // the clock is read again only where something is measured that ends or begins here
        let sends = slice.fx.mesh.iter().any(|batch| !batch.is_empty());
        if sends || !slice.fx.delivered.is_empty() {
            let now_us = self.now_us();
            slice.fx.delivered.record(Stage::Message, now_us);
            for (shard, batch) in slice.fx.mesh.iter_mut().enumerate() {
                if !batch.is_empty() {
                    ways.send(shard, Parcel::Batch(std::mem::take(batch)), now_us);
                }
            }
        }
        let backlog_max = slice.env.limits.mesh_backlog_bytes_max;
        for (shard, closed) in slice.fx.closed.iter_mut().enumerate() {
            *closed = ways.kept_bytes(shard) > backlog_max;
        }
        let loaded = std::mem::take(&mut slice.fx.loaded);
        drop((slice, ways));
        let mut waiting = self.waiting.borrow_mut();
        for name in loaded {
            for login in waiting.remove(&*name).into_iter().flatten() {
                login.set(());
            }
        }
        drop(waiting);
        for end in closing {
            self.begin_closing(end);
        }
        for end in ending {
            self.component_close(end.link, &end.bytes);
        }
    }

    /// Hands over what the session has to say.
    fn write_out(&self, slice: &mut Slice, sid: SessionId) {
        let Some((link, bytes)) = slice.take_out(sid) else {
            return;
        };
        let sent = {
            let mut links = self.links.borrow_mut();
            match links.get_mut(link) {
                Some(Kind::Live(live)) if !live.transport.is_broken() => {
                    let sent = live
                        .transport
                        .write(&bytes, &mut self.scratch.borrow_mut())
                        .map(|()| live.transport.pending());
                    if live.transport.is_relayed() {
                        live.transport.mark(slice.unconfirmed(sid));
                    }
                    sent
                }
                _ => Ok(0),
            }
        };
        slice.reuse(bytes);
        match sent {
            Ok(0) => {}
            Ok(unsent) => {
                if let Some(session) = slice.sessions.get_mut(sid) {
                    session.unsent = unsent;
                }
            }
            Err(_) => self.leaves(link),
        }
    }

    /// Behind all else that goes out: what rooms say to many, as long as half of the time that a turn should take. One system
    /// call for each of hundreds takes milliseconds, and what comes meanwhile would wait for the last.
    fn fan_out(&self) {
        let mut slice = self.slice.borrow_mut();
        if slice.fx.fanned.is_empty() {
            return;
        }
        self.fanned_depth.saw(slice.fx.fanned.len() as u64);
        let until_us = self.now_us() + self.piece_us();
        for written in 1.. {
            let Some(sid) = slice.next_fanned() else {
                break;
            };
            self.write_out(&mut slice, sid);
            if written >= FANNED_MIN && self.now_us() >= until_us {
                break;
            }
        }
    }

    /// Sessions without stream management: what their peers have is delivered.
    pub(super) fn confirm_deliveries(&self) {
        let mut slice = self.slice.borrow_mut();
        let mut links = self.links.borrow_mut();
        for sid in std::mem::take(&mut slice.fx.unconfirmed) {
            let Some(session) = slice.sessions.get(sid) else {
                continue;
            };
            if let Some(Kind::Live(live)) = session.link.and_then(|link| links.get_mut(link)) {
                confirm(&mut slice, &mut live.transport, sid);
            }
            if slice.unconfirmed(sid) > 0 {
                slice.fx.unconfirmed.push(sid);
            }
        }
    }

    // ---- farewells ---------------------------------------------------------------------------------------------

    /// A session has ended: its connection keeps its link, and hears `last` when [`Shard::leave`] comes to it.
    fn begin_closing(&self, end: Closing) {
        let Closing {
            link,
            bytes,
            mut left,
        } = end;
        let mut links = self.links.borrow_mut();
        let kind = links.get_mut(link).filter(|k| matches!(k, Kind::Live(_)));
        if let Some(kind) = kind
            && let Kind::Live(live) = std::mem::replace(kind, Kind::Inbox)
        {
            // over BOSH requests would tell what has arrived, and none will come
            let decided_later = left.take_if(|_| !live.transport.is_relayed());
            *kind = closing(live.transport, bytes, decided_later);
            drop(links);
            self.leaves(link);
        }
        if let Some(name) = left {
            self.slice.borrow_mut().left(&name, Some(link), false);
        }
    }

    /// Says `last`, and lets a connection hear it: a socket that is closed with unread input would take it back. Its link is
    /// gone already.
    pub(super) fn close_transport(&self, transport: Transport, last: &[u8]) {
        let mut links = self.links.borrow_mut();
        let link = links.insert(closing(transport, last, None));
        let Some(Kind::Closing { transport, .. }) = links.get_mut(link) else {
            return;
        };
        if self.readiness.rename(transport.socket(), link).is_err() {
            links.remove(link);
            return;
        }
        drop(links);
        self.go_on_closing(link);
    }

    fn go_on_closing(&self, link: u64) {
        let mut links = self.links.borrow_mut();
        let Some(Kind::Closing {
            transport,
            last,
            until_ms,
            shut,
            ended,
            read,
            left,
        }) = links.get_mut(link)
        else {
            return;
        };
        let mut decided = None;
        if let Some(last) = last.take() {
            let said = transport.finish(&last, &mut self.scratch.borrow_mut());
            *until_ms = self.now_ms() + FAREWELL_MS;
            if !matches!(said, Ok(true)) {
                decided = left.take().map(|name| (name, false));
            }
        }
        // in good order?
        let over = loop {
            match transport.flush() {
                Ok(true) if !*shut => {
                    let _ = transport.socket().shutdown();
                    *shut = true;
                }
                Ok(true) => {}
                Ok(false) => break None,
                Err(_) => break Some(false),
            }
            match transport.socket().recv(&mut [0; 4 << 10]) {
                Ok(0) => {
                    *ended = true;
                    break Some(true);
                }
                Ok(more) if *read + more > FAREWELL_BYTES_MAX => break Some(false),
                Ok(more) => *read += more,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break None,
                Err(_) => break Some(false),
            }
        };
        // if its end and our last bytes have met on the way, [`Shard::end_closing`] looks again
        if let Some(in_order) = over
            && (left.is_none() || !in_order || has_all(transport))
        {
            decided = decided.or(left.take().map(|name| (name, in_order)));
            links.remove(link);
        }
        drop(links);
        if let Some((name, taken)) = decided {
            self.slice.borrow_mut().left(&name, Some(link), taken);
        }
    }

    /// Ends the connections that have had their time, and decides what was on its way on those that have ended.
    pub(super) fn end_closing(&self, now_ms: u64) {
        let mut slice = self.slice.borrow_mut();
        let mut links = self.links.borrow_mut();
        links.slab.retain(|slot, link| {
            let number = link.number(slot);
            let Kind::Closing {
                transport,
                until_ms,
                ended,
                left,
                ..
            } = &mut link.kind
            else {
                return true;
            };
            let has_all = left.is_some() && has_all(transport);
            let over = *until_ms <= now_ms || (*ended && has_all);
            if over && let Some(name) = left.take() {
                slice.left(&name, Some(number), has_all);
            }
            !over
        });
    }

    fn all_closed(&self) -> bool {
        let links = self.links.borrow();
        let open = links.slab.iter().any(|(_, l)| {
            matches!(
                l.kind,
                Kind::Live(_) | Kind::Component(_) | Kind::Closing { .. }
            )
        });
        !open && self.negotiating.get() == 0
    }
}

/// A connection that is to hear `last` and has not heard it yet.
fn closing(transport: Transport, last: impl Into<Box<[u8]>>, left: Option<Rc<str>>) -> Kind {
    Kind::Closing {
        transport: Box::new(transport),
        last: Some(last.into()),
        until_ms: u64::MAX,
        shut: false,
        ended: false,
        read: 0,
        left,
    }
}

/// Has the session output for its client alone that was not handed to its connection yet? What it is told with many others may wait.
fn is_dirty(slice: &Slice, sid: SessionId) -> bool {
    let session = slice.sessions.get(sid);
    session.is_some_and(|session| session.dirty)
}

/// What a session without stream management was sent is delivered when its peer's kernel has all of it; over BOSH when requests
/// have said that its client has it.
fn confirm(slice: &mut Slice, transport: &mut Transport, sid: SessionId) {
    if transport.is_relayed() {
        match transport.take_arrived() {
            0 => {}
            messages => slice.confirmed_first(sid, messages),
        }
    } else if !is_dirty(slice, sid) && !transport.is_broken() && has_all(transport) {
        slice.confirmed(sid);
    }
}

/// The peer's kernel has all that was written.
fn has_all(transport: &Transport) -> bool {
    transport.pending() == 0 && transport.socket().unsent().is_ok_and(|bytes| bytes == 0)
}

/// Why reading ends.
pub(super) enum End {
    /// The connection broke.
    Lost,
    /// The stream ends: with an error, or because the client closed it.
    Stream(Option<StreamError>),
}

/// Cuts `bytes` into frames and has them handled; the unfinished rest goes to `rest`.
fn take_frames(
    slice: &mut Slice,
    sid: SessionId,
    framer: &mut Framer,
    bytes: &[u8],
    rest: &mut Vec<u8>,
) -> Result<(), End> {
    let limits = slice.env.limits.xml;
    let mut at = 0;
    loop {
        let frame = framer
            .next(&bytes[at..], &limits)
            .map_err(|e| End::Stream(Some(e.into())))?;
        let Some(frame) = frame else { break };
        match frame.kind {
            FrameKind::Element => {
                let element = &bytes[at..at + frame.len];
                slice
                    .element(sid, element)
                    .map_err(|error| End::Stream(Some(error)))?;
            }
            FrameKind::Whitespace => slice.keep_alive(sid),
            FrameKind::End => return Err(End::Stream(None)),
            FrameKind::Header => {
                return Err(End::Stream(Some(StreamError::new("not-well-formed"))));
            }
        }
        at += frame.len;
    }
    rest.extend_from_slice(&bytes[at..]);
    Ok(())
}
