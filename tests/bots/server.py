"""The server under test: a blade of our own on free ports, or one that runs already.

NITRO_BOTS_SERVER=host:port:tls_port:certificate.pem points the bots at a running server (STARTTLS port, direct TLS
port, the certificate to trust); what needs our own commands or signals is then left out.
"""

import os
import pathlib
import random
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request

DOMAIN = "localhost"
READY_WITHIN_S = 20
STOPPED_WITHIN_S = 20


class Server:
    """A server with its ports: host, port (STARTTLS), tls_port (direct TLS), certificate (PEM file to trust)."""

    own = False  # started by us, so that it may be signalled and its commands be used

    def __init__(self, host, port, tls_port, certificate):
        self.host, self.port, self.tls_port, self.certificate = host, port, tls_port, pathlib.Path(certificate)

    def stop(self):
        pass


class Blade(Server):
    own = True

    def __init__(self, program, **settings):
        """`settings` come on top of the defaults; `__` stands for the dot of a key, values are TOML."""
        self.program = program
        self.settings = {key.replace("__", "."): value for key, value in settings.items()}
        self.folder = tempfile.TemporaryDirectory(prefix="nitro-bots-")
        self.data_dir = pathlib.Path(self.folder.name) / "data"
        port, tls_port, self.http_port = free_ports(3)
        super().__init__("127.0.0.1", port, tls_port, self.data_dir / "certificate.pem")
        self.log_path = pathlib.Path(self.folder.name) / "blade.log"
        self.process = None
        self.start()

    def options(self):
        settings = {
            "domain": f'"{DOMAIN}"',
            "data_dir": f'"{self.data_dir}"',
            "cores": '"all"',
            "registration": '"loopback"',
            "c2s.listen": f'["{self.host}:{self.port}"]',
            "c2s.listen_tls": f'["{self.host}:{self.tls_port}"]',
            "http.listen": f'["{self.host}:{self.http_port}"]',
        } | self.settings
        return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]

    def start(self):
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                [self.program, "serve", *self.options()],
                cwd=self.folder.name, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )
        deadline = time.monotonic() + READY_WITHIN_S
        while not self.is_ready():
            if self.process.poll() is not None:
                raise RuntimeError(f"the blade ended at once:\n{self.log()}")
            if time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the blade was not ready within {READY_WITHIN_S} s:\n{self.log()}")
            time.sleep(0.01)  # the poll's interval; the bound is the deadline

    def is_ready(self):
        try:
            with urllib.request.urlopen(f"http://{self.host}:{self.http_port}/healthz", timeout=1) as answer:
                healthy = answer.status == 200
            for port in (self.port, self.tls_port):
                socket.create_connection((self.host, port), timeout=1).close()
            return healthy
        except OSError:
            return False

    def log(self):
        return self.log_path.read_text(errors="replace")

    def command(self, *arguments, text=""):
        """Runs `nitro ARGUMENTS` with the blade's settings; raises on failure, returns what it printed."""
        result = subprocess.run(
            [self.program, *arguments, *self.options()],
            cwd=self.folder.name, input=text, capture_output=True, text=True, timeout=30,
        )
        if result.returncode != 0:
            raise RuntimeError(f"nitro {' '.join(arguments)}: {result.returncode}: {result.stderr}{result.stdout}")
        return result.stdout

    def wait_for_sessions(self, count):
        """Until so many sessions are there: whoever said farewell is gone."""
        deadline = time.monotonic() + STOPPED_WITHIN_S
        while len(self.command("session", "list").split("@")) - 1 != count:
            if time.monotonic() > deadline:
                raise AssertionError(self.command("session", "list"))
            time.sleep(0.05)  # the poll's interval; the bound is the deadline

    def terminate(self):
        """SIGTERM without waiting; `ended` waits."""
        self.process.send_signal(signal.SIGTERM)

    def ended(self):
        return self.process.wait(timeout=STOPPED_WITHIN_S)

    def stop(self):
        if self.process and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def free_ports(count):
    """Ports on which nobody listens, below the range from which the kernel picks those of outgoing connections."""
    found = []
    while len(found) < count:
        port = random.randint(12_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


def running_server():
    """The server named by the environment, if any."""
    if where := os.environ.get("NITRO_BOTS_SERVER"):
        host, port, tls_port, certificate = where.split(":")
        return Server(host, int(port), int(tls_port), certificate)
    return None
