"""A bot on aioxmpp."""

import asyncio
import datetime
import socket

import aioxmpp
import aioxmpp.avatar
import aioxmpp.blocking
import aioxmpp.bookmarks
import aioxmpp.carbons
import aioxmpp.connector
import aioxmpp.disco
import aioxmpp.ibr
import aioxmpp.muc
import aioxmpp.node
import aioxmpp.pep
import aioxmpp.ping
import aioxmpp.private_xml
import aioxmpp.pubsub
import aioxmpp.pubsub.xso
import aioxmpp.roster
import aioxmpp.security_layer
import aioxmpp.vcard
import aioxmpp.version
import aioxmpp.xso
import lxml.etree

from bot import WAIT_S, Bot, Event, Message, Presence, Push, Refused, StreamEnd


@aioxmpp.private_xml.Query.as_payload_class
class Notes(aioxmpp.xso.XSO):
    TAG = ("urn:example:notes", "notes")
    text = aioxmpp.xso.Text(default=None)


@aioxmpp.IQ.as_payload_class
class LastActivity(aioxmpp.xso.XSO):
    TAG = ("jabber:iq:last", "query")
    seconds = aioxmpp.xso.Attr("seconds", type_=aioxmpp.xso.Integer(), default=None)
    status = aioxmpp.xso.Text(default=None)


@aioxmpp.IQ.as_payload_class
class Time(aioxmpp.xso.XSO):
    TAG = ("urn:xmpp:time", "time")
    tzo = aioxmpp.xso.ChildText(("urn:xmpp:time", "tzo"), default=None)
    utc = aioxmpp.xso.ChildText(("urn:xmpp:time", "utc"), default=None)


NICK = "http://jabber.org/protocol/nick"


@aioxmpp.pubsub.xso.as_payload_class
class Nick(aioxmpp.xso.XSO):
    TAG = (NICK, "nick")
    text = aioxmpp.xso.Text(default=None)


resume_as_written = aioxmpp.stream.StanzaStream._resume_sm


def resume_in_order(stream, remote_count):
    """aioxmpp 0.13.3 sends what was not acknowledged in reverse: it puts one after the other at the queue's head."""
    stream.sm_ack(remote_count)
    stream._sm_unacked_list.reverse()
    resume_as_written(stream, remote_count)


aioxmpp.stream.StanzaStream._resume_sm = resume_in_order

SERVER = aioxmpp.JID.fromstr("localhost")


class AioBot(Bot):
    library = "aioxmpp"

    def security(self, password):
        def context():
            made = aioxmpp.security_layer.default_ssl_context()
            made.load_verify_locations(str(self.server.certificate))
            return made

        return aioxmpp.make_security_layer(password, ssl_context_factory=context)

    def peers(self):
        """Where to connect; while the gate is shut the library waits before it connects."""
        bot = self

        def gated(connector):
            class Gated(connector):
                async def connect(self, *arguments, **named):
                    await bot.gate.wait()
                    return await super().connect(*arguments, **named)

            return Gated()

        if self.direct_tls:
            return [(self.server.host, self.server.tls_port, gated(aioxmpp.connector.XMPPOverTLSConnector))]
        return [(self.server.host, self.server.port, gated(aioxmpp.connector.STARTTLSConnector))]

    async def log_in(self, direct_tls=False, register=False):
        self.direct_tls = direct_tls
        self.gate = asyncio.Event()
        self.gate.set()
        jid = aioxmpp.JID.fromstr(self.full)
        if register:
            _, stream, _ = await aioxmpp.node.connect_xmlstream(jid, self.security(None), override_peer=self.peers())
            await aioxmpp.ibr.register(stream, aioxmpp.ibr.Query(self.name, self.password))
            await asyncio.wait_for(stream.close_and_wait(), WAIT_S)
        self.client = client = aioxmpp.Client(jid, self.security(self.password), override_peer=self.peers(), max_initial_attempts=1)
        client.backoff_start = datetime.timedelta(milliseconds=10)
        self.services = {
            service: client.summon(service)
            for service in (
                aioxmpp.roster.RosterClient, aioxmpp.DiscoClient, aioxmpp.CarbonsClient, aioxmpp.BlockingClient,
                aioxmpp.ibr.RegistrationService, aioxmpp.private_xml.PrivateXMLService, aioxmpp.vcard.VCardService,
                aioxmpp.dispatcher.SimpleMessageDispatcher, aioxmpp.dispatcher.SimplePresenceDispatcher,
            )
        }
        if self.eventing:
            for service in (aioxmpp.EntityCapsService, aioxmpp.PubSubClient, aioxmpp.PEPClient, aioxmpp.AvatarService,
                            aioxmpp.BookmarkClient):
                self.services[service] = client.summon(service)
            self.services[aioxmpp.PubSubClient].on_item_published.connect(self.on_event)
        messages = self.services[aioxmpp.dispatcher.SimpleMessageDispatcher]
        messages.register_callback(None, None, self.on_message)
        presences = self.services[aioxmpp.dispatcher.SimplePresenceDispatcher]
        if not self.eventing:  # else a service of the library takes them
            presences.register_callback(None, None, lambda stanza: None)
        # The dispatcher wants one handler a type and sender: watch the stream beside it, for all of them.
        client.stream.on_presence_received.connect(self.on_presence)
        roster = self.services[aioxmpp.roster.RosterClient]
        roster.on_entry_added.connect(self.on_item)
        roster.on_entry_subscription_state_changed.connect(self.on_item)
        roster.on_entry_removed.connect(lambda item: self.note(Push(str(item.jid), "remove")) and None)
        ready = asyncio.get_running_loop().create_future()

        def established():
            if not ready.done():
                ready.set_result(None)

        def failed(error):
            if not ready.done():
                ready.set_exception(Refused(repr(error)))
            else:
                self.note(StreamEnd(repr(error)))

        def cut(reason):
            name = getattr(getattr(reason, "condition", None), "name", repr(reason))
            self.note(StreamEnd(name.lower().replace("_", "-")))

        def resumed():
            self.resumed.set()

        def destroyed(reason=None):
            cut(reason)

        self.established, self.failed, self.on_resumed, self.cut_by, self.destroyed = (
            established, failed, resumed, cut, destroyed)
        self.resumed = asyncio.Event()
        client.on_stream_established.connect(established)
        client.on_failure.connect(failed)
        client.on_stream_resumed.connect(resumed)
        client.on_stream_suspended.connect(cut)
        client.on_stream_destroyed.connect(destroyed)
        client.start()
        await asyncio.wait_for(ready, WAIT_S)
        ssl = self.client.stream._xmlstream.transport.get_extra_info("ssl_object")
        self.tls_version = ssl.get_protocol_version_name() if ssl else None

    async def come_online(self, show=None):
        self.set_presence(show)
        await self.wait(Presence, sender=self.full, kind="available", show=show or "")

    def set_presence(self, show):
        presence = aioxmpp.Presence(type_=aioxmpp.PresenceType.AVAILABLE)
        if show:
            presence.show = aioxmpp.PresenceShow(show)
        self.client.enqueue(presence)

    async def log_out(self):
        stopped = asyncio.get_running_loop().create_future()

        def on_stopped(*_):
            if not stopped.done():
                stopped.set_result(None)

        self.client.on_stopped.connect(on_stopped)
        self.client.on_failure.connect(on_stopped)
        if self.client.running:
            self.client.stop()
            await asyncio.wait_for(stopped, WAIT_S)

    def on_message(self, msg):
        for direction in ("received", "sent"):
            carbon = getattr(msg, f"xep0280_{direction}")
            if carbon is not None:
                inner = carbon.stanza
                self.note(Message(str(inner.from_), inner.body.any(), carbon=direction))
                return
        if msg.type_ == aioxmpp.MessageType.ERROR:
            self.note(Message(str(msg.from_), "error: " + msg.error.condition.value[1]))
        elif msg.body:
            self.note(Message(str(msg.from_), msg.body.any(), bool(msg.xep0203_delay)))

    def on_presence(self, stanza):
        kind = stanza.type_.value or "available"
        self.note(Presence(str(stanza.from_), kind, stanza.show.value or ""))

    def on_item(self, item):
        self.note(Push(str(item.jid), item.subscription))

    def on_event(self, jid, node, item, *, message=None):
        text = getattr(item.registered_payload, "text", None)
        self.note(Event(str(jid), node, item.id_, text or ""))

    async def watch(self, *nodes):
        """Wants to hear of these nodes from when it comes on line."""
        self.claims = []
        for node in nodes:
            pep = self.services[aioxmpp.PEPClient]
            if not pep.is_claimed(node):
                self.claims.append(pep.claim_pep_node(node, notify=True))

    async def publish_nick(self, nick):
        payload = Nick()
        payload.text = nick
        await self.ask(self.services[aioxmpp.PEPClient].publish(NICK, payload, id_="current"))

    async def nick(self, jid):
        answer = await self.ask(self.services[aioxmpp.PubSubClient].get_items(aioxmpp.JID.fromstr(jid), NICK))
        return next(item.registered_payload.text for item in answer.payload.items)

    async def publish_avatar(self, image):
        avatars = aioxmpp.avatar.AvatarSet()
        avatars.add_avatar_image("image/png", image_bytes=image)
        await self.ask(self.services[aioxmpp.AvatarService].publish_avatar_set(avatars))

    async def avatar(self, jid):
        descriptors = await self.ask(self.services[aioxmpp.AvatarService].get_avatar_metadata(aioxmpp.JID.fromstr(jid)))
        found = next(one for one in descriptors if isinstance(one, aioxmpp.avatar.service.PubsubAvatarDescriptor))
        return await self.ask(found.get_image_bytes())

    async def photo(self, jid):
        """The image in the vCard."""
        cards = self.services[aioxmpp.vcard.VCardService]
        return (await self.ask(cards.get_vcard(aioxmpp.JID.fromstr(jid)))).get_photo_data()

    async def add_bookmark(self, jid, name):
        """In private storage: the library knows XEP-0048 only."""
        room = aioxmpp.bookmarks.Conference(name, aioxmpp.JID.fromstr(jid))
        await self.ask(self.services[aioxmpp.BookmarkClient].add_bookmark(room))

    async def bookmarks(self):
        found = await self.ask(self.services[aioxmpp.BookmarkClient].get_bookmarks())
        return {str(one.jid): one.name for one in found}

    def chat(self, to, body):
        msg = aioxmpp.Message(type_=aioxmpp.MessageType.CHAT, to=aioxmpp.JID.fromstr(to))
        msg.body[None] = body
        self.client.enqueue(msg)

    @property
    def rooms(self):
        return self.client.summon(aioxmpp.MUCClient)

    async def enter(self, room, nick):
        """Comes into a chat room; the nicknames of those who are in."""

        def on_message(msg, _member, _source, **_):
            self.on_message(msg)

        self.room, entered = self.rooms.join(aioxmpp.JID.fromstr(room), nick)
        self.room.on_message.connect(on_message)
        await asyncio.wait_for(entered, WAIT_S)
        return {member.nick for member in self.room.members}

    def say(self, room, body):
        msg = aioxmpp.Message(type_=aioxmpp.MessageType.GROUPCHAT, to=aioxmpp.JID.fromstr(room))
        msg.body[None] = body
        self.client.enqueue(msg)

    async def leave_room(self, room, nick):
        await self.room.leave()

    async def persist(self, room):
        """An owner makes the room a lasting one."""
        room = aioxmpp.JID.fromstr(room)
        form = aioxmpp.muc.ConfigurationForm.from_xso(await self.rooms.get_room_config(room))
        form.persistentroom.value = True
        await self.rooms.set_room_config(room, form.render_reply())

    async def put_out(self, room, nick):
        await self.room.muc_set_role(nick, "none")

    @property
    def roster_client(self):
        return self.services[aioxmpp.roster.RosterClient]

    def subscribe(self, jid):
        self.roster_client.subscribe(aioxmpp.JID.fromstr(jid))

    def approve(self, jid):
        self.roster_client.approve(aioxmpp.JID.fromstr(jid))

    async def add_contact(self, jid, name, group):
        await self.ask(self.roster_client.set_entry(aioxmpp.JID.fromstr(jid), name=name, add_to_groups={group}))

    async def remove_contact(self, jid):
        await self.ask(self.roster_client.remove_entry(aioxmpp.JID.fromstr(jid)))

    async def roster(self):
        return {str(jid): (item.name, item.subscription) for jid, item in self.roster_client.items.items()}

    async def ask(self, request):
        try:
            return await asyncio.wait_for(request, WAIT_S)
        except aioxmpp.errors.XMPPError as error:
            raise Refused(error.condition.value[1]) from None

    async def get(self, to, payload):
        return await self.ask(self.client.send(aioxmpp.IQ(aioxmpp.IQType.GET, to=to, payload=payload)))

    async def ping(self, jid):
        await self.ask(aioxmpp.ping.ping(self.client, aioxmpp.JID.fromstr(jid)))

    async def enable_carbons(self):
        await self.ask(self.services[aioxmpp.CarbonsClient].enable())

    async def block(self, jid):
        await self.ask(self.services[aioxmpp.BlockingClient].block_jids([aioxmpp.JID.fromstr(jid)]))

    async def unblock(self, jid):
        await self.ask(self.services[aioxmpp.BlockingClient].unblock_jids([aioxmpp.JID.fromstr(jid)]))

    async def block_list(self):
        return {str(jid) for jid in self.services[aioxmpp.BlockingClient].blocklist}

    async def version(self):
        return (await self.ask(aioxmpp.version.query_version(self.client.stream, SERVER))).name

    async def time(self):
        return (await self.get(SERVER, Time())).utc

    async def last_activity(self, jid):
        return (await self.get(aioxmpp.JID.fromstr(jid), LastActivity())).seconds

    async def features(self, jid):
        disco = self.services[aioxmpp.DiscoClient]
        return set((await self.ask(disco.query_info(aioxmpp.JID.fromstr(jid)))).features)

    async def set_vcard(self, name):
        cards = self.services[aioxmpp.vcard.VCardService]
        card = await self.ask(cards.get_vcard())
        element = lxml.etree.SubElement(card.elements, "{vcard-temp}FN")
        element.text = name
        await self.ask(cards.set_vcard(card))

    async def vcard(self, jid):
        cards = self.services[aioxmpp.vcard.VCardService]
        card = await self.ask(cards.get_vcard(None if jid == self.jid else aioxmpp.JID.fromstr(jid)))
        return next((one.text for one in card.elements if one.tag == "{vcard-temp}FN"), "")

    async def set_private(self, text):
        notes = Notes()
        notes.text = text
        await self.ask(self.services[aioxmpp.private_xml.PrivateXMLService].set_private_xml(notes))

    async def private(self):
        answer = await self.ask(self.services[aioxmpp.private_xml.PrivateXMLService].get_private_xml(Notes()))
        return answer.registered_payload.text

    async def change_password(self, password):
        await self.ask(self.services[aioxmpp.ibr.RegistrationService].change_pass(password))
        self.password = password

    async def unregister(self):
        try:
            await self.ask(self.services[aioxmpp.ibr.RegistrationService].cancel_registration())
        except (ConnectionError, Refused, TimeoutError):
            pass  # the library documents that it fails with the account gone

    async def cut(self):
        """The connection breaks; `mend` lets the library come back."""
        self.gate.clear()
        self.resumed.clear()
        self.client.stream._xmlstream.transport.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        await self.wait(StreamEnd)

    async def all_written(self):
        """Nothing waits in the library's queue: what was sent is on the socket, or in the list for resumption."""
        async with asyncio.timeout(WAIT_S):
            while not self.client.stream._active_queue.empty():
                await asyncio.sleep(0)

    def gives_up(self):
        """When the connection ends now, the library does not come back."""
        self.gate.clear()

    async def mend(self):
        self.gate.set()
        await asyncio.wait_for(self.resumed.wait(), WAIT_S)
