"""A component (XEP-0114) on slixmpp: answers every chat message with the same text, and is available to whoever asks."""

import asyncio

import slixmpp

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
