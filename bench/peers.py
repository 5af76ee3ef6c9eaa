"""ejabberd and Prosody for bench/compare, from Debian's packages, without touching the system: the packages and what they
need are downloaded by `apt-get download` and unpacked by `dpkg -x` into a folder under `target/`; what is installed
already is used from there. They run as the user who calls, on folders of their own, never as the system's services.

Settings are those of production by each server's guide, as far as they concern speed, and what a comparison needs:

ejabberd: `+K true` (kernel poll), `+P 250000`, `+Q 65536` (processes and sockets), listen backlog 4096 (its default of 5
  drops the connects of a storm), no traffic shaper, passwords as SCRAM keys, Mnesia for accounts and rosters, caches
  large enough for all users (`cache_size`), log level warning. Archive: `mod_mam` with `default: always` into SQLite
  (its guide advises SQL for archives): a commit for each copy of a message.
Prosody: epoll, generational garbage collector, `tcp_backlog` 4096, `limits` off (a rate limit by connection), passwords
  as SCRAM keys (`internal_hashed`), storage `internal` for accounts and rosters, log level warn. Archive: `mod_mam` with
  policy `true` into SQLite (its guide advises SQL for archives): a commit for each copy of a message.
Both: chat rooms at rooms.localhost for up to 1,000 occupants (ejabberd's default is 200), with 20 messages of history and,
  where there is an archive, one of each room.
Both: stream management with resumption for 10 minutes, carbons, ping, offline messages; an ECDSA P-256 certificate; WebSocket
  (RFC 7395) on a port of its own.
"""
import base64, hashlib, hmac, json, os, pathlib, re, resource, shutil, socket, sqlite3, subprocess, sys, time

from servers import XmppServer, free_port, pinned, root

ITERATIONS = 4096
SALT = b"a salt of the comparison"
PASSWORD = b"secret"
PACKAGES = {
    "ejabberd": ["ejabberd", "erlang-p1-sqlite3"],
    "prosody": ["prosody", "lua-event", "lua-dbi-sqlite3"],
}
UNPACKED = root / "target" / "compare"


def unpack(name):
    """Downloads a server's packages and unpacks them, once; the folder."""
    folder = UNPACKED / name
    if (folder / "complete").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    plan = subprocess.run(["apt-get", "-s", "install", "--no-install-recommends", *PACKAGES[name]],
                          stdout=subprocess.PIPE, text=True)
    if plan.returncode:
        sys.exit(f"apt-get does not find {' '.join(PACKAGES[name])}: run apt-get update")
    wanted = re.findall(r"^Inst (\S+)", plan.stdout, re.M)
    if wanted:
        subprocess.run(["apt-get", "download", *wanted], cwd=folder, check=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, folder], check=True)
        package.unlink()
    (folder / "complete").touch()
    return folder


def found(folder, path):
    """Unpacked, or of the system."""
    return folder / path if (folder / path).exists() else pathlib.Path("/") / path


def version(name):
    """Of the package that `unpack` takes."""
    policy = subprocess.run(["apt-cache", "policy", name], stdout=subprocess.PIPE, text=True).stdout
    return re.search(r"Candidate: (\S+)", policy)[1].split("-")[0]


def certificate(folder):
    key, chain = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30",
                    "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", chain],
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return key, chain


def many_files():
    """A server's limit on open files as a guide would set it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def scram():
    """(salted, stored key, server key) of the one password: all accounts have the same salt, to make them quickly."""
    salted = hashlib.pbkdf2_hmac("sha1", PASSWORD, SALT, ITERATIONS)
    client = hmac.digest(salted, b"Client Key", "sha1")
    return salted, hashlib.sha1(client).digest(), hmac.digest(salted, b"Server Key", "sha1")


def contacts(user, users, count):
    """The nearest of a ring, as `loadtest register --roster` has them."""
    for step in range(1, count // 2 + 1):
        yield (user + step) % users
        yield (user - step) % users


class Peer(XmppServer):
    def __init__(self, folder, core, archive):
        many_files()
        self.folder, self.core, self.archive = folder, core, archive
        self.ports = [free_port(), free_port()]
        self.web = (self.ports[1], self.web_path)
        self.files = unpack(self.kind)
        self.key, self.chain = certificate(folder)
        self.prepare()
        super().__init__(folder, self.kind, [*pinned(core), *self.run()], socket.AF_INET, ("127.0.0.1", self.ports[0]))

    def know_keys(self, prefix, users):
        """The generator need not derive what is the same for all."""
        line = f"sha-1 {ITERATIONS} {base64.b64encode(SALT).decode()} {base64.b64encode(scram()[0]).decode()}"
        with open(self.folder / "keys", "a") as keys:
            keys.writelines(f"{prefix}{user}\t{line}\n" for user in range(users))


class Ejabberd(Peer):
    kind = "ejabberd"
    web_path = "/ws"

    def prepare(self):
        pem = self.folder / "both.pem"
        pem.write_text(self.chain.read_text() + self.key.read_text())
        (self.folder / "db").mkdir()
        mam = """
  mod_mam:
    default: always
    db_type: sql
    request_activates_archiving: false
""" if self.archive else "\n"
        sql = f"""
sql_type: sqlite
sql_database: "{self.folder}/ejabberd.sqlite"
""" if self.archive else "\n"
        (self.folder / "ejabberd.yml").write_text(f"""
hosts: [localhost]
loglevel: warning
certfiles: ["{pem}"]
auth_method: [internal]
auth_password_format: scram
auth_scram_hash: sha
max_fsm_queue: 10000
cache_size: 100000
{sql}
listen:
  -
    port: {self.ports[0]}
    ip: "127.0.0.1"
    module: ejabberd_c2s
    backlog: 4096
    max_stanza_size: 262144
    shaper: none
    access: all
    starttls: true
  -
    port: {self.ports[1]}
    ip: "127.0.0.1"
    module: ejabberd_http
    backlog: 4096
    request_handlers:
      /ws: ejabberd_http_ws
modules:
  mod_roster: {{}}
  mod_offline: {{}}
  mod_ping: {{}}
  mod_disco: {{}}
  mod_caps: {{}}
  mod_carboncopy: {{}}
  mod_stream_mgmt:
    resume_timeout: 600
  mod_muc:
    host: rooms.localhost
    max_users: 1000
    history_size: 20
    default_room_options:
      max_users: 1000
      mam: {str(bool(self.archive)).lower()}
{mam}""")
        if self.archive:
            schema = found(self.files, "usr/share/ejabberd/sql/lite.sql").read_text()
            with sqlite3.connect(self.folder / "ejabberd.sqlite") as database:
                database.executescript(schema)

    def run(self, evaluate=None):
        erlang = found(self.files, "usr/lib/erlang")
        erts = next(erlang.glob("erts-*"))
        libraries = self.files / "usr/lib/x86_64-linux-gnu"
        libraries = libraries if libraries.exists() else next(self.files.glob("usr/lib/*-linux-gnu"), libraries)
        self.environment = os.environ | {
            "ROOTDIR": str(erlang), "BINDIR": str(erts / "bin"), "EMU": "beam", "PROGNAME": "erl", "HOME": str(self.folder),
            "ERL_LIBS": f"{libraries}:{found(self.files, 'usr/lib/x86_64-linux-gnu')}", "LD_LIBRARY_PATH": str(libraries),
            "EJABBERD_CONFIG_PATH": str(self.folder / "ejabberd.yml"), "ERL_CRASH_DUMP": str(self.folder / "crash"),
            "EJABBERD_LOG_PATH": str(self.folder / "log"), "ERL_MAX_ETS_TABLES": "20000",
        }
        command = [erts / "bin" / "erlexec", "-noinput", "-noshell", "+K", "true", "+P", "250000", "+Q", "65536",
                   "-mnesia", "dir", f'"{self.folder}/db"', "-s", "ejabberd"]
        return command + (["-eval", evaluate] if evaluate else [])

    def fill(self, prefix, users, roster):
        """By its import of XEP-0227, at a start of its own."""
        # its Base64 is of what its tables hold, which is Base64
        twice = [base64.b64encode(base64.b64encode(key)).decode() for key in (SALT, *scram()[1:])]
        salt, stored, server = twice
        done = self.folder / "imported"
        done.unlink(missing_ok=True)
        with open(self.folder / "users.xml", "w") as out:
            out.write("<server-data xmlns='urn:xmpp:pie:0'><host jid='localhost'>")
            for user in range(users):
                items = "".join(f"<item jid='{prefix}{contact}@localhost' name='{prefix}{contact}' subscription='both'>"
                                "<group>Ring</group></item>" for contact in contacts(user, users, roster))
                items = f"<query xmlns='jabber:iq:roster'>{items}</query>" if items else ""
                out.write(f"<user name='{prefix}{user}'><scram-credentials xmlns='urn:xmpp:pie:0#scram' mechanism='SCRAM-SHA-1'>"
                          f"<iter-count>{ITERATIONS}</iter-count><salt>{salt}</salt>"
                          f"<server-key>{server}</server-key><stored-key>{stored}</stored-key></scram-credentials>{items}</user>")
            out.write("</host></server-data>")
        self.stop()
        ordinary = self.command
        evaluate = f'R = ejabberd_piefxis:import_file(<<"{self.folder}/users.xml">>), ' \
                   f'file:write_file("{done}", io_lib:format("~p", [R])).'
        self.command = [str(part) for part in [*pinned(self.core), *self.run(evaluate)]]
        self.start()
        deadline = time.monotonic() + 600
        while not done.exists() or not done.read_text():
            if time.monotonic() > deadline or not self.is_running():
                sys.exit(f"ejabberd did not import: {(self.folder / 'ejabberd.log').read_text()[-2000:]}")
            time.sleep(0.1)
        if done.read_text() != "ok":
            sys.exit(f"ejabberd did not import: {done.read_text()}")
        self.stop()
        self.command = ordinary
        self.start()
        self.know_keys(prefix, users)


class Prosody(Peer):
    kind = "prosody"
    web_path = "/xmpp-websocket"

    def prepare(self):
        modules = ["roster", "saslauth", "tls", "disco", "ping", "smacks", "carbons", "offline", "websocket", *(["mam"] if self.archive else [])]
        archive = f"""
sql = {{ driver = "SQLite3", database = "{self.folder}/prosody.sqlite" }}
default_archive_policy = true
""" if self.archive else ""
        (self.folder / "data").mkdir()
        (self.folder / "prosody.cfg.lua").write_text(f"""
run_as_root = true
daemonize = false
data_path = "{self.folder}/data"
plugin_paths = {{}}
certificates = "{self.folder}"
pidfile = "{self.folder}/prosody.pid"
log = {{ warn = "{self.folder}/prosody-warnings.log" }}
network_backend = "epoll"
network_settings = {{ tcp_backlog = 4096 }}
gc = {{ mode = "generational" }}
interfaces = {{ "127.0.0.1" }}
c2s_ports = {{ {self.ports[0]} }}
c2s_direct_tls_ports = {{}}
s2s_ports = {{}}
component_ports = {{}}
http_ports = {{ {self.ports[1]} }}
http_default_host = "localhost"
consider_websocket_secure = true
https_ports = {{}}
modules_disabled = {{ "s2s", "limits" }}
modules_enabled = {{ {", ".join(json.dumps(module) for module in modules)} }}
c2s_require_encryption = false
authentication = "internal_hashed"
storage = {{ {'archive = "sql"' if self.archive else ""} }}
default_iteration_count = {ITERATIONS}
smacks_hibernation_time = 600
{archive}
VirtualHost "localhost"
    ssl = {{ key = "{self.key}", certificate = "{self.chain}" }}

Component "rooms.localhost" "muc"
    modules_enabled = {{ {'"muc_mam"' if self.archive else ""} }}
    max_history_messages = 20
""")
        script = found(self.files, "usr/bin/prosody").read_text()
        source = found(self.files, "usr/lib/prosody")
        for name, path in [("SOURCEDIR", source), ("CONFIGDIR", self.folder), ("PLUGINDIR", f"{source}/modules/"),
                           ("DATADIR", self.folder / "data")]:
            script = re.sub(rf"^CFG_{name}=.*$", f"CFG_{name}='{path}';", script, flags=re.M)
        (self.folder / "prosody").write_text(script)

    def run(self):
        lua, shared = self.files / "usr/lib/x86_64-linux-gnu/lua/5.4", self.files / "usr/share/lua/5.4"
        self.environment = os.environ | {
            "LUA_PATH": f"{shared}/?.lua;{shared}/?/init.lua;;", "LUA_CPATH": f"{lua}/?.so;;",
            "LD_LIBRARY_PATH": str(lua.parent.parent),
        }
        return [found(self.files, "usr/bin/lua5.4"), self.folder / "prosody", "--config", self.folder / "prosody.cfg.lua", "-F"]

    def fill(self, prefix, users, roster):
        """Its own files, as `prosodyctl` would write them."""
        _, stored, server = (key.hex() for key in scram())
        accounts, rosters = self.folder / "data/localhost/accounts", self.folder / "data/localhost/roster"
        accounts.mkdir(parents=True, exist_ok=True)
        rosters.mkdir(parents=True, exist_ok=True)
        account = f'return {{ ["iteration_count"] = {ITERATIONS}; ["salt"] = "{SALT.decode()}"; ' \
                  f'["stored_key"] = "{stored}"; ["server_key"] = "{server}"; }};\n'
        for user in range(users):
            (accounts / f"{prefix}{user}.dat").write_text(account)
            if roster:
                items = "".join(f'["{prefix}{contact}@localhost"] = {{ ["subscription"] = "both"; ["name"] = "{prefix}{contact}"; '
                                '["groups"] = { ["Ring"] = true; }; };\n' for contact in contacts(user, users, roster))
                (rosters / f"{prefix}{user}.dat").write_text(f"return {{ [false] = {{ [\"version\"] = 1; }};\n{items}}};\n")
        self.know_keys(prefix, users)
