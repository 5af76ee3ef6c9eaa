"""Components (XEP-0114) on slixmpp: one answers every chat message with the same text, one is the app server of phones."""

import asyncio

import slixmpp
from slixmpp.xmlstream.handler import Callback
from slixmpp.xmlstream.matcher import StanzaPath

from bot import WAIT_S


class Echo(slixmpp.ComponentXMPP):
    def __init__(self, host, secret, address, port):
        super().__init__(host, secret, address, port)
        self.address, self.port = address, port
        self.seen = []
        for plugin in ("xep_0030", "xep_0199"):
            self.register_plugin(plugin)
        self["xep_0030"].add_identity(category="client", itype="bot", name="Echo")
        self.add_event_handler("message", self.on_message)
        self.add_event_handler("presence_subscribe", self.on_subscribe)
        self.add_event_handler("presence_probe", self.on_probe)
        self.auto_authorize = self.auto_subscribe = None

    def on_message(self, message):
        self.seen.append(message["body"])
        if message["type"] == "chat":
            message.reply(message["body"]).send()

    def on_subscribe(self, presence):
        own, user = presence["to"].bare, presence["from"].bare
        self.send_presence_subscription(pto=user, pfrom=own, ptype="subscribed")
        self.send_presence(pto=user, pfrom=f"{own}/echo", pstatus="echoing")

    def on_probe(self, presence):
        self.send_presence(pto=presence["from"], pfrom=f"{presence['to'].bare}/echo", pstatus="echoing")

    async def happens(self, *events):
        """Connects; which of the events came first."""
        future = asyncio.get_running_loop().create_future()
        for event in events:
            self.add_event_handler(
                event, lambda data, event=event: None if future.done() else future.set_result((event, data)),
                disposable=True)
        self.connect(self.address, self.port)
        return await asyncio.wait_for(future, WAIT_S)

    async def come(self):
        event, _ = await self.happens("session_start", "stream_error")
        assert event == "session_start", event

    async def leave(self):
        await asyncio.wait_for(self.disconnect(), WAIT_S)


class AppServer(slixmpp.ComponentXMPP):
    """Takes push notifications (XEP-0357), and tells them to the phones by `wait`."""

    def __init__(self, host, secret, address, port):
        super().__init__(host, secret, address, port)
        self.address, self.port = address, port
        self.told = asyncio.Queue()
        for plugin in ("xep_0004", "xep_0030", "xep_0060"):
            self.register_plugin(plugin)
        self["xep_0030"].add_identity(category="pubsub", itype="push")
        self.register_handler(Callback(
            "push", StanzaPath("iq@type=set/pubsub/publish"), lambda iq: self.on_publish(iq)))
        self.error = None

    def on_publish(self, iq):
        publish = iq.xml.find("{*}pubsub/{*}publish")
        fields = {
            field.get("var"): field.findtext("{jabber:x:data}value")
            for field in publish.iterfind(".//{urn:xmpp:push:0}notification/{jabber:x:data}x/{jabber:x:data}field")}
        options = {
            field.get("var"): field.findtext("{jabber:x:data}value")
            for field in iq.xml.iterfind("{*}pubsub/{*}publish-options/{jabber:x:data}x/{jabber:x:data}field")}
        self.told.put_nowait((iq["from"].full, publish.get("node"), fields, options))
        if self.error:
            reply = iq.reply()
            reply["type"] = "error"
            reply["error"]["type"], reply["error"]["condition"] = "cancel", self.error
            reply.send()
        else:
            iq.reply().send()

    async def wait(self):
        return await asyncio.wait_for(self.told.get(), WAIT_S)

    async def come(self):
        ready = asyncio.get_running_loop().create_future()
        self.add_event_handler("session_start", lambda _: ready.set_result(None), disposable=True)
        self.connect(self.address, self.port)
        await asyncio.wait_for(ready, WAIT_S)

    async def leave(self):
        await asyncio.wait_for(self.disconnect(), WAIT_S)
