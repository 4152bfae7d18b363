"""A Vault that is nastier than the real one: an HTTP server in a thread, on a clock that only tests move.

It keeps what was measured on OpenBao 2.7: `revoke-accessor` only queues the leases of a token; a `sync` revocation may
answer 204 while the queue works on the same lease; revoking what does not exist is a success; after six failures a
lease is irrevocable and left alone for a day; a request past its token check registers its lease after the token died.
What changed something says how far the storage was then (`X-Vault-Index`), and a look that is asked for since that
moment is refused by a node that is behind.
What is on top of that a test asks for: see `FakeVault`'s faults.
"""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    SSHCertificateBuilder,
    SSHCertificateType,
    load_ssh_public_key,
)

BEGIN = datetime(2026, 3, 1, 12, tzinfo=UTC)
GIVES_UP_AFTER = 6
TRIES_AGAIN_AFTER = timedelta(days=1)
MAX_REQUEST = timedelta(seconds=90)


@dataclass
class Token:
    id: str
    accessor: str
    policies: tuple[str, ...]
    expires_at: datetime | None
    meta: Mapping[str, str] = field(default_factory=dict)
    renewable: bool = False
    orphan: bool = True
    type: str = "service"
    life_s: int = 0
    uses: int = 0


@dataclass
class Lease:
    id: str
    token: str
    secret: str  # what it opens at the target
    issued_at: datetime
    expires_at: datetime
    renewable: bool
    queued: bool = False
    failures: int = 0
    error: str | None = None
    tries_at: datetime | None = None

    @property
    def irrevocable(self) -> bool:
        return self.failures >= GIVES_UP_AFTER


@dataclass
class Fault:
    """What happens to the next `times` requests whose method and path match."""

    match: re.Pattern[str]
    act: Callable[[Call], None]
    times: int


class Call:
    """One request, and the ways to answer it wrongly."""

    def __init__(self, vault: FakeVault, handler: BaseHTTPRequestHandler, body: Mapping[str, Any]) -> None:
        self.vault = vault
        self.handler = handler
        self.body = body
        self.method = "LIST" if "list=true" in handler.path else handler.command
        self.path = handler.path.partition("?")[0].removeprefix("/v1/")
        self.token = handler.headers.get("X-Vault-Token", "")
        self.namespace = handler.headers.get("X-Vault-Namespace", "")
        self.since = int(handler.headers.get("X-Vault-Index") or 0)
        self.index: int | None = None  # that the answer tells

    def answer(self, status: int, document: Any = None, **headers: str) -> None:
        self.raw(status, b"" if document is None else json.dumps(document).encode(), **headers)

    def raw(self, status: int, body: bytes, **headers: str) -> None:
        self.handler.send_response(status)
        if self.index is not None and self.vault.tells_its_index:
            self.handler.send_header("X-Vault-Index", str(self.index))
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.send_header("Content-Length", str(len(body)))
        self.handler.end_headers()
        self.handler.wfile.write(body)

    def hang_up(self) -> None:
        self.handler.close_connection = True


class _Refusal(Exception):
    def __init__(self, status: int, *errors: str) -> None:
        super().__init__(*errors)
        self.status, self.errors = status, errors


class FakeVault:
    """Answers like Vault until told otherwise. `clock` is the time, for the server and for whoever is tested."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.now = BEGIN
        self.sealed = False
        self.namespace = ""
        # How the set-up may be wrong, and what the target does.
        self.child: dict[str, Any] = {}  # members of a child token's `auth` that are not as asked
        self.lease_ttl: timedelta | None = timedelta(minutes=10)  # None: secrets without a lease
        self.target_works = True
        self.queue_works = True
        self.own_ttl_s = 3600
        self.logins = 0
        self.renewals = 0
        self.login_works = True
        self.tells_its_index = True  # as OpenBao does since 2.7, and HashiCorp's does not
        self.index = 1  # of the storage, at the active node
        self.transit: dict[str, list[bytes]] = {}  # the versions of each key of the transit engine
        self.least_version = 1  # that still opens what it wrapped
        self.seen: list[tuple[str, str, dict[str, Any]]] = []  # method, path, body; never a token
        self.tokens: dict[str, Token] = {}
        self.leases: dict[str, Lease] = {}
        self.alive: set[str] = set()  # what opens something at the target
        self._standby: tuple[int, set[str], set[str]] | None = None  # that is asked: its index, accessors and leases
        self._faults: list[Fault] = []
        self._landing: list[Callable[[], None]] = []
        self._guard = threading.RLock()
        self._closing = threading.Event()
        self._ca = ec.generate_private_key(ec.SECP256R1())
        self._ssh_ca = ed25519.Ed25519PrivateKey.generate()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.address = f"{'http' if tls is None else 'https'}://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def clock(self) -> datetime:
        return self.now

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    # --- what a test asks for ------------------------------------------------------------------------------------

    def advance(self, by: timedelta) -> None:
        """Let time pass: tokens and leases end, what is in flight lands or is given up, the queue works."""
        with self._guard:
            self.now += by
            for token in list(self.tokens.values()):
                if token.expires_at is not None and token.expires_at <= self.now:
                    self._end_token(token)
            for lease in list(self.leases.values()):
                if lease.expires_at <= self.now or lease.queued:
                    lease.queued = True
            self.work()

    def work(self) -> None:
        """One pass of the revocation queue."""
        with self._guard:
            if not self.queue_works:
                return
            for lease in list(self.leases.values()):
                due = lease.tries_at is None or lease.tries_at <= self.now
                if lease.queued and due:
                    self._revoke(lease)

    def land(self) -> None:
        """What was in flight arrives now: its lease is registered, whatever became of its token."""
        with self._guard:
            for landing in self._landing:
                landing()
            self._landing.clear()

    def falls_behind(self) -> None:
        """From now on a standby is asked, which passes on what changes something and answers looks from what it has."""
        with self._guard:
            self._standby = (self.index, {token.accessor for token in self.tokens.values()}, set(self.leases))

    def hears_of_tokens(self) -> None:
        """The standby knows all that there are by now, and what they read as before."""
        with self._guard:
            assert self._standby is not None
            self._standby[1].update(token.accessor for token in self.tokens.values())

    def catches_up(self) -> None:
        self._standby = None

    def fault(self, match: str, act: Callable[[Call], None], times: int = 1) -> None:
        self._faults.append(Fault(re.compile(match), act, times))

    def answers(self, match: str, status: int, document: Any = None, *, times: int = 1, **headers: str) -> None:
        """Answer so, doing nothing."""
        self.fault(match, lambda call: call.answer(status, document, **headers), times)

    def says(self, match: str, raw: bytes, *, status: int = 200, times: int = 1, **headers: str) -> None:
        """Do it, and answer these bytes."""

        def act(call: Call) -> None:
            self._done(call)
            call.raw(status, raw, **headers)

        self.fault(match, act, times)

    def loses_reply(self, match: str, *, times: int = 1) -> None:
        """Do it, and hang up without a word."""

        def act(call: Call) -> None:
            self._done(call)
            call.hang_up()

        self.fault(match, act, times)

    def flies(self, match: str) -> None:
        """Past its token check and then slow: nobody hears of it before `land`."""

        def act(call: Call) -> None:
            self._require_token(call)
            self._landing.append(lambda: self._done(call, checked=True))
            call.hang_up()

        self.fault(match, act)

    def drips(self, match: str, every_s: float = 0.1) -> None:
        """A byte now and then, for ever: no single read of it is slow."""

        def act(call: Call) -> None:
            call.hang_up()
            call.handler.send_response(200)
            call.handler.send_header("Content-Length", "1000000")
            call.handler.end_headers()
            while not self._closing.wait(every_s):
                try:
                    call.handler.wfile.write(b" ")
                except OSError:
                    return

        self.fault(match, act)

    # --- the server ----------------------------------------------------------------------------------------------

    def handle(self, call: Call) -> None:
        with self._guard:
            self.seen.append((call.method, call.path, dict(call.body)))
            for fault in self._faults:
                if fault.times > 0 and fault.match.search(f"{call.method} {call.path}"):
                    fault.times -= 1
                    break
            else:
                fault = None
        if fault is not None:
            fault.act(call)
            return
        status, document = self._done(call)
        call.answer(status, document)

    def _done(self, call: Call, *, checked: bool = False) -> tuple[int, Any]:
        with self._guard:
            if self.sealed:
                return 503, {"errors": ["Vault is sealed"]}
            try:
                return self._route(call, checked)
            except _Refusal as refusal:
                return refusal.status, {"errors": list(refusal.errors)}

    def _route(self, call: Call, checked: bool) -> tuple[int, Any]:
        if call.namespace != self.namespace:
            raise _Refusal(404, f'no handler for route "{call.path}". route entry not found.')
        if re.fullmatch(r"auth/(approle|kubernetes|jwt)/login", call.path):
            return self._log_in(call)
        if not checked:
            self._require_token(call)
        own = self.tokens.get(call.token)
        is_child = own is not None and "jit-secrets" in own.policies
        if is_child != bool(re.match(r"(database|rabbitmq|kubernetes|aws|pki|ssh)/", call.path)) and not checked:
            raise _Refusal(403, "1 error occurred:\n\t* permission denied\n\n")
        path, body = call.path, call.body
        if not re.match(r"auth/token/lookup|sys/leases/lookup", path):
            self.index += 1
            call.index = self.index
        elif self._standby is not None and call.since > self._standby[0]:
            raise _Refusal(429)  # without a word, as measured on a cluster
        if path.startswith("auth/token/create/"):
            return self._create(path.rsplit("/", 1)[1], body)
        if path == "auth/token/lookup-self":
            assert own is not None
            ttl = int((own.expires_at - self.now).total_seconds()) if own.expires_at else 0
            return _data({"ttl": ttl, "renewable": own.renewable, "accessor": own.accessor})
        if path == "auth/token/renew-self":
            assert own is not None
            self.renewals += 1
            own.expires_at = self.now + timedelta(seconds=own.life_s)
            return 200, {"auth": _auth(own, own.life_s)}
        if path in ("auth/token/revoke-accessor", "auth/token/lookup-accessor"):
            token = next((t for t in self.tokens.values() if t.accessor == body.get("accessor")), None)
            if path.endswith("lookup-accessor"):
                if token is None or (self._standby is not None and token.accessor not in self._standby[1]):
                    raise _Refusal(400, "1 error occurred:\n\t* invalid accessor\n\n")
                return _data({"accessor": token.accessor, "orphan": token.orphan, "meta": token.meta})
            if token is None or (self._standby is not None and token.accessor not in self._standby[1]):
                # That which has nothing to change is answered by whoever is asked.
                call.index = self._standby[0] if self._standby is not None else self.index
                return 200, {"warnings": ["No token found with this accessor"], "data": None}
            self._end_token(token)
            return 204, None
        if path == "sys/leases/lookup":
            return self._look_up(str(body.get("lease_id")))
        if path.startswith("sys/leases/lookup/"):
            prefix = path.removeprefix("sys/leases/lookup/").rstrip("/") + "/"
            known = self.leases.keys() if self._standby is None else self._standby[2]
            keys = sorted({_next(lease_id[len(prefix) :]) for lease_id in known if lease_id.startswith(prefix)})
            if not keys:
                raise _Refusal(404)
            return _data({"keys": keys})
        if path.startswith("sys/leases/revoke/"):
            lease = self.leases.get(path.removeprefix("sys/leases/revoke/"))
            if lease is None or (lease.queued and not lease.irrevocable):
                # As measured: nothing to do, or the queue is at it; either way it says that it is done.
                return 204, None
            lease.queued = True
            if body.get("sync") and not self._revoke(lease):
                raise _Refusal(500, f"failed to revoke entry: {lease.error}")
            return 204, None
        if path.startswith("transit/"):
            return self._transit(path, body)
        return self._secret(call)

    def _require_token(self, call: Call) -> None:
        if call.token not in self.tokens:
            raise _Refusal(403, "permission denied")

    def _log_in(self, call: Call) -> tuple[int, Any]:
        self.logins += 1
        if not self.login_works:
            raise _Refusal(400, "invalid role or secret ID")
        return 200, {"auth": _auth(self.own_token(), self.own_ttl_s)}

    def own_token(self, *, renewable: bool = True) -> Token:
        """A token with the broker's policy, as a login or an agent beside the broker would get it."""
        token = Token(
            id=f"s.{secrets.token_hex(12)}",
            accessor=secrets.token_hex(12),
            policies=("jit-broker",),
            expires_at=self.now + timedelta(seconds=self.own_ttl_s) if self.own_ttl_s else None,
            renewable=renewable,
            life_s=self.own_ttl_s,
        )
        with self._guard:
            self.tokens[token.id] = token
        return token

    def _create(self, role: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        if role != "jit":
            raise _Refusal(400, f"unknown role {role}")
        life_s = int(str(body["ttl"]).removesuffix("s"))
        token = Token(
            id=f"s.{secrets.token_hex(12)}",
            accessor=secrets.token_hex(12),
            policies=("jit-secrets",),
            expires_at=self.now + timedelta(seconds=life_s),
            meta=dict(body["meta"]),
        )
        self.tokens[token.id] = token
        return 200, {"auth": {**_auth(token, life_s), **self.child}}

    def _end_token(self, token: Token) -> None:
        """The token is gone at once, its leases are queued: those it has now."""
        self.tokens.pop(token.id, None)
        for lease in self.leases.values():
            if lease.token == token.id:
                lease.queued = True

    def _revoke(self, lease: Lease) -> bool:
        if not self.target_works:
            lease.failures += 1
            lease.error = "the target does not answer"
            if lease.irrevocable:
                lease.tries_at = self.now + TRIES_AGAIN_AFTER
            return False
        del self.leases[lease.id]
        self.alive.discard(lease.secret)
        return True

    def _look_up(self, lease_id: str) -> tuple[int, Any]:
        lease = self.leases.get(lease_id)
        if lease is None or (self._standby is not None and lease_id not in self._standby[2]):
            raise _Refusal(400, "invalid lease")
        seen = {
            "id": lease.id,
            "issue_time": _nanoseconds(lease.issued_at),
            "expire_time": _nanoseconds(self.now if lease.queued else lease.expires_at),
            "ttl": 0 if lease.queued else int((lease.expires_at - self.now).total_seconds()),
            "renewable": lease.renewable,
        }
        if lease.error:
            seen["revoke_error"] = lease.error
        return _data(seen)

    def _transit(self, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        _, operation, name = path.split("/")
        versions = self.transit.get(name)
        if versions is None:
            # As measured: a policy without "create" sees no more of a key that is not there.
            if operation == "encrypt":
                raise _Refusal(403, "1 error occurred:\n\t* permission denied\n\n")
            raise _Refusal(400, "encryption key not found")
        bound_to = base64.b64decode(body["associated_data"])
        if operation == "encrypt":
            nonce = os.urandom(12)
            sealed = nonce + AESGCM(versions[-1]).encrypt(nonce, base64.b64decode(body["plaintext"]), bound_to)
            return _data({"ciphertext": f"vault:v{len(versions)}:{base64.b64encode(sealed).decode()}"})
        version, _, text = str(body["ciphertext"]).removeprefix("vault:v").partition(":")
        if int(version) > len(versions):
            raise _Refusal(400, "invalid ciphertext: version is too new")
        if int(version) < self.least_version:
            raise _Refusal(400, "ciphertext or signature version is disallowed by policy (too old)")
        try:
            sealed = base64.b64decode(text if len(text) % 4 == 0 else "?", validate=True)
        except ValueError:
            raise _Refusal(400, "invalid ciphertext: could not decode base64") from None
        try:
            plaintext = AESGCM(versions[int(version) - 1]).decrypt(sealed[:12], sealed[12:], bound_to)
        except (InvalidTag, ValueError):
            raise _Refusal(400, "cipher: message authentication failed") from None
        return _data({"plaintext": base64.b64encode(plaintext).decode()})

    # --- engines -------------------------------------------------------------------------------------------------

    def _secret(self, call: Call) -> tuple[int, Any]:
        engine, _, rest = call.path.partition("/")
        make = getattr(self, f"_{engine}", None)
        role = rest.rsplit("/", 1)[-1]
        if make is None or not role.startswith("jit"):
            raise _Refusal(400, f"unknown role: {role}")
        name = f"{engine}-{secrets.token_hex(8)}"
        data = make(call.body, name)
        self.alive.add(name)
        if engine == "ssh" or self.lease_ttl is None:
            return _data(data)
        asked = call.body.get("ttl")
        life = timedelta(seconds=int(str(asked).removesuffix("s"))) if asked and not self.overlong else self.lease_ttl
        lease = Lease(
            id=f"{call.path}/{secrets.token_hex(12)}",
            token=call.token,
            secret=name,
            issued_at=self.now,
            expires_at=self.now + life,
            renewable=engine in ("database", "rabbitmq"),
        )
        self.leases[lease.id] = lease
        envelope = {"lease_id": lease.id, "lease_duration": int(life.total_seconds()), "renewable": lease.renewable}
        return 200, {**envelope, "data": data}

    overlong = False  # engines that pay no heed to the time that is asked for

    def _database(self, body: Mapping[str, Any], name: str) -> dict[str, Any]:
        return {"username": name, "password": f"canary-{secrets.token_hex(8)}"}

    def _rabbitmq(self, body: Mapping[str, Any], name: str) -> dict[str, Any]:
        return {"username": name, "password": f"canary-{secrets.token_hex(8)}"}

    def _kubernetes(self, body: Mapping[str, Any], name: str) -> dict[str, Any]:
        if "kubernetes_namespace" not in body:
            raise _Refusal(400, "'kubernetes_namespace' is required")
        return {
            "service_account_name": name,
            "service_account_namespace": body["kubernetes_namespace"],
            "service_account_token": f"canary-{secrets.token_hex(8)}",
        }

    def _aws(self, body: Mapping[str, Any], name: str) -> dict[str, Any]:
        if int(str(body.get("ttl", "3600s")).removesuffix("s")) < 900:
            raise _Refusal(400, "Error assuming role: ValidationError: DurationSeconds must be at least 900")
        canary = f"canary-{secrets.token_hex(8)}"
        return {
            "access_key": name,
            "secret_key": canary,
            "security_token": canary,
            "arn": "arn:aws:sts::1:x",
            "ttl": 900,
        }

    def _pki(self, body: Mapping[str, Any], name: str) -> dict[str, Any]:
        key = None
        if "csr" in body:
            request = x509.load_pem_x509_csr(str(body["csr"]).encode())
            public, subject = request.public_key(), request.subject
        else:
            key = ec.generate_private_key(ec.SECP256R1())
            public = key.public_key()
            subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, str(body["common_name"]))])
        life = self.lease_ttl if self.overlong else timedelta(seconds=int(str(body["ttl"]).removesuffix("s")))
        assert life is not None
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "fake")]))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(self.now - timedelta(seconds=30))
            .not_valid_after(self.now + life)
            .sign(self._ca, hashes.SHA256())
        )
        pem = certificate.public_bytes(Encoding.PEM).decode()
        data = {"certificate": pem, "issuing_ca": pem, "ca_chain": [pem], "serial_number": name, "expiration": 1}
        if key is not None:
            data["private_key"] = key.private_bytes(
                Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()
            ).decode()
            data["private_key_type"] = "ec"
        return data

    def _ssh(self, body: Mapping[str, Any], name: str) -> dict[str, Any]:
        life = timedelta(days=1) if self.overlong else timedelta(seconds=int(str(body["ttl"]).removesuffix("s")))
        builder = (
            SSHCertificateBuilder()
            .public_key(load_ssh_public_key(str(body["public_key"]).encode()))  # type: ignore[arg-type]
            .type(SSHCertificateType.USER)
            .key_id(b"token-jit")
            .serial(1)
            .valid_after((self.now - timedelta(seconds=30)).timestamp())
            .valid_before((self.now + life).timestamp())
        )
        if body.get("valid_principals") and self.ssh_principals:
            builder = builder.valid_principals([p.encode() for p in str(body["valid_principals"]).split(",")])
        else:
            builder = builder.valid_for_all_principals()
        return {"serial_number": name, "signed_key": builder.sign(self._ssh_ca).public_bytes().decode() + "\n"}

    ssh_principals = True


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # many callers at once are a test of ours, not of the kernel
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Quiet: clients hang up on purpose."""


def _auth(token: Token, life_s: int) -> dict[str, Any]:
    return {
        "client_token": token.id,
        "accessor": token.accessor,
        "policies": list(token.policies),
        "token_policies": list(token.policies),
        "metadata": dict(token.meta),
        "lease_duration": life_s,
        "renewable": token.renewable,
        "token_type": token.type,
        "orphan": token.orphan,
        "num_uses": token.uses,
    }


def _data(data: Mapping[str, Any]) -> tuple[int, Any]:
    return 200, {"lease_id": "", "lease_duration": 0, "renewable": False, "data": data}


def _next(rest: str) -> str:
    head, slash, _ = rest.partition("/")
    return head + slash


def _nanoseconds(at: datetime) -> str:
    return at.strftime("%Y-%m-%dT%H:%M:%S.123456789Z")


def _handler(vault: FakeVault) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def _any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or b"{}") if length else {}
            vault.handle(Call(vault, self, body))

        do_GET = do_POST = do_PUT = do_LIST = do_DELETE = _any

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet: what is asked for holds secrets."""

    return Handler
