"""What a scenario may ask of a bot, whatever library stands behind it."""

import asyncio
import dataclasses

WAIT_S = 15


@dataclasses.dataclass
class Message:
    sender: str
    body: str
    delayed: bool = False
    carbon: str = ""  # "sent" or "received"


@dataclasses.dataclass
class Presence:
    sender: str
    kind: str  # "available", "unavailable", "subscribe", ...
    show: str = ""


@dataclasses.dataclass
class Push:
    """A roster item as the server pushed it."""

    jid: str
    subscription: str


@dataclasses.dataclass
class Event:
    """A notification of a node: its text, or "" if there is none."""

    sender: str
    node: str
    item: str
    text: str


@dataclasses.dataclass
class StreamEnd:
    """The server ended the stream, with this condition."""

    condition: str


class Refused(Exception):
    """A request that was answered with an error; the argument is the condition."""


class Bot:
    """A client. Subclasses carry the actions out with their library and put what comes into the inbox by `note`."""

    library = "?"
    eventing = False  # announces capabilities, publishes and wants to hear of nodes

    def __init__(self, server, name, password, resource=None):
        self.server, self.name, self.password = server, name, password
        self.jid = f"{name}@localhost"
        self.resource = resource or self.library
        self.full = f"{self.jid}/{self.resource}"
        self.identity = None  # paths of a certificate and its key (slixmpp only)
        self.inbox = []
        self.news = asyncio.Event()

    def note(self, event):
        self.inbox.append(event)
        self.news.set()

    async def wait(self, event_class, /, **wanted):
        """The first event of this class with these values; takes it out of the inbox, and leaves the others."""
        try:
            async with asyncio.timeout(WAIT_S):
                while True:
                    for event in self.inbox:
                        if isinstance(event, event_class) and all(getattr(event, key) == wanted[key] for key in wanted):
                            self.inbox.remove(event)
                            return event
                    self.news.clear()
                    await self.news.wait()
        except TimeoutError:
            raise AssertionError(f"{self.full} waits in vain for {event_class.__name__} {wanted}; has {self.inbox}") from None

    async def bodies(self, count, carbon=""):
        """The bodies of the next messages, in the order in which they came."""
        return [(await self.wait(Message, carbon=carbon)).body for _ in range(count)]

    def bodies_now(self):
        """The bodies of messages that have come and were not asked for."""
        return [event.body for event in self.inbox if isinstance(event, Message)]

    async def settled(self):
        """What was sent to this bot by those who have settled has come: a round trip to the server."""
        await self.ping("localhost")
