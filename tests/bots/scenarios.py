"""What the bots do. Each function is one scenario; its decorator says with which libraries it is played."""

import asyncio
import base64
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import re
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
import typing

from aio import AioBot
from bot import Event, Message, Presence, Push, Refused, StreamEnd
from certificates import Authority
from components import AppServer, Echo
from server import Blade, free_ports
from slix import SlixBot

LIBRARIES = [SlixBot, AioBot]
TOKIO_CLIENT = None  # the program of tests/bots/tokio-client
WEB_CLIENT = None  # tests/bots/web/client.mjs, with its libraries installed and login.mjs beside it
LOADTEST = None  # the load generator
NGINX = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
NGINX_CONF = pathlib.Path(__file__).parents[2] / "config" / "nginx.conf"
SCENARIOS = []
PASSWORD = "correct horse"


@dataclasses.dataclass
class Scenario:
    name: str
    play: typing.Callable
    needs_own_server: bool = False
    needs_tokio_client: bool = False
    needs_web_client: bool = False
    needs_loadtest: bool = False
    needs_nginx: bool = False


class Stage:
    """The accounts and bots of one scenario."""

    def __init__(self, server, tag):
        self.server, self.tag, self.bots = server, tag, []

    def bot(self, library, name, resource=None, password=PASSWORD):
        bot = library(self.server, f"{name}-{self.tag}", password, resource)
        self.bots.append(bot)
        return bot

    async def online(self, library, name, resource=None, direct_tls=False, register=True):
        """A bot that is logged in and available."""
        bot = self.bot(library, name, resource)
        await bot.log_in(direct_tls=direct_tls, register=register)
        await bot.come_online()
        return bot

    async def leave(self):
        for bot in self.bots:
            try:
                async with asyncio.timeout(5):
                    await bot.log_out()
            except Exception:  # it may be gone already; the scenario has its verdict
                pass


def scenario(*, each=False, pairs=False, own=False, tokio=False, web=False, loadtest=False, nginx=False):
    """One play, or one for each library, or for each pair of them.

    `own`: only on a server that we started; `tokio`: only if there is the program of tests/bots/tokio-client; `web`: only if there
    is tests/bots/web with its libraries; `loadtest`: only if there is the load generator; `nginx`: only if there
    is nginx.
    """

    def declare(function):
        name = function.__name__.replace("_", " ")
        if each:
            for library in LIBRARIES:
                SCENARIOS.append(Scenario(f"{name} [{library.library}]", bound(function, library), own))
        elif pairs:
            for one, other in itertools.product(LIBRARIES, LIBRARIES):
                title = f"{name} [{one.library} to {other.library}]"
                SCENARIOS.append(Scenario(title, bound(function, one, other), own))
        else:
            SCENARIOS.append(Scenario(name, function, own, tokio, web, loadtest, nginx))
        return function

    return declare


def bound(function, *libraries):
    return lambda stage: function(stage, *libraries)


def all_of_them(server):
    return [
        one for one in SCENARIOS
        if (server.own or not one.needs_own_server) and (TOKIO_CLIENT or not one.needs_tokio_client)
        and (WEB_CLIENT or not one.needs_web_client) and (LOADTEST or not one.needs_loadtest)
        and (NGINX or not one.needs_nginx)
    ]


async def befriend(alice, bob):
    """Both see each other's presence."""
    for one, other in ((alice, bob), (bob, alice)):
        one.subscribe(other.jid)
        await other.wait(Presence, sender=one.jid, kind="subscribe")
        other.approve(one.jid)
        await one.wait(Presence, sender=other.full, kind="available")
    for one, other in ((alice, bob), (bob, alice)):
        await one.wait(Push, jid=other.jid, subscription="both")


@scenario(each=True)
async def registers_and_logs_in_by_starttls(stage, library):
    bot = await stage.online(library, "alice")
    assert bot.tls_version == "TLSv1.3", bot.tls_version


@scenario(each=True)
async def logs_in_by_direct_tls(stage, library):
    bot = await stage.online(library, "alice", direct_tls=True)
    assert bot.tls_version == "TLSv1.3", bot.tls_version


@scenario(each=True)
async def wrong_password_is_refused(stage, library):
    bot = await stage.online(library, "alice")
    await bot.log_out()
    wrong = stage.bot(library, "alice", password="wrong")
    try:
        await wrong.log_in()
    except Refused:
        return
    raise AssertionError("a wrong password logged in")


@scenario(pairs=True)
async def chats_both_ways(stage, one, other):
    alice = await stage.online(one, "alice")
    bob = await stage.online(other, "bob", direct_tls=True)
    texts = ["hello", "<&>\"'", "grüße, 価格, 🙂", "x" * 5000]
    for text in texts:
        alice.chat(bob.full, text)
    assert await bob.bodies(len(texts)) == texts
    for text in texts:
        bob.chat(alice.jid, text)
    assert await alice.bodies(len(texts)) == texts


@scenario(pairs=True)
async def many_messages_keep_their_order(stage, one, other):
    alice = await stage.online(one, "alice")
    bob = await stage.online(other, "bob")
    texts = [str(number) for number in range(500)]
    for text in texts:
        alice.chat(bob.full, text)
    assert await bob.bodies(len(texts)) == texts
    await bob.settled()
    assert bob.bodies_now() == []


@scenario(pairs=True)
async def roster_and_subscriptions(stage, one, other):
    alice = await stage.online(one, "alice")
    bob = await stage.online(other, "bob")
    await alice.add_contact(bob.jid, "Bob", "Desk")
    await alice.wait(Push, jid=bob.jid, subscription="none")
    await befriend(alice, bob)
    assert (await alice.roster())[bob.jid] == ("Bob", "both"), await alice.roster()
    bob.set_presence("dnd")
    await alice.wait(Presence, sender=bob.full, show="dnd")
    # A second log-in sees the contact, too.
    phone = await stage.online(one, "alice", resource="phone", register=False)
    await phone.wait(Presence, sender=bob.full, show="dnd")
    assert (await phone.roster())[bob.jid] == ("Bob", "both")
    await bob.wait(Presence, sender=phone.full, kind="available")
    await phone.log_out()
    await bob.wait(Presence, sender=phone.full, kind="unavailable")
    await alice.remove_contact(bob.jid)
    await alice.wait(Push, jid=bob.jid, subscription="remove")
    await bob.wait(Presence, sender=alice.jid, kind="unsubscribed")
    await bob.wait(Push, jid=alice.jid, subscription="none")
    assert bob.jid not in await alice.roster()


@scenario(pairs=True)
async def offline_messages_wait(stage, one, other):
    alice = await stage.online(one, "alice")
    bob = await stage.online(other, "bob")
    await bob.log_out()
    for text in ("one", "two", "three"):
        alice.chat(bob.jid, text)
    await alice.settled()
    later = await stage.online(other, "bob", register=False)
    for text in ("one", "two", "three"):
        message = await later.wait(Message)
        assert (message.body, message.delayed) == (text, True), message
    await later.settled()
    assert later.bodies_now() == []


@scenario(pairs=True)
async def carbons_copy_both_sides(stage, one, other):
    desk = await stage.online(one, "alice", resource="desk")
    phone = await stage.online(other, "alice", resource="phone", register=False)
    bob = await stage.online(other, "bob")
    await phone.enable_carbons()
    bob.chat(desk.full, "to the desk")
    assert (await desk.bodies(1)) == ["to the desk"]
    copy = await phone.wait(Message, carbon="received")
    assert (copy.sender, copy.body) == (bob.full, "to the desk")
    desk.chat(bob.full, "from the desk")
    assert (await bob.bodies(1)) == ["from the desk"]
    copy = await phone.wait(Message, carbon="sent")
    assert (copy.sender, copy.body) == (desk.full, "from the desk")


@scenario(pairs=True)
async def blocking_and_unblocking(stage, one, other):
    alice = await stage.online(one, "alice")
    bob = await stage.online(other, "bob")
    await befriend(alice, bob)
    await alice.block(bob.jid)
    await bob.wait(Presence, sender=alice.full, kind="unavailable")
    bob.chat(alice.jid, "are you there?")
    await bob.wait(Message, body="error: service-unavailable")
    await alice.settled()
    assert alice.bodies_now() == []
    assert await alice.block_list() == {bob.jid}
    await alice.unblock(bob.jid)
    await bob.wait(Presence, sender=alice.full, kind="available")
    bob.chat(alice.jid, "and now?")
    assert await alice.bodies(1) == ["and now?"]
    assert await alice.block_list() == set()


@scenario(pairs=True)
async def cut_connection_resumes_without_loss(stage, one, other):
    alice = await stage.online(one, "alice")
    bob = await stage.online(other, "bob")
    await befriend(alice, bob)
    sent, answered = [], []
    for turn in range(3):
        # Alice writes, and her connection breaks at once: what has arrived and what not, nobody knows.
        for number in range(20):
            sent.append(f"{turn}/{number}")
            alice.chat(bob.full, sent[-1])
        await alice.all_written()
        for number in range(10):
            answered.append(f"before {turn}/{number}")
            bob.chat(alice.full, answered[-1])
        await alice.cut()
        for number in range(10):
            answered.append(f"while away {turn}/{number}")
            bob.chat(alice.full, answered[-1])
        await bob.settled()
        await alice.mend()
        for number in range(10):
            answered.append(f"after {turn}/{number}")
            bob.chat(alice.full, answered[-1])
    same(await bob.bodies(len(sent)), sent)
    same(await alice.bodies(len(answered)), answered)
    await alice.settled()
    await bob.settled()
    assert (alice.bodies_now(), bob.bodies_now()) == ([], [])
    # Bob has not seen her go.
    gone = Presence(alice.full, "unavailable")
    assert gone not in bob.inbox, bob.inbox


def same(got, wanted):
    """Equal lists; the error shows where they part."""
    for place, (one, other) in enumerate(zip(got, wanted)):
        assert one == other, f"at {place}: {got[place:place + 5]} instead of {wanted[place:place + 5]}"
    assert len(got) == len(wanted)


@scenario(each=True)
async def asks_the_server(stage, library):
    alice = await stage.online(library, "alice")
    await alice.ping("localhost")
    await alice.ping(alice.jid)
    assert await alice.version()
    assert await alice.time()
    assert await alice.last_activity("localhost") >= 0
    features = await alice.features("localhost")
    wanted = {
        "http://jabber.org/protocol/disco#info", "jabber:iq:register", "jabber:iq:version", "urn:xmpp:blocking",
        "urn:xmpp:carbons:2", "urn:xmpp:ping", "urn:xmpp:time", "vcard-temp", "jabber:iq:last", "jabber:iq:private",
    }
    assert wanted <= features, wanted - features
    try:
        await alice.ping(f"nobody-{stage.tag}@localhost/x")
    except Refused as refused:
        assert str(refused) == "service-unavailable", refused
    else:
        raise AssertionError("nobody answered a ping")


@scenario(pairs=True)
async def vcard_and_private_storage(stage, one, other):
    alice = await stage.online(one, "alice")
    bob = await stage.online(other, "bob")
    await alice.set_vcard("Alice & Co")
    assert await alice.vcard(alice.jid) == "Alice & Co"
    assert await bob.vcard(alice.jid) == "Alice & Co"
    await alice.set_private("mine <only>")
    assert await alice.private() == "mine <only>"
    assert not await bob.private()


@scenario()
async def archive_is_read_page_by_page(stage):
    # aioxmpp knows no archives
    alice = await stage.online(SlixBot, "alice")
    bob = await stage.online(AioBot, "bob")
    bodies = [f"message {n}" for n in range(25)]
    for body in bodies:
        alice.chat(bob.full, body)
    await bob.bodies(len(bodies))
    bob.chat(alice.full, "enough")
    await alice.bodies(1)
    bodies.append("enough")
    for partner in (None, bob.jid, bob.full):
        assert await alice.archive(partner, page=7) == bodies, partner
        assert await alice.archive(partner, page=7, reverse=True) == bodies[::-1], partner
    assert await alice.archive(f"nobody-{stage.tag}@localhost") == []
    assert {"with", "start", "end", "before-id", "after-id", "ids"} <= await alice.archive_fields()
    first, last = await alice.archive_ends()
    assert first and last and first != last


@scenario()
async def retracted_message_is_a_tombstone_in_both_archives(stage):
    alice = await stage.online(SlixBot, "alice")
    bob = await stage.online(SlixBot, "bob")
    wrong = alice.chat_with_id(bob.full, "to the wrong one")
    alice.chat(bob.full, "to the right one")
    await bob.bodies(2)
    # who has not sent it cannot do that
    bob.retract(alice.full, wrong)
    await alice.bodies(1)
    by = alice.retract(bob.full, wrong)
    await bob.bodies(1)
    for bot in (alice, bob):
        shown = await bot.archive()
        assert shown[:2] == [("retracted", by), "to the right one"], shown
        assert len(shown) == 4, shown


@scenario()
async def archiving_goes_by_preferences(stage):
    alice = await stage.online(SlixBot, "alice")
    bob = await stage.online(SlixBot, "bob")
    assert await alice.archive_preferences() == ("always", set())
    wanted = ("always", {bob.jid})
    assert await alice.archive_preferences("always", never=[bob.jid]) == wanted
    bob.chat(alice.full, "not for Alice's archive")
    await alice.bodies(1)
    assert await alice.archive() == []
    assert await bob.archive() == ["not for Alice's archive"]


NICK = "http://jabber.org/protocol/nick"
METADATA = "urn:xmpp:avatar:metadata"
IMAGE = bytes(range(256)) * 40


async def eventing(stage, library, name, *watched, resource=None, register=True):
    """A bot that is on line, publishes and wants to hear of these nodes."""
    bot = stage.bot(library, name, resource)
    bot.eventing = True
    await bot.log_in(register=register)
    await bot.watch(*watched)
    await bot.come_online()
    return bot


@scenario(pairs=True)
async def nicknames_are_told_to_contacts(stage, one, other):
    alice = await eventing(stage, one, "alice", NICK)
    bob = await eventing(stage, other, "bob", NICK)
    await alice.publish_nick("Ishmael")
    await alice.wait(Event, sender=alice.jid, node=NICK, text="Ishmael")
    # who becomes a contact hears what there is
    await befriend(alice, bob)
    await bob.wait(Event, sender=alice.jid, node=NICK, text="Ishmael")
    await alice.publish_nick("Ahab")
    await bob.wait(Event, sender=alice.jid, node=NICK, text="Ahab")
    assert await bob.nick(alice.jid) == "Ahab"
    # and who comes on line again, though Alice is gone
    await alice.log_out()
    phone = await eventing(stage, other, "bob", NICK, resource="phone", register=False)
    await phone.wait(Event, sender=alice.jid, node=NICK, text="Ahab")


@scenario(pairs=True)
async def avatars_are_published_and_fetched(stage, one, other):
    alice = await eventing(stage, one, "alice")
    bob = await eventing(stage, other, "bob", METADATA)
    await befriend(alice, bob)
    await alice.publish_avatar(IMAGE)
    event = await bob.wait(Event, sender=alice.jid, node=METADATA)
    assert event.item == hashlib.sha1(IMAGE).hexdigest(), event
    assert await bob.avatar(alice.jid) == IMAGE
    assert await bob.photo(alice.jid) == IMAGE


@scenario()
async def bookmarks_of_old_and_new_clients_are_the_same(stage):
    new = await eventing(stage, SlixBot, "alice", "urn:xmpp:bookmarks:1")
    old = await eventing(stage, AioBot, "alice", resource="old", register=False)
    await old.add_bookmark("fx@rooms.localhost", "FX")
    await new.wait(Event, node="urn:xmpp:bookmarks:1", item="fx@rooms.localhost")
    assert await new.bookmarks() == {"fx@rooms.localhost": "FX"}
    await new.add_bookmark("rates@rooms.localhost", "Rates")
    wanted = {"fx@rooms.localhost": "FX", "rates@rooms.localhost": "Rates"}
    assert await old.bookmarks() == await new.bookmarks() == wanted


@scenario()
async def device_lists_are_read_by_strangers(stage):
    alice = await eventing(stage, SlixBot, "alice")
    stranger = await eventing(stage, SlixBot, "stranger")
    node = "eu.siacs.conversations.axolotl.devicelist"
    devices = "<list xmlns='eu.siacs.conversations.axolotl'><device id='12345'/></list>"
    await alice.publish_devices(node, devices, "open")
    assert "12345" in (await stranger.items(alice.jid, node))[0]
    try:
        await alice.publish_devices(node, devices, "whitelist")
    except Refused as refused:
        assert str(refused) == "conflict", refused
    else:
        raise AssertionError("a node that everybody reads took what was to be private")


@scenario()
async def vcard4_and_vcard_temp_say_the_same(stage):
    alice = await eventing(stage, SlixBot, "alice")
    await alice.publish_vcard4("Alice & Co")
    assert await alice.vcard(alice.jid) == "Alice & Co"
    await alice.set_vcard("Alice")
    assert "Alice<" in (await alice.items(alice.jid, "urn:xmpp:vcard4"))[0]


@scenario(pairs=True)
async def last_activity_of_a_contact(stage, one, other):
    alice = await stage.online(one, "alice")
    bob = await stage.online(other, "bob")
    await befriend(alice, bob)
    await bob.log_out()
    await alice.wait(Presence, sender=bob.full, kind="unavailable")
    assert await alice.last_activity(bob.jid) >= 0


@scenario(each=True)
async def password_change_and_cancellation(stage, library):
    alice = await stage.online(library, "alice")
    await alice.change_password("another one")
    await alice.log_out()
    old = stage.bot(library, "alice")
    try:
        await old.log_in()
    except Refused:
        pass
    else:
        raise AssertionError("the old password still logs in")
    new = stage.bot(library, "alice", password="another one")
    await new.log_in()
    await new.unregister()
    gone = stage.bot(library, "alice", password="another one")
    try:
        await gone.log_in()
    except Refused:
        return
    raise AssertionError("a cancelled account still logs in")


@scenario(pairs=True)
async def same_resource_twice_is_a_conflict(stage, one, other):
    older = await stage.online(one, "alice", resource="desk")
    older.gives_up()
    newer = await stage.online(other, "alice", resource="desk", register=False)
    await older.wait(StreamEnd, condition="conflict")
    newer.chat(newer.full, "still here")
    assert await newer.bodies(1) == ["still here"]


@scenario(each=True, own=True)
async def account_made_by_command(stage, library):
    """`nitro user` on the running server: add, log in, passwd, list, disable, enable, kick, remove."""
    name = f"clerk-{stage.tag}"
    command = stage.server.command
    command("user", "add", f"{name}@localhost", "--password-stdin", text=PASSWORD + "\n")
    assert name in command("user", "list")
    assert name in command("user", "show", f"{name}@localhost")
    clerk = stage.bot(library, "clerk")
    await clerk.log_in()
    await clerk.come_online()
    assert f"{name}@localhost" in command("session", "list")
    clerk.gives_up()
    command("session", "kick", clerk.full)
    await clerk.wait(StreamEnd)
    command("user", "passwd", f"{name}@localhost", "--password-stdin", text="changed\n")
    await expect_refusal(stage.bot(library, "clerk"))
    await stage.bot(library, "clerk", password="changed").log_in()
    command("user", "disable", f"{name}@localhost")
    await expect_refusal(stage.bot(library, "clerk", password="changed"))
    command("user", "enable", f"{name}@localhost")
    await stage.bot(library, "clerk", password="changed").log_in()
    command("user", "remove", f"{name}@localhost")
    assert name not in command("user", "list")
    await expect_refusal(stage.bot(library, "clerk", password="changed"))


async def expect_refusal(bot):
    try:
        await bot.log_in()
    except Refused:
        return
    raise AssertionError(f"{bot.full} logged in")


@scenario(own=True)
async def a_certificate_logs_in_without_password(stage):
    """SASL EXTERNAL (XEP-0178) by STARTTLS and direct TLS."""
    with tempfile.TemporaryDirectory(prefix="nitro-bots-") as folder:
        authority = Authority(folder)
        blade = stage.server = Blade(stage.server.program, tls__client_ca=f'"{authority.path}"')
        try:
            for name in ("alice", "bob"):
                await stage.bot(SlixBot, name).log_in(register=True)
            for direct_tls in (False, True):
                alice = stage.bot(SlixBot, "alice", resource=f"by-certificate-{direct_tls}", password="wrong")
                alice.identity = authority.issue(alice.jid)
                await alice.log_in(direct_tls=direct_tls)
                await alice.come_online()
            # the certificate says who it is, not how the client is set up (slixmpp names no authorization identity)
            bob = stage.bot(SlixBot, "bob", password="wrong")
            bob.identity = authority.issue(alice.jid)
            await bob.log_in()
            assert bob.client.boundjid.bare == alice.jid, bob.client.boundjid
            # who has a certificate that says nothing logs in as ever
            bob = stage.bot(SlixBot, "bob", resource="by-password")
            bob.identity = authority.issue("bob@example.com")
            await bob.log_in()
        finally:
            await stage.leave()
            await asyncio.to_thread(blade.stop)


@scenario(each=True, own=True)
async def sigterm_tells_every_client(stage, library):
    """On a blade of its own: clients get system-shutdown, the process ends with 0, and the accounts are still there."""
    blade = stage.server = Blade(stage.server.program)
    try:
        bots = [await stage.online(library, f"user{number}") for number in range(3)]
        for bot in bots:
            bot.gives_up()
        blade.terminate()
        for bot in bots:
            await bot.wait(StreamEnd, condition="system-shutdown")
        code = await asyncio.to_thread(blade.ended)
        assert code == 0, f"exit status {code}:\n{blade.log()}"
        blade.start()
        again = await stage.online(library, "user0", register=False)
        await again.ping("localhost")
    finally:
        await asyncio.to_thread(blade.stop)


async def tokio_client(blade, transport, jid, password):
    """Runs the foreign client: exit status, what it printed."""
    port = blade.port if transport == "starttls" else blade.tls_port
    process = await asyncio.create_subprocess_exec(
        TOKIO_CLIENT, transport, f"{blade.host}:{port}", jid,
        env={**os.environ, "SSL_CERT_FILE": str(blade.certificate)},
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(password.encode()), 30)
    finally:
        if process.returncode is None:
            process.kill()
    return process.returncode, output.decode()


@scenario(own=True, tokio=True)
async def foreign_client_logs_in_with_channel_binding(stage):
    """tokio-xmpp on a blade that offers nothing but SCRAM with channel binding: it can only come in with tls-exporter."""
    for mechanism in ("SCRAM-SHA-256-PLUS", "SCRAM-SHA-1-PLUS"):
        blade = await asyncio.to_thread(Blade, stage.server.program, sasl__mechanisms=f'["{mechanism}"]')
        try:
            jid = f"bound-{stage.tag}@localhost"
            blade.command("user", "add", jid, "--password-stdin", text=PASSWORD + "\n")
            for transport in ("starttls", "direct"):
                status, output = await tokio_client(blade, transport, jid, PASSWORD)
                assert status == 0 and output.startswith(jid + "/"), f"{mechanism}, {transport}: {status}: {output}"
        finally:
            await asyncio.to_thread(blade.stop)


@scenario(own=True)
async def unsupported_binding_is_refused(stage):
    """A client that insists on a channel binding that is not there gets a failure at once, and may go on."""
    alice = await stage.online(SlixBot, "alice")
    context = ssl.create_default_context(cafile=stage.server.certificate)

    class Connection:
        """A connection of its own for each few attempts: their number is limited."""

        async def __aenter__(self):
            self.reader, self.writer = await asyncio.open_connection(
                stage.server.host, stage.server.tls_port, ssl=context, server_hostname="localhost")
            self.writer.write(
                b"<stream:stream to='localhost' version='1.0' xmlns='jabber:client' "
                b"xmlns:stream='http://etherx.jabber.org/streams'>")
            self.features = await self.until("</stream:features>")
            return self

        async def __aexit__(self, *_):
            self.writer.close()

        async def until(self, pattern):
            text = ""
            async with asyncio.timeout(10):
                while not re.search(pattern, text):
                    chunk = await self.reader.read(4096)
                    assert chunk, f"closed after: {text}"
                    text += chunk.decode()
            return text

        async def attempt(self, mechanism, header):
            first = base64.b64encode(f"{header},,n={alice.name},r=abcdefgh".encode()).decode()
            self.writer.write(
                f"<auth xmlns='urn:ietf:params:xml:ns:xmpp-sasl' mechanism='{mechanism}'>{first}</auth>".encode())
            return await self.until("</failure>|<failure[^>]*/>|</challenge>|</success>")

    for mechanism in ("SCRAM-SHA-256-PLUS", "SCRAM-SHA-1-PLUS"):
        async with Connection() as connection:
            for binding in ("tls-foo", "tls-unique"):  # TLS 1.3 has no tls-unique
                answer = await connection.attempt(mechanism, f"p={binding}")
                assert "<failure" in answer, f"{mechanism}, {binding}: {answer}"
            # The connection is still good for a client that gives in.
            answer = await connection.attempt("SCRAM-SHA-256", "n")
            assert "</challenge>" in answer, answer
    # "y": I know of channel binding and believe that you do not. If it was offered, somebody in between took it away.
    async with Connection() as connection:
        if "-PLUS<" in connection.features:
            answer = await connection.attempt("SCRAM-SHA-256", "y")
            assert "<failure" in answer, answer


@scenario(pairs=True)
async def people_talk_in_a_room(stage, one, other):
    alice = await stage.online(one, "alice")
    bob = await stage.online(other, "bob")
    room = f"desk-{stage.tag}@rooms.localhost"
    await alice.enter(room, "Alice")
    await alice.persist(room)
    assert "Alice" in await bob.enter(room, "Bob")
    alice.say(room, "hello")
    bob.say(room, "good morning")
    for bot in (alice, bob):
        await bot.wait(Message, sender=f"{room}/Alice", body="hello")
        await bot.wait(Message, sender=f"{room}/Bob", body="good morning")
    await bob.leave_room(room, "Bob")
    alice.say(room, "gone")
    await alice.wait(Message, body="gone")
    await bob.enter(room, "Robert")
    # what was said before comes again, marked as late
    await bob.wait(Message, sender=f"{room}/Alice", body="gone", delayed=True)
    await alice.put_out(room, "Robert")
    await alice.wait(Presence, sender=f"{room}/Robert", kind="unavailable")
    alice.say(room, "alone")
    await alice.wait(Message, body="alone")
    await bob.settled()
    assert "alone" not in bob.bodies_now()


@scenario()
async def invited_into_a_room_one_finds_its_archive_and_pings_oneself(stage):
    alice = await stage.online(SlixBot, "alice")
    bob = await stage.online(SlixBot, "bob")
    room = f"archive-{stage.tag}@rooms.localhost"
    await alice.enter(room, "Alice")
    await alice.persist(room)
    said = [f"number {n}" for n in range(25)]
    for text in said:
        alice.say(room, text)
        await alice.wait(Message, body=text)
    invitation = bob.happens("groupchat_direct_invite")
    alice.invite(bob.jid, room, "the morning call")
    assert await bob.invited(invitation) == (room, "the morning call")
    await bob.enter(room, "Bob")
    assert await bob.archive(of=room) == said
    assert await bob.is_in(f"{room}/Bob") == "JOINED"
    await bob.leave_room(room, "Bob")
    await bob.settled()
    assert await bob.is_in(f"{room}/Bob") != "JOINED"


@scenario(own=True)
async def foreign_component_serves_its_name(stage):
    """slixmpp's ComponentXMPP: chat, discovery, subscription and presence with users on two libraries, reconnect."""
    [port] = free_ports(1)
    secret = "open sesame & <more>"
    blade = await asyncio.to_thread(
        Blade, stage.server.program,
        component__listen=f'["127.0.0.1:{port}"]', component__hosts=f'{{ "echo.localhost" = "{secret}" }}')
    wrong = Echo("echo.localhost", "wrong", blade.host, port)
    echo = Echo("echo.localhost", secret, blade.host, port)
    users = Stage(blade, stage.tag)
    try:
        event, error = await wrong.happens("session_start", "stream_error")
        assert event == "stream_error" and error["condition"] == "not-authorized", (event, error)
        await wrong.leave()
        await echo.come()
        alice = await users.online(SlixBot, "alice")
        bob = await users.online(AioBot, "bob")
        for bot in (alice, bob):
            texts = ["hello", "<&>\"'", "grüße, 価格, 🙂", *(f"number {n}" for n in range(50))]
            for text in texts:
                bot.chat("any@echo.localhost/desk", text)
            assert await bot.bodies(len(texts)) == texts
            bot.subscribe("any@echo.localhost")
            await bot.wait(Presence, sender="any@echo.localhost/echo", kind="available")
            await bot.wait(Push, jid="any@echo.localhost", subscription="to")
        disco = alice.client["xep_0030"]
        info = await disco.get_info(jid="echo.localhost")
        assert ("client", "bot", None, "Echo") in info["disco_info"]["identities"], info
        items = await disco.get_items(jid="localhost")
        assert "echo.localhost" in [str(item[0]) for item in items["disco_items"]["items"]], items
        answer = await echo["xep_0030"].get_info(jid="localhost", ifrom="echo.localhost", local=False)
        assert "jabber:iq:version" in answer["disco_info"]["features"], answer
        await echo.leave()
        alice.chat("any@echo.localhost", "nobody there")
        await alice.wait(Message, sender="any@echo.localhost")
        echo = Echo("echo.localhost", secret, blade.host, port)
        await echo.come()
        alice.chat("any@echo.localhost", "back again")
        await alice.wait(Message, body="back again")
        assert "echo.localhost" in blade.command("component", "list")
    finally:
        await users.leave()
        await echo.leave()
        await asyncio.to_thread(blade.stop)


@scenario(own=True)
async def an_app_server_wakes_phones(stage):
    """XEP-0357 with slixmpp at both ends: told once, again after the phone was there, disabled by an error."""
    [port] = free_ports(1)
    blade = await asyncio.to_thread(
        Blade, stage.server.program, push__sender="true", push__body="true",
        component__listen=f'["127.0.0.1:{port}"]', component__hosts='{ "push.example" = "secret" }')
    server = AppServer("push.example", "secret", blade.host, port)
    users = Stage(blade, stage.tag)
    try:
        await server.come()
        alice = await users.online(AioBot, "alice")
        phone = await users.online(SlixBot, "phone")
        info = await phone.client["xep_0030"].get_info(jid=phone.jid)
        assert "urn:xmpp:push:0" in info["disco_info"]["features"], info
        await phone.enable_push("push.example", "yxs32", secret="eruio")
        await phone.log_out()
        await asyncio.to_thread(blade.wait_for_sessions, 1)
        alice.chat(phone.jid, "Wherefore art thou?")
        user, node, fields, options = await server.wait()
        assert (user, node, options["secret"]) == (phone.jid, "yxs32", "eruio"), (user, node, options)
        assert fields["message-count"] == "1" and fields["last-message-body"] == "Wherefore art thou?", fields
        assert fields["last-message-sender"] == alice.full, fields
        alice.chat(phone.jid, "Romeo?")
        await alice.settled()
        assert server.told.empty()
        phone = await users.online(SlixBot, "phone", register=False)
        assert await phone.bodies(2) == ["Wherefore art thou?", "Romeo?"]
        await phone.log_out()
        await asyncio.to_thread(blade.wait_for_sessions, 1)
        server.error = "item-not-found"
        alice.chat(phone.jid, "once more")
        assert (await server.wait())[2]["message-count"] == "1"
        phone = await users.online(SlixBot, "phone", register=False)
        assert await phone.bodies(1) == ["once more"]
        await phone.log_out()
        await asyncio.to_thread(blade.wait_for_sessions, 1)
        alice.chat(phone.jid, "nobody is told")
        await alice.settled()
        assert server.told.empty()
    finally:
        await users.leave()
        await server.leave()
        await asyncio.to_thread(blade.stop)


@scenario(own=True)
async def a_picture_goes_up_and_comes_down(stage):
    """slixmpp's own XEP-0363, over its own HTTP client and TLS: discovery, upload, download by somebody else, too large."""
    [port] = free_ports(1)
    blade = await asyncio.to_thread(
        Blade, stage.server.program, web__listen_tls=f'["127.0.0.1:{port}"]', upload__file_bytes_max="100_000")
    users = Stage(blade, stage.tag)
    try:
        alice = await users.online(SlixBot, "alice")
        bob = await users.online(AioBot, "bob")
        picture = os.urandom(65_000)
        url = await alice.upload("my picture.png", picture, "image/png")
        assert url.startswith(f"https://localhost:{port}/upload/") and url.endswith("/my%20picture.png"), url
        alice.chat(bob.jid, url)
        [body] = await bob.bodies(1)
        status, headers, got = await alice.download(body)
        assert (status, headers["content-type"], got == picture) == (200, "image/png", True), (status, headers)
        status, headers, got = await alice.download(body, {"Range": "bytes=1000-1999"})
        assert (status, got) == (206, picture[1000:2000]), (status, headers)
        try:
            await alice.upload("large.png", bytes(100_001), "image/png")
        except Refused as refused:
            assert str(refused) == "too large for 100000", refused
        else:
            raise AssertionError("too large a file was taken")
        assert (await alice.download(body.replace("upload/", "upload/0")))[0] == 404
    finally:
        await users.leave()
        await asyncio.to_thread(blade.stop)


@scenario(own=True)
async def groups_are_in_every_members_roster(stage):
    """An administrator's group with members on two libraries; a reload while they are on line."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "groups.csv"
        names = [f"{name}-{stage.tag}" for name in ("alice", "bob", "carol")]
        rows = [f"Desk,{name},The {name}" for name in names]
        file.write_text("\n".join(["group,username,name", *rows[:2]]) + "\n")
        blade = await asyncio.to_thread(Blade, stage.server.program, groups__file=f'"{file}"')
        users = Stage(blade, stage.tag)
        try:
            alice = await users.online(SlixBot, "alice")
            bob = await users.online(AioBot, "bob")
            await alice.wait(Presence, sender=bob.full, kind="available")
            await bob.wait(Presence, sender=alice.full, kind="available")
            item = alice.client.client_roster[bob.jid]
            assert (item["subscription"], item["name"], item["groups"]) == ("both", f"The {names[1]}", ["Desk"])
            carol = await users.online(SlixBot, "carol")
            file.write_text("\n".join(["group,username,name", *rows]) + "\n")
            assert "3 members" in blade.command("group", "reload")
            for bot in (alice, bob):
                await bot.wait(Push, jid=carol.jid, subscription="both")
                await bot.wait(Presence, sender=carol.full, kind="available")
                await carol.wait(Push, jid=bot.jid, subscription="both")
                await carol.wait(Presence, sender=bot.full, kind="available")
            file.write_text("\n".join(["group,username,name", *rows[1:]]) + "\n")
            blade.command("group", "reload")
            for bot in (bob, carol):
                await bot.wait(Push, jid=alice.jid, subscription="remove")
                await bot.wait(Presence, sender=alice.full, kind="unavailable")
        finally:
            await users.leave()
            await asyncio.to_thread(blade.stop)


async def page_chats(blade, library, url, page, desk):
    """A page's client signs in twice, and is answered by `desk` each time."""
    process = await asyncio.create_subprocess_exec(
        "node", WEB_CLIENT, library, url, f"{page.jid}/page", PASSWORD, desk.full,
        env={**os.environ, "NODE_EXTRA_CA_CERTS": str(blade.certificate)},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )
    try:
        for text in ("first", "again"):
            heard = await desk.wait(Message, carbon="")
            assert heard.body == text, (library, url, heard)
            # with XEP-0386 the server makes the resource
            desk.chat(heard.sender, f"answer to {text}")
        output, _ = await asyncio.wait_for(process.communicate(), 30)
    except AssertionError as error:
        if process.returncode is None:
            process.kill()
        output, _ = await process.communicate()
        raise AssertionError(f"{library} at {url}: {error}; it says: {output.decode()}") from None
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, (library, url, output.decode())


def nginx_in_front(blade, folder, port, plain):
    """nginx with config/nginx.conf, but for its port, names and files."""
    text = NGINX_CONF.read_text()
    for example, here in (
        ("server 127.0.0.1:5281;", f"server 127.0.0.1:{plain};"),
        ("listen 443 ssl;", f"listen 127.0.0.1:{port} ssl;"),
        ("listen [::]:443 ssl;", ""),
        ("server_name chat.example.com;", "server_name localhost;"),
        ("/etc/ssl/chat.example.com.pem", str(blade.certificate)),
        ("/etc/ssl/private/chat.example.com.key", str(blade.certificate.with_name("key.pem"))),
    ):
        assert text.count(example) == 1, example
        text = text.replace(example, here)
    # what a distribution's nginx.conf has around it
    temporary = "".join(f"{name}_temp_path {folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    user = "user root;\n" if os.getuid() == 0 else ""
    conf = pathlib.Path(folder) / "nginx.conf"
    conf.write_text(
        f"{user}daemon off;\nworker_processes 1;\npid {folder}/pid;\nerror_log stderr;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{temporary}{text}}}\n")
    return subprocess.Popen([NGINX, "-p", folder, "-c", str(conf), "-e", "stderr"], stderr=subprocess.PIPE, text=True)


def listens(process, port):
    """Until somebody can connect."""
    deadline = time.monotonic() + 20
    while True:
        assert process.poll() is None, process.communicate()[1]
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)  # the poll's interval; the bound is the deadline


@scenario(own=True, web=True, nginx=True)
async def all_of_the_web_comes_through_nginx(stage):
    """config/nginx.conf in front: WebSocket, BOSH, host-meta and an upload, all with TLS at nginx alone."""
    plain, port = free_ports(2)
    blade = await asyncio.to_thread(
        Blade, stage.server.program, web__listen=f'["127.0.0.1:{plain}"]', web__proxies='["127.0.0.1/32"]',
        web__websocket_url=f'"wss://localhost:{port}/ws"', upload__url=f'"https://localhost:{port}"')
    with tempfile.TemporaryDirectory(prefix="nitro-nginx-") as folder:
        nginx = nginx_in_front(blade, folder, port, plain)
        users = Stage(blade, stage.tag)
        try:
            desk = await users.online(SlixBot, "desk")
            page = await users.online(SlixBot, "page")
            picture = os.urandom(1_000_000)
            await asyncio.to_thread(listens, nginx, port)
            url = await desk.upload("a.png", picture, "image/png")
            assert url.startswith(f"https://localhost:{port}/upload/"), url
            status, _, got = await page.download(url)
            assert (status, got == picture) == (200, True), status
            status, _, got = await page.download(f"https://localhost:{port}/.well-known/host-meta.json")
            assert (status, b"wss://localhost" in got) == (200, True), (status, got)
            # only what is for clients goes on
            assert (await page.download(f"https://localhost:{port}/metrics"))[0] == 404
            await page.log_out()
            for library, url in (
                ("xmpp.js", f"wss://localhost:{port}/ws"),
                ("strophe", f"wss://localhost:{port}/ws"),
                ("strophe", f"https://localhost:{port}/bosh"),
            ):
                await page_chats(blade, library, url, page, desk)
        finally:
            await users.leave()
            nginx.terminate()
            nginx.communicate(timeout=20)
            await asyncio.to_thread(blade.stop)


@scenario(own=True, web=True)
async def web_clients_chat_over_every_transport_and_come_back(stage):
    """@xmpp/client and strophe.js, each signing in twice: the first one resumes its session after a cut."""
    tls, plain = free_ports(2)
    blade = await asyncio.to_thread(
        Blade, stage.server.program, web__listen_tls=f'["127.0.0.1:{tls}"]', web__listen=f'["127.0.0.1:{plain}"]',
        web__proxies='["127.0.0.0/8"]', c2s__require_tls="false")
    try:
        stage.server, desk = blade, None
        desk = await stage.online(SlixBot, "desk")
        page = await stage.online(SlixBot, "page")
        await page.log_out()
        for library, url in (
            ("xmpp.js", f"wss://localhost:{tls}/ws"),
            ("xmpp.js", f"ws://127.0.0.1:{plain}/ws"),
            ("strophe", f"wss://localhost:{tls}/ws"),
            ("strophe", f"ws://127.0.0.1:{plain}/ws"),
            ("strophe", f"http://127.0.0.1:{plain}/bosh"),
        ):
            await page_chats(blade, library, url, page, desk)
        await stage.leave()
        stage.bots.clear()
    finally:
        await asyncio.to_thread(blade.stop)


async def program(blade, *command, within_s=60):
    """Runs a foreign client that trusts the blade's certificate, to its end; what it printed."""
    process = await asyncio.create_subprocess_exec(
        *command, env={**os.environ, "NODE_EXTRA_CA_CERTS": str(blade.certificate)},
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
    try:
        output, _ = await asyncio.wait_for(process.communicate(), within_s)
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, (command, process.returncode, output.decode())
    return output.decode()


@scenario(own=True, web=True)
async def a_client_logs_in_by_token_in_one_round_trip(stage):
    """@xmpp/client's own SASL2, Bind 2 and FAST, over STARTTLS and over WebSocket: with the password, then with the token."""
    [port] = free_ports(1)
    blade = await asyncio.to_thread(Blade, stage.server.program, web__listen_tls=f'["127.0.0.1:{port}"]')
    try:
        for name, url in (("tcp", f"xmpp://localhost:{blade.port}"), ("page", f"wss://localhost:{port}/ws")):
            blade.command("user", "add", name, "--password-stdin", text=PASSWORD + "\n")
            login = pathlib.Path(WEB_CLIENT).with_name("login.mjs")
            said = await program(blade, "node", str(login), url, name, PASSWORD)
            assert said.startswith(f"ok: {name}@localhost/"), said
    finally:
        await asyncio.to_thread(blade.stop)


@scenario(own=True, loadtest=True)
async def the_load_generator_comes_by_websocket_within_tls(stage):
    """As pages come: accounts are made, people chat, log in by token, are cut and come back; nothing is lost."""
    [port] = free_ports(1)
    blade = await asyncio.to_thread(
        Blade, stage.server.program, web__listen_tls=f'["127.0.0.1:{port}"]', sasl__iterations="4096")
    by = ["--port", str(port), "--tls", "direct", "--websocket=/ws", "--json", "-", "-n", "8", "--parallel", "4"]
    try:
        await program(blade, LOADTEST, "register", *by)
        chat = ["--rate", "100", "--duration", "1", "--warmup", "0", "--drain", "2"]
        told = json.loads(await program(blade, LOADTEST, "chat", *by, *chat))
        assert told["sent"] > 50 and told["lost"] == 0, told
        for login in ("old", "sasl2", "fast"):
            told = json.loads(await program(blade, LOADTEST, "storm", *by, "--rounds", "2", "--login", login))
            assert told["failed"] == 0, (login, told)
        told = json.loads(await program(blade, LOADTEST, "reconnect", *by, "--online", "0", "--gap", "0.1"))
        assert told["resumed"] == 8, told
    finally:
        await asyncio.to_thread(blade.stop)


@scenario()
async def nobody_is_woken_by_presence_while_he_is_inactive(stage):
    """XEP-0352 with slixmpp: of what contacts did meanwhile only the last comes, before the message that wakes him."""
    alice, bob = await stage.online(SlixBot, "alice"), await stage.online(SlixBot, "bob")
    await befriend(alice, bob)
    alice.client["xep_0352"].send_inactive()
    alice.chat(bob.jid, "I sleep")
    await bob.wait(Message, body="I sleep")
    alice.inbox.clear()
    for show in ("away", "xa", "dnd"):
        bob.set_presence(show)
    bob.chat(alice.full, "wake up")
    await alice.wait(Message, body="wake up")
    assert [event.show for event in alice.inbox if isinstance(event, Presence)] == ["dnd"], alice.inbox
    alice.client["xep_0352"].send_active()
    alice.chat(bob.jid, "I am here")
    await bob.wait(Message, body="I am here")
    alice.inbox.clear()
    for show in ("away", "xa"):
        bob.set_presence(show)
    await alice.wait(Presence, sender=bob.full, show="away")
    await alice.wait(Presence, sender=bob.full, show="xa")


@scenario(own=True, web=True)
async def a_page_finds_its_doors(stage):
    """@xmpp/resolve reads host-meta (XEP-0156), and @xmpp/client comes in by what it says."""
    [port] = free_ports(1)
    blade = await asyncio.to_thread(Blade, stage.server.program, web__listen_tls=f'["127.0.0.1:{port}"]')
    try:
        blade.command("user", "add", "page", "--password-stdin", text=PASSWORD + "\n")
        find = pathlib.Path(WEB_CLIENT).with_name("find.mjs")
        said = await program(blade, "node", str(find), f"localhost:{port}", "localhost", "page", PASSWORD)
        assert said.split() == [f"wss://localhost:{port}/ws", f"https://localhost:{port}/bosh"], said
    finally:
        await asyncio.to_thread(blade.stop)
