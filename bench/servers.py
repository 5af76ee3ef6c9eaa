"""Servers that a benchmark starts in a folder of its own and stops again, and runs of `loadtest` against them. Shared by
bench/measure and bench/compare. They are built by `cargo build --release --workspace`."""
import json, os, pathlib, re, signal, socket, subprocess, sys, time, urllib.request

root = pathlib.Path(__file__).resolve().parent.parent
target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", root / "target")) / "release"
WITHIN = 60  # seconds for a server to start or to stop


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def reaches(family, address):
    with socket.socket(family) as s:
        s.settimeout(1)
        return s.connect_ex(address) == 0


class Server:
    """A process that runs until `stop`."""

    environment = None

    def __init__(self, folder, name, command, family, address):
        self.folder, self.name, self.command = folder, name, [str(part) for part in command]
        self.family, self.address = family, address
        self.start()

    def start(self):
        log = self.folder / f"{self.name}.log"
        with open(log, "ab") as out:
            self.process = subprocess.Popen(self.command, stdout=out, stderr=out, env=self.environment, cwd=self.folder)
        deadline = time.monotonic() + WITHIN
        while not reaches(self.family, self.address):
            if time.monotonic() > deadline or self.process.poll() is not None:
                sys.exit(f"{self.name} did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.02)

    def stop(self, how=signal.SIGTERM):
        self.process.send_signal(how)
        self.process.wait(WITHIN)

    def is_running(self):
        return self.process.poll() is None


class Redis(Server):
    """One instance that holds its data in memory only."""

    def __init__(self, folder, number):
        path = folder / f"redis-{number}.sock"
        self.url = f"unix://{path}"
        super().__init__(folder, f"redis-{number}",
                         ["redis-server", "--port", "0", "--unixsocket", path, "--save", "", "--appendonly", "no",
                          "--maxmemory", "512mb", "--dir", folder], socket.AF_UNIX, str(path))


class MariaDb(Server):
    """Its defaults (durable commits), a database `nitro`, on a unix socket."""

    def __init__(self, folder):
        data, path = folder / "mariadb", folder / "mariadb.sock"
        self.url = f"mysql://nitro:secret@localhost/nitro?socket={path}"
        # as root it wants to be told that it may
        user = ["--user=root"] if os.geteuid() == 0 else []
        install = ["mariadb-install-db", "--no-defaults", f"--datadir={data}", "--skip-test-db",
                   "--auth-root-authentication-method=normal", *user]
        subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
        super().__init__(folder, "mariadbd",
                         ["mariadbd", "--no-defaults", f"--datadir={data}", f"--socket={path}", "--skip-networking",
                          f"--pid-file={folder}/mariadb.pid", "--innodb-buffer-pool-size=1G", *user],
                         socket.AF_UNIX, str(path))
        subprocess.run(["mariadb", "--no-defaults", f"--socket={path}", "-uroot", "-e",
                        "CREATE DATABASE nitro; CREATE USER nitro@localhost IDENTIFIED BY 'secret';"
                        "GRANT ALL ON nitro.* TO nitro@localhost"], check=True)


class XmppServer(Server):
    """One that `loadtest` can be run against: `ports[0]` is its c2s port, `servers` are the databases it uses."""

    generator_core = None  # a core of the generator's own
    servers = ()

    def load(self, *command, port=None):
        """One run of loadtest, which watches the databases too; its JSON line."""
        running = [server for server in [self, *self.servers] if server.is_running()]
        pids = [x for server in running for x in ("--server-pid", str(server.process.pid))]
        run = subprocess.run(
            [*pinned(self.generator_core), target / "loadtest", *map(str, command), "--port", str(port or self.ports[0]), *pids,
             "--keys", self.folder / "keys", "--json", "-"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        lines = [line for line in run.stdout.splitlines() if line.startswith("{")]
        if not lines:
            sys.exit(f"loadtest failed:\n{run.stdout}\n{run.stderr}")
        report = json.loads(lines[-1])
        if run.returncode:
            print(f"  FAILED: {'; '.join(report.get('failures', []))}", flush=True)
        return report


def pinned(core):
    return [] if core is None else ["taskset", "-c", str(core)]


class Blade(XmppServer):
    """nitro on a data folder; `start` again is a restart. `core`: pinned to it, with one shard."""

    def __init__(self, folder, cores, database=None, redis=(), core=None, options=None):
        data = folder / "data"
        data.mkdir(exist_ok=True)
        self.ports = [free_port() for _ in range(4)]
        self.servers = [database] if database else []
        self.servers += redis
        sets = {
            "data_dir": f'"{data}"',
            "cores": f'"{cores}"',
            "c2s.listen": f'["127.0.0.1:{self.ports[0]}"]',
            "c2s.listen_tls": f'["127.0.0.1:{self.ports[1]}"]',
            "web.listen": f'["127.0.0.1:{self.ports[3]}"]',
            "http.listen": f'["127.0.0.1:{self.ports[2]}"]',
            "c2s.require_tls": "false",
            **(options or {}),
        }
        if database:
            sets["database"] = json.dumps(database.url)
        if redis:
            sets["redis.instances"] = json.dumps([instance.url for instance in redis])
        self.options = [x for k, v in sets.items() for x in ("--set", f"{k}={v}")]
        super().__init__(folder, "nitro", [*pinned(core), target / "nitro", "serve", *self.options], socket.AF_INET,
                         ("127.0.0.1", self.ports[0]))

    def nitro(self, *command):
        run = subprocess.run([target / "nitro", *command, *self.options], stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True)
        if run.returncode:
            sys.exit(f"nitro {' '.join(map(str, command))}: {run.stdout}")

    def fill(self, prefix, users, roster):
        """Accounts PREFIX0 … with the nearest contacts of a ring."""
        accounts, rosters = self.folder / "users.csv", self.folder / "rosters.csv"
        contacts = ["--roster", str(roster), "--roster-csv", rosters] if roster else []
        subprocess.run([target / "loadtest", "register", "-n", str(users), "--prefix", prefix, "--csv", accounts,
                        *contacts], check=True, stdout=subprocess.DEVNULL)
        self.nitro("user", "import", accounts, "--existing", "skip", *(["--rosters", rosters] if roster else []))

    def sum(self, name):
        """A metric's value now, of all its labels."""
        text = urllib.request.urlopen(f"http://127.0.0.1:{self.ports[2]}/metrics", timeout=10).read().decode()
        begins = tuple(f"{name}{end}" for end in ("{", " ", "_total{", "_total "))
        lines = [line for line in text.splitlines() if line.startswith(begins)]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def by_shard(self, name):
        """A sample's value now, by shard."""
        text = urllib.request.urlopen(f"http://127.0.0.1:{self.ports[2]}/metrics", timeout=10).read().decode()
        found = re.findall(rf'^{name}{{shard="(\d+)"}} (\S+)$', text, re.M)
        return {int(shard): float(value) for shard, value in found}

    def rest(self):
        """Waits until the database has what was changed (the last log-outs, say): no statement for two seconds."""
        deadline, before = time.monotonic() + WITHIN, None
        while (now := self.sum("nitro_sql_statements")) != before:
            if time.monotonic() > deadline:
                sys.exit("nitro's database did not come to rest")
            before = now
            time.sleep(2)

    def journal(self):
        """Figures of the journals of all shards: backlog in bytes, bytes of files on the disk, commits, bytes of groups,
        records; and the resident memory of the process, which holds an overlay of what the database lacks."""
        files = (self.folder / "data" / "journal").iterdir()
        disk = sum(file.stat().st_blocks * 512 for file in files)
        pages = int(pathlib.Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        figures = [self.sum(f"nitro_journal_{name}") for name in ("backlog_bytes", "commits", "bytes", "records")]
        return dict(zip(("backlog", "commits", "bytes", "records", "disk", "rss"),
                        [*figures, disk, pages * os.sysconf("SC_PAGESIZE")]))

    def metrics(self, *names):
        url = f"http://127.0.0.1:{self.ports[2]}/metrics"
        return ["--metrics", url, *(x for name in names for x in ("--metric", name))]


def figure(report, key):
    """`a/b` is b inside of a."""
    for part in key.split("/"):
        report = report.get(part) if report else None
    return report
