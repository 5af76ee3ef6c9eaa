#!/usr/bin/env python3
"""Drives Gajim, a graphical client, against a blade, and takes pictures of it.

    tests/gajim/run.py [--nitro PROGRAM] [--pictures FOLDER]

Not a part of `tests/run`: it wants Debian's packages gajim, xvfb, openbox, xdotool, imagemagick and dbus (apt-get install), and the
environment of the bots (`tests/run --only bots` makes it): target/bots-venv/bin/python tests/gajim/run.py.

Gajim logs in as alice over STARTTLS with a roster of two groups, reads a message of bob's, answers it, enters the room that stands in
her bookmarks, and fetches bob's avatar. What bob and the room hear of it, and the avatar in Gajim's cache, is checked here; what it
looks like is for people: the pictures are told at the end.
"""

import asyncio
import hashlib
import json
import os
import pathlib
import shutil
import sqlite3
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "bots"))

import desk  # noqa: E402
from bot import Message, Presence  # noqa: E402
from desk import PASSWORD, ROOM, WITHIN_S, ok, until  # noqa: E402
from slix import ET, SlixBot  # noqa: E402

NEEDS = {"gajim": "gajim", "Xvfb": "xvfb", "openbox": "openbox", "xdotool": "xdotool", "import": "imagemagick",
         "dbus-run-session": "dbus"}
SIZE = "1280x800"


class Eventing(SlixBot):
    eventing = True


def profile(folder, blade):
    """Gajim's folder: one account, no questions at the start."""
    folder.mkdir()
    (folder / "cert_store").mkdir()
    shutil.copy(blade.certificate, folder / "cert_store" / "nitro")
    account = {
        "name": "alice", "hostname": "localhost", "resource": "gajim", "active": True, "autoconnect": True,
        "savepass": True, "password": PASSWORD, "use_custom_host": True, "custom_host": blade.host,
        "custom_port": blade.port, "custom_type": "START TLS", "account_label": "alice", "enable_gssapi": False,
        "default_workspace": "w",
    }
    app = {
        "use_keyring": False, "check_for_update": False, "ask_online_status": False, "ask_offline_status": False,
        "autopopup": True, "show_main_window_on_startup": "always", "action_on_close": "quit", "remote_control": False,
        "autodetect_browser_mailer": False, "last_main_window_visible": True,
    }
    workspaces = {"w": {"name": "Desk", "chats": [], "color": "", "avatar_sha": ""}}
    base = sqlite3.connect(folder / "settings.sqlite")
    base.executescript("CREATE TABLE settings (name TEXT UNIQUE, settings TEXT);"
                       "CREATE TABLE account_settings (account TEXT UNIQUE, settings TEXT); PRAGMA user_version=5;")
    rows = {"app": app, "soundevents": {}, "status_presets": {}, "proxies": {}, "plugins": {}, "workspaces": workspaces}
    base.executemany("INSERT INTO settings VALUES (?, ?)", [(name, json.dumps(value)) for name, value in rows.items()])
    whole = {"account": account, "contact": {}, "group_chat": {}}
    base.execute("INSERT INTO account_settings VALUES ('alice', ?)", [json.dumps(whole)])
    base.commit()
    base.close()


class Screen:
    """A display of its own with Gajim on it."""

    def __init__(self, folder, blade):
        self.folder, self.running = folder, []
        profile(folder / "gajim", blade)
        read, write = os.pipe()
        self.start(["Xvfb", "-displayfd", str(write), "-screen", "0", f"{SIZE}x24", "-nolisten", "tcp"], pass_fds=[write])
        os.close(write)
        with os.fdopen(read) as told:
            number = told.readline().strip()
        self.env = os.environ | {
            "DISPLAY": f":{number}", "HOME": str(folder), "XDG_RUNTIME_DIR": str(folder), "GDK_BACKEND": "x11",
            "NO_AT_BRIDGE": "1", "LANG": "C.UTF-8", "PYTHON_KEYRING_BACKEND": "keyring.backends.null.Keyring",
        }
        self.start(["openbox"])
        gajim = ["dbus-run-session", "--", "gajim", "-c", str(folder / "gajim")]
        if os.geteuid() == 0:
            # it refuses to run as root
            subprocess.run(["chown", "-R", "nobody:nogroup", str(folder)], check=True)
            gajim = ["setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups", "--", *gajim]
        self.start(gajim)

    def start(self, command, **more):
        log = open(self.folder / f"{len(self.running)}.log", "wb")
        env = getattr(self, "env", os.environ)
        self.running.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, **more))

    def do(self, *command):
        done = subprocess.run(["xdotool", *command], env=self.env, capture_output=True, text=True)
        return done.stdout.split()

    async def window(self, name):
        async with asyncio.timeout(WITHIN_S):
            while not (found := self.do("search", "--onlyvisible", "--name", name)):
                await asyncio.sleep(0.2)
        return found[-1]

    def take(self, path):
        subprocess.run(["import", "-window", "root", str(path)], env=self.env, check=True)
        print(f"picture: {path}", flush=True)

    def stop(self):
        for process in reversed(self.running):
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def play(blade, folder, pictures):
    bob, carol = Eventing(blade, "bob", PASSWORD), Eventing(blade, "carol", PASSWORD)
    before = Eventing(blade, "alice", PASSWORD, "before")
    image = desk.picture((30, 90, 200))
    for bot in (bob, carol, before):
        await bot.log_in()
        await bot.come_online()
    await bob.publish_avatar(image)
    await carol.publish_avatar(desk.picture((200, 60, 30)))
    await desk.open_room(bob, "Good morning, desk")
    conference = ET.fromstring("<conference xmlns='urn:xmpp:bookmarks:1' name='The Desk' autojoin='true'><nick>alice</nick></conference>")
    await before.ask(before.client.plugin["xep_0060"].publish(
        None, "urn:xmpp:bookmarks:1", id=ROOM, payload=conference, options=before.private_options()))
    await before.log_out()

    screen = Screen(folder, blade)
    try:
        main = await screen.window("Gajim")
        await bob.wait(Presence, sender="alice@localhost/gajim", kind="available")
        ok("logged in, and on line to her contacts")
        await bob.wait(Presence, sender=f"{ROOM}/alice", kind="available")
        ok("in the room of her bookmarks")
        bob.chat("alice@localhost", "Where is the ten year?")
        wanted = hashlib.sha1(image).hexdigest()
        await until("bob's avatar was fetched", lambda: any((folder / "gajim").glob(f"avatars/{wanted}*")))
        bob.say(ROOM, "Morning, alice")
        await asyncio.sleep(3)  # nobody tells when Gajim has drawn
        screen.take(pictures / "1-started.png")
        # Alt and a number choose the chat of that place
        screen.do("windowactivate", "--sync", main)
        for place in (1, 2):
            screen.do("key", "--clearmodifiers", f"alt+{place}")
            await asyncio.sleep(2)
            screen.take(pictures / f"{place + 1}-chat.png")
        for place in (1, 2):
            screen.do("key", "--clearmodifiers", f"alt+{place}")
            await asyncio.sleep(1)
            screen.do("type", "--delay", "20", f"At 2.51 ({place})")
            screen.do("key", "Return")
        answers = {(await bob.wait(Message)).body for _ in range(3)}
        print(f"heard by bob: {answers}", flush=True)
        await asyncio.sleep(2)
        screen.take(pictures / "4-answered.png")
        # the account's own picture, below on the left, leads to its page with the roster
        shape = dict(line.split("=") for line in screen.do("getwindowgeometry", "--shell", main) if "=" in line)
        screen.do("mousemove", "--window", main, "35", str(int(shape["HEIGHT"]) - 35), "click", "1")
        await asyncio.sleep(2)
        screen.take(pictures / "5-roster.png")
    except BaseException:
        screen.take(pictures / "0-failed.png")
        raise
    finally:
        screen.stop()
        for bot in (bob, carol):
            await bot.log_out()


if __name__ == "__main__":
    desk.run(__doc__, "gajim", NEEDS, [play])
