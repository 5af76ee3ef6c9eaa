#!/usr/bin/env python3
"""Drives Converse.js in headless Chromium against a blade, over WebSocket and over BOSH, and takes pictures of it.

    tests/converse/run.py [--nitro PROGRAM] [--pictures FOLDER]

Not a part of `tests/run`: it wants Debian's package chromium, npm, and the environment of the bots (`tests/run --only bots` makes
it): target/bots-venv/bin/python tests/converse/run.py.

Converse logs in as alice, finds bob's messages of before in a room, says something there, and uploads a picture (XEP-0363) that bob
fetches. What bob hears is checked here, and that the page shows history and picture; the pictures are told at the end.
"""

import asyncio
import base64
import contextlib
import functools
import http.server
import json
import pathlib
import ssl
import subprocess
import sys
import threading
import urllib.request

import aiohttp

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "bots"))

import desk  # noqa: E402
from bot import Message, Presence  # noqa: E402
from desk import PASSWORD, ROOM, ROOT, WITHIN_S, ok  # noqa: E402
from server import free_ports  # noqa: E402
from slix import SlixBot  # noqa: E402

VERSION = "14.0.0"
NEEDS = {"chromium": "chromium", "npm": "npm"}

PAGE = """<!DOCTYPE html><html lang=en><meta charset=utf-8><title>Desk</title>
<link rel=stylesheet href=/dist/converse.min.css><body class=converse-fullscreen><script type=module src=/dist/converse.min.js></script>
<script type=module>
converse.plugins.add('probe', { initialize() { window.api = this._converse.api; } });
converse.initialize(Object.assign({
    whitelisted_plugins: ['probe'], assets_path: '/dist/', jid: 'alice@localhost', password: 'a long password',
    auto_login: true, discover_connection_methods: false, view_mode: 'fullscreen', i18n: 'en', play_sounds: false,
    auto_join_rooms: [{ jid: 'desk@rooms.localhost', nick: 'alice' }], render_media: true,
    message_archiving: 'always', persistent_store: 'sessionStorage', clear_cache_on_logout: true, loglevel: 'warn',
}, OPTIONS));
</script>"""


def library():
    """Converse.js from npm, in a folder beside other things that were made."""
    folder = ROOT / "target" / "converse"
    dist = folder / "node_modules" / "converse.js" / "dist"
    if not dist.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder), f"converse.js@{VERSION}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return dist


@contextlib.contextmanager
def site(options):
    """A web site with the page; its address."""
    page = PAGE.replace("OPTIONS", json.dumps(options)).encode()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            if self.path != "/":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", options.pop("port")),
                                             functools.partial(Handler, directory=library().parent))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://localhost:{server.server_port}/"
    finally:
        server.shutdown()


class Browser:
    """A page in headless Chromium, by the DevTools protocol."""

    def __init__(self, folder):
        self.process = subprocess.Popen(
            ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--ignore-certificate-errors",
             "--remote-debugging-port=0", f"--user-data-dir={folder}", "--window-size=1280,800", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=open(folder / "chromium.log", "wb"))
        self.folder, self.next, self.said = folder, 0, []

    async def __aenter__(self):
        port = self.folder / "DevToolsActivePort"
        async with asyncio.timeout(WITHIN_S):
            while not port.exists() or not port.read_text():
                await asyncio.sleep(0.1)
        self.http = aiohttp.ClientSession()
        async with self.http.get(f"http://127.0.0.1:{port.read_text().split()[0]}/json/list") as answer:
            pages = [page for page in json.loads(await answer.text()) if page["type"] == "page"]
        self.socket = await self.http.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0)
        for domain in ("Page", "Runtime", "DOM"):
            await self.call(f"{domain}.enable")
        return self

    async def __aexit__(self, *_):
        await self.socket.close()
        await self.http.close()
        self.process.terminate()
        self.process.wait(10)

    async def call(self, method, **parameters):
        self.next += 1
        await self.socket.send_json({"id": self.next, "method": method, "params": parameters})
        async with asyncio.timeout(WITHIN_S):
            while True:
                answer = json.loads((await self.socket.receive()).data)
                if answer.get("method") == "Runtime.consoleAPICalled":
                    self.said.append(" ".join(str(a.get("value", a.get("description"))) for a in answer["params"]["args"])[:300])
                elif answer.get("method") == "Runtime.exceptionThrown":
                    self.said.append(str(answer["params"]["exceptionDetails"])[:300])
                if answer.get("id") == self.next:
                    if "error" in answer:
                        raise RuntimeError(f"{method}: {answer['error']}")
                    return answer["result"]

    async def value(self, expression):
        got = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        return got["result"].get("value")

    async def until(self, what, expression):
        try:
            async with asyncio.timeout(WITHIN_S):
                while not await self.value(expression):
                    await asyncio.sleep(0.2)
        except TimeoutError:
            print("\n".join(self.said[-20:]))
            raise AssertionError(f"never: {what}") from None
        ok(what)

    async def type(self, text):
        await self.value("document.querySelector('.chat-textarea').focus()")
        await self.call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            await self.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")

    async def choose_file(self, selector, path):
        root = (await self.call("DOM.getDocument"))["root"]["nodeId"]
        node = (await self.call("DOM.querySelector", nodeId=root, selector=selector))["nodeId"]
        await self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    async def take(self, path):
        path.write_bytes(base64.b64decode((await self.call("Page.captureScreenshot"))["data"]))
        print(f"picture: {path}", flush=True)


async def play(transport, options, blade, folder, pictures):
    bob = SlixBot(blade, "bob", PASSWORD)
    await bob.log_in()
    await bob.come_online()
    before = f"Good morning, desk: {transport}"
    await desk.open_room(bob, before)
    image = desk.picture((30, 90, 200), 240)
    with site(dict(options)) as address:
        chart = folder / "chart.png"
        chart.write_bytes(image)
        async with Browser(folder) as browser:
            try:
                await browser.call("Page.navigate", url=address)
                await browser.until(f"logged in over {transport}", "window.api && api.connection.connected()")
                await bob.wait(Presence, sender=f"{ROOM}/alice", kind="available")
                await browser.until("the room's history is there", f"document.body.innerText.includes({json.dumps(before)})")
                await browser.type(f"At 2.51 over {transport}")
                await bob.wait(Message, body=f"At 2.51 over {transport}")
                ok("bob hears alice")
                bob.say(ROOM, "Done")
                await browser.until("alice hears bob", "document.body.innerText.includes('Done')")
                await browser.until("it finds the service for uploads", "document.querySelector('input.fileupload') !== null")
                await browser.choose_file("input.fileupload", chart)
                async with asyncio.timeout(WITHIN_S):
                    while "/upload/" not in (body := (await bob.wait(Message)).body):
                        pass
                with urllib.request.urlopen(body, context=ssl.create_default_context(cafile=blade.certificate)) as answer:
                    assert answer.read() == image and answer.headers["Content-Type"] == "image/png"
                ok("bob has the picture that alice has uploaded")
                await browser.until("the page shows it", f"[...document.images].some(i => i.src == {json.dumps(body)} && i.naturalWidth == 240)")
                await browser.take(pictures / f"{transport}.png")
            except BaseException:
                await browser.take(pictures / f"{transport}-failed.png")
                print("\n".join(browser.said[-20:]))
                raise
    await bob.log_out()


def main():
    web, page = free_ports(2)
    plays = [
        functools.partial(play, transport, options | {"port": page})
        for transport, options in [("websocket", {"websocket_url": f"wss://localhost:{web}/ws"}),
                                   ("bosh", {"bosh_service_url": f"https://localhost:{web}/bosh"})]
    ]
    desk.run(__doc__, "converse", NEEDS, plays,
             web__listen_tls=f'["127.0.0.1:{web}"]', web__origins=f'["http://localhost:{page}"]')


if __name__ == "__main__":
    main()
