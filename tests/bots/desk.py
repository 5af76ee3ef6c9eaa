"""What the plays with graphical clients share (tests/gajim, tests/converse): a blade with people who know each other, a room, and the
frame around a play: arguments, what must be installed, the folder for pictures, and the logs if it fails.
"""

import argparse
import asyncio
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib

from bot import Message
from server import Blade

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PASSWORD = "a long password"
ROOM = "desk@rooms.localhost"
WITHIN_S = 60


def picture(colour, size=96):
    """A PNG of one colour with a white bar."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = b"".join(
        b"\0" + b"".join(bytes((255, 255, 255) if size // 3 < y < 2 * size // 3 else colour) for _ in range(size))
        for y in range(size)
    )
    head = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def accounts(blade):
    """alice with bob and carol in her roster, with names and groups."""
    folder = pathlib.Path(blade.folder.name)
    people, rosters = folder / "accounts.csv", folder / "rosters.csv"
    people.write_text("username,password\n" + "".join(f"{name},{PASSWORD}\n" for name in ("alice", "bob", "carol")))
    rosters.write_text("username,contact,name,groups\nalice,bob,Bob Builder,Rates Desk\nalice,carol,Carol Chart,Equities EU\n")
    command = [blade.program, "user", "import", str(people), "--rosters", str(rosters), *blade.options()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


async def open_room(bob, words):
    """bob says something in a lasting room of his."""
    await bob.enter(ROOM, "bob")
    await bob.persist(ROOM)
    bob.say(ROOM, words)
    await bob.wait(Message, body=words)


def ok(what):
    print(f"ok: {what}", flush=True)


async def until(what, holds):
    async with asyncio.timeout(WITHIN_S):
        while not holds():
            await asyncio.sleep(0.2)
    ok(what)


def run(doc, name, needs, plays, **settings):
    """Plays: each gets the blade, a folder of its own and the one for pictures. `needs`: programs, and Debian's packages with them;
    `settings` as those of a Blade."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nitro", default=str(ROOT / "target/debug/nitro"), help="the program (default: %(default)s)")
    parser.add_argument("--pictures", help="where the pictures go (default: a new folder)")
    arguments = parser.parse_args()
    missing = [package for program, package in needs.items() if not shutil.which(program)]
    if missing:
        sys.exit(f"apt-get install {' '.join(missing)}")
    pictures = pathlib.Path(arguments.pictures or tempfile.mkdtemp(prefix=f"nitro-{name}-"))
    pictures.mkdir(parents=True, exist_ok=True)
    blade = Blade(os.path.abspath(arguments.nitro), **settings)
    try:
        accounts(blade)
        for play in plays:
            with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
                try:
                    asyncio.run(play(blade, pathlib.Path(folder), pictures))
                except BaseException:
                    for log in pathlib.Path(folder).glob("*.log"):
                        print(f"{log.name} ends with:\n{log.read_text(errors='replace')[-3000:]}")
                    print(f"the blade's log ends with:\n{blade.log()[-3000:]}")
                    raise
    finally:
        blade.stop()
