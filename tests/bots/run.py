#!/usr/bin/env python3
"""Drives a server with bots on two independent client libraries; one line a scenario, a summary at the end.

    run.py [--nitro PROGRAM] [NAME-PART ...]

Every scenario runs with each pairing of libraries (slixmpp, aioxmpp and both mixed), on its own accounts.
"""

import argparse
import asyncio
import logging
import os
import secrets
import sys
import time
import traceback

import scenarios
from server import Blade, running_server

SCENARIO_WITHIN_S = 90


async def play(scenario, server):
    async with asyncio.timeout(SCENARIO_WITHIN_S):
        stage = scenarios.Stage(server, secrets.token_hex(4))
        try:
            await scenario.play(stage)
        finally:
            await stage.leave()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nitro", default="target/debug/nitro", help="the program (default: %(default)s)")
    parser.add_argument("--tokio-client", help="the program of tests/bots/tokio-client; without it its scenarios are left out")
    parser.add_argument("--web-client", help="tests/bots/web/client.mjs beside its node_modules; without it its scenarios are left out")
    parser.add_argument("--loadtest", help="the load generator; without it its scenarios are left out")
    parser.add_argument("parts", nargs="*", help="only scenarios whose name contains one of these")
    arguments = parser.parse_args()
    # The libraries log what they think of our cut connections; what fails is told by the scenarios.
    logging.disable(logging.CRITICAL)
    scenarios.TOKIO_CLIENT = arguments.tokio_client and os.path.abspath(arguments.tokio_client)
    scenarios.WEB_CLIENT = arguments.web_client and os.path.abspath(arguments.web_client)
    scenarios.LOADTEST = arguments.loadtest and os.path.abspath(arguments.loadtest)
    if not scenarios.NGINX:
        print("nginx is missing (Debian: nginx-light): config/nginx.conf is not tried", flush=True)
    server = running_server() or Blade(os.path.abspath(arguments.nitro))
    passed = failed = 0
    try:
        for scenario in scenarios.all_of_them(server):
            if arguments.parts and not any(part in scenario.name for part in arguments.parts):
                continue
            start = time.monotonic()
            try:
                # A loop of its own: what a library leaves behind does not reach the next scenario.
                asyncio.run(play(scenario, server))
            except Exception:
                failed += 1
                print(f"FAILED {scenario.name}")
                print("    " + traceback.format_exc().strip().replace("\n", "\n    "), flush=True)
            else:
                passed += 1
                print(f"ok     {scenario.name} ({time.monotonic() - start:.2f} s)", flush=True)
        if failed and server.own:
            print(f"the blade's log ends with:\n{server.log()[-4000:]}")
    finally:
        server.stop()
    print(f"bots: {passed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
