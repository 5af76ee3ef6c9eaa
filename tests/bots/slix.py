"""A bot on slixmpp."""

import asyncio
import io
import ssl

import aiohttp
import slixmpp
from slixmpp.exceptions import IqError
from slixmpp.plugins.xep_0363 import http_upload
from slixmpp.xmlstream import ET
from slixmpp.xmlstream.handler import Callback
from slixmpp.xmlstream.matcher import StanzaPath

from bot import WAIT_S, Bot, Event, Message, Presence, Push, Refused, StreamEnd

PLUGINS = [
    "xep_0004", "xep_0012", "xep_0030", "xep_0045", "xep_0049", "xep_0054", "xep_0066", "xep_0077", "xep_0092", "xep_0191",
    "xep_0198", "xep_0199", "xep_0202", "xep_0203", "xep_0249", "xep_0280", "xep_0297", "xep_0313", "xep_0352", "xep_0363",
    "xep_0410", "xep_0424",
    "xep_0441",
]

# Those who publish and want to hear of nodes: they announce capabilities, and are asked for them.
EVENTING = ["xep_0060", "xep_0115", "xep_0163", "xep_0084", "xep_0172", "xep_0223", "xep_0292", "xep_0402"]

NICK = "http://jabber.org/protocol/nick"


class SlixBot(Bot):
    library = "slixmpp"

    def prepare(self, direct_tls, register):
        self.client = client = slixmpp.ClientXMPP(self.full, self.password)
        client.enable_direct_tls, client.enable_starttls, client.enable_plaintext = direct_tls, not direct_tls, False
        client.ca_certs = self.server.certificate
        if self.identity:
            client.certfile, client.keyfile = map(str, self.identity)
        client.roster.auto_authorize, client.roster.auto_subscribe = None, False
        for plugin in PLUGINS + (EVENTING if self.eventing else []):
            client.register_plugin(plugin)
        client["xep_0077"].force_registration = register
        client["xep_0077"].create_account = register
        client.add_event_handler("register", self.on_register)
        client.add_event_handler("message", self.on_message)
        client.add_event_handler("message_error", self.on_message)
        client.add_event_handler("carbon_received", lambda msg: self.on_carbon(msg, "received"))
        client.add_event_handler("carbon_sent", lambda msg: self.on_carbon(msg, "sent"))
        client.add_event_handler("stream_error", lambda error: self.note(StreamEnd(error["condition"])))
        client.register_handler(Callback("bot presence", StanzaPath("presence"), self.on_presence))
        client.register_handler(Callback("bot event", StanzaPath("message"), self.on_event))
        client.register_handler(Callback("bot push", StanzaPath("iq@type=set/roster"), self.on_push))

    def happens(self, *events):
        """A future of the first of these events; ask for it before doing what causes them."""
        future = asyncio.get_running_loop().create_future()

        def handler_of(event):
            return lambda data: None if future.done() else future.set_result((event, data))

        for event in events:
            self.client.add_event_handler(event, handler_of(event), disposable=True)
        return future

    async def first(self, future):
        try:
            return await asyncio.wait_for(future, WAIT_S)
        except TimeoutError:
            raise AssertionError(f"{self.full}: nothing happened within {WAIT_S} s") from None

    async def log_in(self, direct_tls=False, register=False):
        self.prepare(direct_tls, register)
        self.direct_tls = direct_tls
        ready = self.happens("session_start", "failed_all_auth", "disconnected", "ssl_invalid_chain")
        self.client.connect(self.server.host, self.server.tls_port if direct_tls else self.server.port)
        event, _ = await self.first(ready)
        if event != "session_start":
            await self.log_out()
            raise Refused(event)
        self.tls_version = self.client.transport.get_extra_info("ssl_object").version()
        await self.client.get_roster()

    async def on_register(self, _form):
        iq = self.client.Iq()
        iq["type"] = "set"
        iq["register"]["username"] = self.name
        iq["register"]["password"] = self.password
        await iq.send()

    async def come_online(self, show=None):
        self.client.send_presence(pshow=show)
        await self.wait(Presence, sender=self.full, kind="available", show=show or "")

    def set_presence(self, show):
        self.client.send_presence(pshow=show)

    async def log_out(self):
        await self.client.disconnect()

    def on_message(self, msg):
        if any(child.tag.startswith("{urn:xmpp:carbons:2}") for child in msg.xml):
            return  # `on_carbon` takes it
        if msg["type"] == "error":
            self.note(Message(str(msg["from"]), "error: " + msg["error"]["condition"]))
        elif msg["body"]:
            delayed = msg.xml.find("{urn:xmpp:delay}delay") is not None
            self.note(Message(str(msg["from"]), msg["body"], delayed))

    def on_carbon(self, msg, direction):
        inner = msg["carbon_" + direction]
        self.note(Message(str(inner["from"]), inner["body"], carbon=direction))

    def on_presence(self, stanza):
        kind = stanza.xml.get("type", "available")
        self.note(Presence(str(stanza["from"]), kind, stanza.xml.findtext("{jabber:client}show") or ""))

    def on_push(self, iq):
        for item in iq.xml.iter("{jabber:iq:roster}item"):
            self.note(Push(item.get("jid"), item.get("subscription")))

    def on_event(self, msg):
        for items in msg.xml.iterfind("{http://jabber.org/protocol/pubsub#event}event/*"):
            for item in items:
                texts = [text.strip() for text in item.itertext() if text.strip()]
                self.note(Event(str(msg["from"]), items.get("node"), item.get("id"), "".join(texts)))

    def http(self):
        context = ssl.create_default_context(cafile=self.server.certificate)
        return aiohttp.TCPConnector(ssl=context)

    async def upload(self, name, data, content_type):
        plugin = self.client["xep_0363"]
        # slixmpp has no way to say whom to trust; the rest is its own
        http_upload.ClientSession = lambda **kw: aiohttp.ClientSession(connector=self.http(), **kw)
        try:
            return await plugin.upload_file(name, size=len(data), content_type=content_type, input_file=io.BytesIO(data))
        except http_upload.FileTooBig as error:
            raise Refused(f"too large for {error.args[1]}") from None

    async def download(self, url, headers=None):
        async with aiohttp.ClientSession(connector=self.http()) as session:
            async with session.get(url, headers=headers) as answer:
                return answer.status, {name.lower(): value for name, value in answer.headers.items()}, await answer.read()

    async def enable_push(self, jid, node, **options):
        config = {"FORM_TYPE": "http://jabber.org/protocol/pubsub#publish-options"} | options
        form = self.client["xep_0004"].make_form(ftype="submit")
        for var, value in config.items():
            form.add_field(var=var, value=value)
        enable = ET.Element("{urn:xmpp:push:0}enable", jid=jid, node=node)
        enable.append(form.xml)
        iq = self.client.make_iq_set(enable)
        await self.ask(iq.send())

    async def watch(self, *nodes):
        """Wants to hear of these nodes from when it comes on line."""
        for node in nodes:
            self.client["xep_0030"].add_feature(f"{node}+notify")
        await self.client["xep_0115"].update_caps(broadcast=False)

    async def publish_nick(self, nick):
        payload = ET.Element(f"{{{NICK}}}nick")
        payload.text = nick
        await self.ask(self.client["xep_0060"].publish(None, NICK, id="current", payload=payload))

    async def nick(self, jid):
        answer = await self.ask(self.client["xep_0060"].get_items(jid, NICK))
        return answer.xml.findtext(f".//{{{NICK}}}nick")

    async def publish_avatar(self, image):
        avatars = self.client["xep_0084"]
        await self.ask(avatars.publish_avatar(image))
        info = {"id": avatars.generate_id(image), "type": "image/png", "bytes": str(len(image))}
        await self.ask(avatars.publish_avatar_metadata(info))

    async def avatar(self, jid):
        answer = await self.ask(self.client["xep_0060"].get_items(jid, "urn:xmpp:avatar:metadata"))
        info = answer.xml.find(".//{urn:xmpp:avatar:metadata}info")
        answer = await self.ask(self.client["xep_0084"].retrieve_avatar(jid, info.get("id")))
        return answer["pubsub"]["items"]["item"]["avatar_data"]["value"]

    async def photo(self, jid):
        """The image in the vCard."""
        answer = await self.ask(self.client["xep_0054"].get_vcard(jid))
        return answer["vcard_temp"]["PHOTO"]["BINVAL"]

    async def add_bookmark(self, jid, name):
        item = self.client["xep_0402"].stanza.Conference()
        item["name"] = name
        await self.ask(self.client["xep_0223"].store(item, node="urn:xmpp:bookmarks:1", id=jid, options=self.private_options()))

    def private_options(self):
        form = self.client["xep_0004"].make_form(ftype="submit")
        form.add_field(var="FORM_TYPE", ftype="hidden", value="http://jabber.org/protocol/pubsub#publish-options")
        form.add_field(var="pubsub#max_items", value="max")
        form.add_field(var="pubsub#send_last_published_item", value="never")
        return form

    async def bookmarks(self):
        answer = await self.ask(self.client["xep_0060"].get_items(self.jid, "urn:xmpp:bookmarks:1"))
        conference = "{urn:xmpp:bookmarks:1}conference"
        items = answer.xml.iter("{http://jabber.org/protocol/pubsub}item")
        return {item.get("id"): item.find(conference).get("name") for item in items}

    async def publish_devices(self, node, payload, access):
        form = self.client["xep_0004"].make_form(ftype="submit")
        form.add_field(var="FORM_TYPE", ftype="hidden", value="http://jabber.org/protocol/pubsub#publish-options")
        form.add_field(var="pubsub#access_model", value=access)
        request = self.client["xep_0060"].publish(None, node, id="current", payload=ET.fromstring(payload), options=form)
        await self.ask(request)

    async def items(self, jid, node):
        """The payloads of a node."""
        answer = await self.ask(self.client["xep_0060"].get_items(jid, node))
        return [ET.tostring(item[0]).decode() for item in answer.xml.iter("{http://jabber.org/protocol/pubsub}item")]

    async def publish_vcard4(self, name):
        # the library takes the namespace for the node, if one lets it
        await self.ask(self.client["xep_0292"].publish_vcard(full_name=name, node="urn:xmpp:vcard4"))

    def chat(self, to, body):
        self.client.send_message(mto=to, mbody=body, mtype="chat")

    async def enter(self, room, nick):
        """Comes into a chat room; the nicknames of those who are in."""
        rooms = self.client["xep_0045"]
        await rooms.join_muc_wait(slixmpp.JID(room), nick, timeout=WAIT_S)
        return set(rooms.get_roster(room))

    def say(self, room, body):
        self.client.send_message(mto=room, mbody=body, mtype="groupchat")

    async def leave_room(self, room, nick):
        self.client["xep_0045"].leave_muc(slixmpp.JID(room), nick)

    def invite(self, jid, room, reason):
        self.client.plugin["xep_0249"].send_invitation(slixmpp.JID(jid), slixmpp.JID(room), reason=reason)

    async def invited(self, invitation):
        """The room and the reason of an invitation that `happens("groupchat_direct_invite")` has waited for."""
        _, message = await self.first(invitation)
        return str(message["groupchat_invite"]["jid"]), message["groupchat_invite"]["reason"]

    async def is_in(self, occupant):
        """What a ping to the own address in a room tells (XEP-0410): the library's word for it."""
        status = await self.client.plugin["xep_0410"].send_self_ping(slixmpp.JID(occupant))
        return status.name

    async def persist(self, room):
        """An owner makes the room a lasting one."""
        rooms = self.client["xep_0045"]
        form = await rooms.get_room_config(slixmpp.JID(room))
        form.set_type("submit")
        form["values"] = form.get_values() | {"muc#roomconfig_persistentroom": True}
        await rooms.set_room_config(slixmpp.JID(room), form)

    async def put_out(self, room, nick):
        await self.client["xep_0045"].set_role(slixmpp.JID(room), nick, "none")

    def subscribe(self, jid):
        self.client.send_presence_subscription(pto=jid, ptype="subscribe")

    def approve(self, jid):
        self.client.send_presence_subscription(pto=jid, ptype="subscribed")

    async def add_contact(self, jid, name, group):
        await self.ask(self.client.update_roster(jid, name=name, groups=[group]))

    async def remove_contact(self, jid):
        await self.ask(self.client.del_roster_item(jid))

    async def roster(self):
        # Without a version, so that the server tells all of it; the library makes items up for whoever sends presence.
        iq = self.client.make_iq_get()
        ET.SubElement(iq.xml, "{jabber:iq:roster}query")
        answer = await self.ask(iq.send())
        items = answer.xml.iter("{jabber:iq:roster}item")
        return {item.get("jid"): (item.get("name"), item.get("subscription")) for item in items}

    async def ask(self, request):
        try:
            return await request
        except IqError as error:
            raise Refused(error.iq["error"]["condition"]) from None

    async def ping(self, jid):
        await self.ask(self.client["xep_0199"].ping(jid))

    async def enable_carbons(self):
        await self.ask(self.client["xep_0280"].enable())

    async def block(self, jid):
        await self.ask(self.client["xep_0191"].block(slixmpp.JID(jid)))

    async def unblock(self, jid):
        await self.ask(self.client["xep_0191"].unblock(slixmpp.JID(jid)))

    async def block_list(self):
        answer = await self.ask(self.client["xep_0191"].get_blocked())
        return {item.get("jid") for item in answer.xml.iter("{urn:xmpp:blocking}item")}

    async def version(self):
        answer = await self.ask(self.client["xep_0092"].get_version("localhost"))
        return answer["software_version"]["name"]

    async def time(self):
        answer = await self.ask(self.client["xep_0202"].get_entity_time("localhost"))
        # Not answer["entity_time"]["utc"]: that adds a second Z before it parses.
        return answer.xml.findtext(".//{urn:xmpp:time}utc")

    async def last_activity(self, jid):
        answer = await self.ask(self.client["xep_0012"].get_last_activity(jid))
        return int(answer["last_activity"]["seconds"])

    async def features(self, jid):
        answer = await self.ask(self.client["xep_0030"].get_info(jid=jid, local=False))
        return set(answer["disco_info"]["features"])

    async def set_vcard(self, name):
        card = self.client["xep_0054"].make_vcard()
        card["FN"] = name
        await self.ask(self.client["xep_0054"].publish_vcard(card))

    async def vcard(self, jid):
        answer = await self.ask(self.client["xep_0054"].get_vcard(jid))
        return answer["vcard_temp"]["FN"]

    async def set_private(self, text):
        iq = self.client.make_iq_set()
        query = ET.SubElement(iq.xml, "{jabber:iq:private}query")
        ET.SubElement(query, "{urn:example:notes}notes").text = text
        await self.ask(iq.send())

    async def private(self):
        iq = self.client.make_iq_get()
        query = ET.SubElement(iq.xml, "{jabber:iq:private}query")
        ET.SubElement(query, "{urn:example:notes}notes")
        answer = await self.ask(iq.send())
        return answer.xml.findtext(".//{urn:example:notes}notes")

    def chat_with_id(self, to, body):
        """As `chat`, for a message that may be retracted; its id."""
        message = self.client.make_message(mto=to, mbody=body, mtype="chat")
        message.send()
        return message["id"]

    def retract(self, to, id):
        return self.client["xep_0424"].send_retraction(slixmpp.JID(to), id)["id"]

    async def archive(self, partner=None, page=10, reverse=False, of=None):
        """What this bot's archive (or a room's) shows, all pages of it: bodies; of a tombstone the id of its retraction."""
        pages = self.client["xep_0313"].iterate(
            jid=slixmpp.JID(of) if of else None,
            with_jid=slixmpp.JID(partner) if partner else None, rsm={"max": page}, reverse=reverse)
        shown = []
        async for message in pages:
            inner = message["mam_result"]["forwarded"]["stanza"]
            tombstone = inner.xml.find("{urn:xmpp:message-retract:1}retracted")
            shown.append(inner["body"] if tombstone is None else ("retracted", tombstone.get("id")))
        return shown

    async def archive_fields(self):
        form = await self.client["xep_0313"].get_fields()
        return set(form.get_fields())

    async def archive_ends(self):
        answer = await self.ask(self.client["xep_0313"].get_archive_metadata())
        ends = answer["mam_metadata"]
        return ends["start"]["id"], ends["end"]["id"]

    async def archive_preferences(self, default=None, never=()):
        """Sets them, or asks for them; what the server says they are."""
        plugin = self.client["xep_0441"]
        if default:
            await self.ask(plugin.set_preferences(default, never={slixmpp.JID(jid) for jid in never}))
        default, _, never = await self.ask(plugin.get_preferences())
        return default, {str(jid) for jid in never}

    async def change_password(self, password):
        await self.ask(self.client["xep_0077"].change_password(password))
        self.password = password

    async def unregister(self):
        await self.ask(self.client["xep_0077"].cancel_registration())

    async def cut(self):
        """The connection breaks; `mend` comes back."""
        gone = self.happens("disconnected")
        self.client.transport.abort()
        await self.first(gone)

    async def all_written(self):
        """Nothing waits in the library's queue: what was sent is on the socket, or in the list for resumption."""
        await asyncio.wait_for(self.client.waiting_queue.join(), WAIT_S)

    def gives_up(self):
        """When the connection ends now, it stays so (this library comes back only when asked to)."""

    async def mend(self):
        resumed = self.happens("session_resumed", "session_start", "sm_failed")
        self.client.connect(self.server.host, self.server.tls_port if self.direct_tls else self.server.port)
        event, _ = await self.first(resumed)
        assert event == "session_resumed", f"{self.full} did not resume: {event}"
