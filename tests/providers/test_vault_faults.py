"""Vault at its worst, on the fake: each of these has been seen, or is one line of somebody's configuration away."""

import http.server
import ipaddress
import ssl
import threading
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from broker.domain.errors import Invalid, ProviderRefused, ProviderUnavailable
from broker.providers.base import RevocationClass, SecretRequest
from broker.providers.vault import SecretSource, VaultProvider, VaultSettings
from tests.fakes.vault import FakeVault
from tests.openbao import DATABASE, PKI, SSH
from tests.providers.contract import csr, ssh_key

TTL = timedelta(minutes=2)
CREDS = "GET database/creds/"
CREATE = "POST auth/token/create/jit"
LEASE_LOOK_UP = "PUT sys/leases/lookup"
TOKEN_LOOK_UP = "POST auth/token/lookup-accessor"
DENIED = {"errors": ["1 error occurred:\n\t* permission denied\n\n"]}


def request_of(table=DATABASE, **parameters):
    return SecretRequest(grant_id="grt_01k00000000000000000000000", settings=table, parameters=parameters)


@pytest.fixture
def fake():
    vault = FakeVault()
    yield vault
    vault.close()


@pytest.fixture
def settings(fake, tmp_path):
    """Settings that log in by AppRole, with what a test changes."""
    for name in ("role-id", "secret-id", "jwt"):
        (tmp_path / name).write_text("a-word")
    files = {"role_id_file": str(tmp_path / "role-id"), "secret_id_file": str(tmp_path / "secret-id")}
    table = {"address": fake.address, "auth": {"method": "approle", **files}, "deadline_s": 1}

    def make(**changed):
        return VaultSettings.parse({**table, "lease_prefix_exclusive": True, **changed})

    return make


@pytest.fixture
def provider(fake, settings):
    made = VaultProvider(
        settings(), fake.clock, lambda: [SecretSource.parse(DATABASE)], pause=lambda seconds: fake.work()
    )
    yield made
    made.close()


def issued(provider, table=DATABASE, **parameters):
    request = request_of(table, **parameters)
    handle = provider.prepare(request, TTL)
    return handle, provider.issue(handle, request, TTL)


# --- what is unknown, and what is refused ----------------------------------------------------------------------------

REFUSALS = [400, 403, 404, 405, 429]
UNKNOWN = [412, 472, 473, 500, 501, 502, 503, 504]


@pytest.mark.parametrize("status", REFUSALS)
def test_what_vault_itself_refuses_was_not_made(fake, provider, status):
    handle = provider.prepare(request_of(), TTL)
    fake.answers(CREDS, status, {"errors": ["no"]})
    with pytest.raises(ProviderRefused):
        provider.issue(handle, request_of(), TTL)


@pytest.mark.parametrize("status", UNKNOWN)
def test_what_vault_does_not_say_may_have_been_made(fake, provider, status):
    handle = provider.prepare(request_of(), TTL)
    fake.answers(CREDS, status, {"errors": ["no"]})
    with pytest.raises(ProviderUnavailable):
        provider.issue(handle, request_of(), TTL)


@pytest.mark.parametrize("status", REFUSALS)
def test_a_refusal_that_is_not_vault_s_own_says_nothing(fake, provider, status):
    """A proxy on the way answers in HTML, or in JSON of its own, whatever became of the request behind it."""
    handle = provider.prepare(request_of(), TTL)
    for document in ("<html>", {"message": "no"}, None):
        fake.answers(CREDS, status, document)
        with pytest.raises(ProviderUnavailable):
            provider.issue(handle, request_of(), TTL)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"null", b'{"a":1,"a":2}', b"\xff", b"[" * 100_000, b'{"lease_id":1,"data":[]}']
)
def test_an_answer_that_cannot_be_read_is_unknown(fake, provider, raw):
    handle = provider.prepare(request_of(), TTL)
    fake.says(CREDS, raw)
    with pytest.raises(ProviderUnavailable):
        provider.issue(handle, request_of(), TTL)
    assert len(fake.alive) == 1
    provider.revoke(handle, None)
    fake.work()
    assert not fake.alive


def test_a_compressed_answer_is_not_unpacked(fake, provider):
    handle = provider.prepare(request_of(), TTL)
    data = {"username": "u", "password": "p"}
    lease_id = "database/creds/jit-orders-ro/abcdefgh12345678"
    document = {"lease_id": lease_id, "lease_duration": 60, "data": data}
    fake.answers(CREDS, 200, document, Content_Encoding="gzip")
    with pytest.raises(ProviderUnavailable) as unavailable:
        provider.issue(handle, request_of(), TTL)
    assert unavailable.value.reason == "it is compressed"


def test_an_answer_that_drips_ends_with_the_deadline(fake, provider):
    handle = provider.prepare(request_of(), TTL)
    fake.drips(CREDS)
    with pytest.raises(ProviderUnavailable) as unavailable:
        provider.issue(handle, request_of(), TTL)
    assert "Timeout" in unavailable.value.reason


def test_an_answer_without_end_is_not_read_to_its_end(fake, provider):
    handle = provider.prepare(request_of(), TTL)
    fake.says(CREDS, b'"' + b"x" * 17 * 1024 * 1024)
    with pytest.raises(ProviderUnavailable) as unavailable:
        provider.issue(handle, request_of(), TTL)
    assert unavailable.value.reason.startswith("it has more than")


def test_nobody_at_the_address_is_unavailable(settings, fake):
    provider = VaultProvider(settings(address="http://127.0.0.1:1"), fake.clock)
    with pytest.raises(ProviderUnavailable, match="did not answer"):
        provider.prepare(request_of(), TTL)
    provider.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for 127.0.0.1 that is its own authority, as a file with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "vault")])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime.now(UTC) - timedelta(days=1))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path_factory.mktemp("tls") / "vault.pem"
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    file.write_bytes(made.public_bytes(Encoding.PEM) + private)
    return file


def test_only_a_vault_with_a_certificate_of_the_named_authority_is_told_anything(settings, certificate, monkeypatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    vault = FakeVault(context)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    stranger = VaultProvider(settings(address=vault.address), vault.clock)
    with pytest.raises(ProviderUnavailable) as unavailable:
        stranger.prepare(request_of(), TTL)
    assert "SSL" in unavailable.value.reason
    assert vault.seen == []
    friend = VaultProvider(settings(address=vault.address, ca_file=str(certificate)), vault.clock)
    assert friend.prepare(request_of(), TTL).value
    for each in (stranger, friend, vault):
        each.close()


# --- redirects -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("path", ["POST auth/approle/login", CREATE, CREDS, LEASE_LOOK_UP])
def test_no_redirect_is_followed_and_no_token_goes_where_it_points(fake, provider, status, path):
    heard = []

    class Thief(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            heard.append(dict(self.headers))
            self.send_response(404)
            self.end_headers()

        do_POST = do_PUT = do_GET

        def log_message(self, format, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Thief) as thief:
        thread = threading.Thread(target=thief.serve_forever, args=(0.01,))
        thread.start()
        fake.answers(path, status, None, Location=f"http://127.0.0.1:{thief.server_port}/v1/x")
        with pytest.raises(ProviderUnavailable) as unavailable:
            handle, secret = issued(provider)
            provider.revoke(handle, secret.reference)
        thief.shutdown()
        thread.join()
    assert heard == []
    assert unavailable.value.reason is not None


def test_no_proxy_and_no_netrc_of_the_environment_is_used(fake, provider, monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login agent password hunter2\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    fake.fault(
        CREATE, lambda call: call.answer(400 if "Authorization" in call.handler.headers else 418, {"errors": []})
    )
    with pytest.raises(ProviderUnavailable) as unavailable:
        provider.prepare(request_of(), TTL)
    assert "418" in unavailable.value.reason


def test_every_request_names_the_namespace(fake, settings):
    fake.namespace = "teams/crm"
    provider = VaultProvider(settings(namespace="teams/crm"), fake.clock, pause=lambda seconds: fake.work())
    handle, secret = issued(provider)
    provider.revoke(handle, secret.reference)
    assert not fake.alive
    provider.close()


# --- the child token -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"token_type": "batch", "accessor": ""},
        {"accessor": None},
        {"accessor": "../x"},
        {"orphan": False},
        {"orphan": None},
        {"renewable": True},
        {"num_uses": 1},
        {"policies": ["default", "jit-secrets"]},
        {"policies": ["root"]},
        {"policies": []},
        {"lease_duration": 0},
        {"lease_duration": 121},
        {"lease_duration": None},
        {"client_token": ""},
    ],
    ids=str,
)
def test_a_child_token_that_is_not_as_asked_is_refused_and_killed(fake, provider, wrong):
    fake.child = wrong
    with pytest.raises(ProviderRefused, match="not set up as the broker needs it"):
        provider.prepare(request_of(), TTL)
    if isinstance(wrong.get("accessor", ""), str) and wrong.get("accessor", "x") not in ("", "../x"):
        assert all("jit-secrets" not in token.policies for token in fake.tokens.values())


@pytest.mark.parametrize("status", [403, 500])
def test_a_child_token_that_is_not_as_asked_is_refused_though_it_cannot_be_killed(fake, provider, status):
    """It has no lease and ends by itself; what is wrong with it is what its reader has to hear of."""
    fake.child = {"renewable": True}
    fake.answers("POST auth/token/revoke-accessor", status, {"errors": ["no"]})
    with pytest.raises(ProviderRefused, match="not set up as the broker needs it"):
        provider.prepare(request_of(), TTL)


def test_a_child_token_is_asked_for_with_what_bounds_it_and_nothing_that_widens_it(fake, provider):
    provider.prepare(request_of(), TTL)
    (body,) = [body for method, path, body in fake.seen if path == "auth/token/create/jit"]
    assert body == {
        "ttl": "120s",
        "explicit_max_ttl": "120s",
        "renewable": False,
        "meta": {"grant_id": "grt_01k00000000000000000000000"},
        "display_name": "jit-grt_01k00000000000000000000000",
    }


# --- the secret ------------------------------------------------------------------------------------------------------


def test_a_secret_without_a_lease_is_not_handed_out(fake, provider):
    fake.lease_ttl = None
    handle = provider.prepare(request_of(), TTL)
    with pytest.raises(ProviderUnavailable, match="no lease"):
        provider.issue(handle, request_of(), TTL)


def test_a_certificate_without_a_lease_is_owed_until_it_ends_by_itself(fake, provider):
    fake.lease_ttl = None
    request = request_of(PKI, csr=csr())
    handle = provider.prepare(request, TTL)
    with pytest.raises(ProviderUnavailable, match="no lease") as unavailable:
        provider.issue(handle, request, TTL)
    assert unavailable.value.expires_at >= fake.now + TTL


@pytest.mark.parametrize("lease_id", ["other/creds/jit/abcdefgh", "database/creds/jit-orders-ro/../../x", 7, None])
def test_a_lease_that_is_not_under_the_prefix_of_its_role_is_not_handed_out(fake, provider, lease_id):
    handle = provider.prepare(request_of(), TTL)
    data = {"username": "u", "password": "p"}
    fake.answers(CREDS, 200, {"lease_id": lease_id, "lease_duration": 60, "data": data})
    with pytest.raises(ProviderUnavailable, match="no lease"):
        provider.issue(handle, request_of(), TTL)


@pytest.mark.parametrize("data", [{}, None, [], {"username": "u"}, {"username": "u", "password": 7}, {"password": "p"}])
def test_a_login_without_its_parts_is_not_handed_out_and_its_lease_is_told(fake, provider, data):
    handle = provider.prepare(request_of(), TTL)
    lease_id = "database/creds/jit-orders-ro/abcdefgh12345678"
    fake.answers(CREDS, 200, {"lease_id": lease_id, "lease_duration": 60, "data": data})
    with pytest.raises(ProviderUnavailable) as unavailable:
        provider.issue(handle, request_of(), TTL)
    assert unavailable.value.reference == lease_id
    assert unavailable.value.expires_at == fake.now + timedelta(seconds=60)


@pytest.mark.parametrize("duration", [0, -1, None, "60", True])
def test_a_lease_that_does_not_say_when_it_ends_is_not_handed_out(fake, provider, duration):
    handle = provider.prepare(request_of(), TTL)
    lease_id = "database/creds/jit-orders-ro/abcdefgh12345678"
    data = {"username": "u", "password": "p"}
    fake.answers(CREDS, 200, {"lease_id": lease_id, "lease_duration": duration, "data": data})
    with pytest.raises(ProviderUnavailable, match="when it ends"):
        provider.issue(handle, request_of(), TTL)


STS = {
    "engine": "generic",
    "mount": "aws",
    "path": "sts/jit-reader",
    "method": "write",
    "revocation": "ttl_only",
    "ttl_parameter": "ttl",
    "least_ttl_s": 900,
}
KUBERNETES = {
    "engine": "generic",
    "mount": "kubernetes",
    "path": "creds/jit-deployer",
    "method": "write",
    "revocation": "hard",
    "ttl_parameter": "ttl",
    "parameters": {"kubernetes_namespace": "agents"},
}
RABBITMQ = {"engine": "generic", "mount": "rabbitmq", "path": "creds/jit-queue", "revocation": "hard"}


@pytest.mark.parametrize(
    ("table", "parameters"),
    [(PKI, {"csr": csr()}), (SSH, {"public_key": ssh_key()}), (STS, {})],
    ids=["pki", "ssh", "sts"],
)
def test_what_nothing_can_end_is_not_handed_out_if_it_lives_longer_than_was_asked(fake, provider, table, parameters):
    fake.overlong = True
    fake.lease_ttl = timedelta(hours=1)
    request = request_of(table, **parameters)
    ttl = timedelta(minutes=15)
    handle = provider.prepare(request, ttl)
    with pytest.raises(ProviderUnavailable, match="longer than was asked") as unavailable:
        provider.issue(handle, request, ttl)
    # The debt has to know until when.
    assert unavailable.value.expires_at > fake.now + ttl


def test_a_login_says_how_long_it_lasts_if_vault_forgets_that_its_token_ends_it(fake, provider):
    fake.lease_ttl = timedelta(hours=1)
    request = request_of(DATABASE)
    handle = provider.prepare(request, TTL)
    secret = provider.issue(handle, request, TTL)
    assert secret.expires_at == handle.expires_at < secret.lasts_until == fake.now + timedelta(hours=1)


def test_an_ssh_certificate_for_everybody_is_not_handed_out(fake, provider):
    fake.ssh_principals = False
    request = request_of(SSH, public_key=ssh_key())
    handle = provider.prepare(request, TTL)
    with pytest.raises(ProviderUnavailable, match="other users"):
        provider.issue(handle, request, TTL)


@pytest.mark.parametrize(("table", "name"), [(PKI, "csr"), (SSH, "public_key")], ids=["pki", "ssh"])
def test_a_certificate_for_another_key_is_not_handed_out(fake, provider, table, name):
    make = csr if name == "csr" else ssh_key
    request = request_of(table, **{name: make()})
    handle = provider.prepare(request, TTL)
    # As from an engine that mixes up two callers.
    fake.fault("POST (pki|ssh)/sign/", lambda call: (call.body.update({name: make()}), call.answer(*fake._done(call))))
    with pytest.raises(ProviderUnavailable, match="another key"):
        provider.issue(handle, request, TTL)


def test_a_kubernetes_token_is_asked_for_with_what_the_configuration_fixes(fake, provider):
    handle, secret = issued(provider, KUBERNETES)
    assert secret.data.names == ("service_account_name", "service_account_namespace", "service_account_token")
    assert secret.reference.startswith("kubernetes/creds/jit-deployer/")
    (body,) = [body for _, path, body in fake.seen if path == "kubernetes/creds/jit-deployer"]
    assert body == {"kubernetes_namespace": "agents", "ttl": "120s"}
    provider.revoke(handle, secret.reference)
    assert not fake.alive


def test_a_rabbitmq_login_is_revoked_by_its_lease(fake, provider):
    handle, secret = issued(provider, RABBITMQ)
    assert secret.data.names == ("password", "username")
    provider.revoke(handle, secret.reference)
    assert not fake.alive


def test_an_aws_session_says_that_only_time_ends_it(fake, provider):
    request = request_of(STS)
    handle = provider.prepare(request, timedelta(minutes=15))
    secret = provider.issue(handle, request, timedelta(minutes=15))
    assert handle.revocation is RevocationClass.TTL_ONLY
    assert secret.expires_at == fake.now + timedelta(minutes=15)
    assert secret.data.names == ("access_key", "arn", "secret_key", "security_token", "ttl")


def test_a_life_below_what_the_engine_can_give_is_refused_before_vault_is_asked(fake, provider):
    with pytest.raises(Invalid, match="at least 905 s"):
        provider.foresee(request_of(STS), timedelta(seconds=904))
    with pytest.raises(ProviderRefused, match="less than this credential can live"):
        provider.prepare(request_of(STS), timedelta(seconds=899))
    assert fake.seen == []


# --- revocation ------------------------------------------------------------------------------------------------------


def test_a_204_that_only_queued_the_work_is_not_death(fake, provider):
    """INV-04."""
    handle, secret = issued(provider)
    fake.queue_works = False
    with pytest.raises(ProviderUnavailable, match="has not confirmed that the lease died"):
        provider.revoke(handle, secret.reference)
    assert fake.alive
    fake.queue_works = True
    provider.revoke(handle, secret.reference)
    assert not fake.alive


NOT_DEATH = [
    (403, DENIED),
    (403, "<html>"),
    (404, {"errors": []}),
    (404, "<html>"),
    (400, {"errors": ["missing client token"]}),
    (400, {"message": "invalid lease invalid accessor"}),
    (429, {"errors": ["rate limit quota exceeded"]}),
    (472, {"errors": []}),
    (473, {"errors": []}),
    (500, {"errors": ["invalid lease", "invalid accessor"]}),
    (503, {"errors": ["Vault is sealed"]}),
    (200, {"data": None}),
    (200, {"data": {}}),
    (200, {"data": {"id": "another", "accessor": "another"}}),
    (204, None),
]


@pytest.mark.parametrize("look_up", [LEASE_LOOK_UP, TOKEN_LOOK_UP], ids=["lease", "token"])
@pytest.mark.parametrize(("status", "document"), NOT_DEATH, ids=str)
def test_only_vault_s_own_word_is_death(fake, provider, look_up, status, document):
    """INV-04, INV-24: a 403 may be our own token, a 404 a proxy."""
    handle, secret = issued(provider)
    fake.answers(look_up, status, document, times=99)
    with pytest.raises(ProviderUnavailable, match="did not say whether it died"):
        provider.revoke(handle, secret.reference)


def test_a_step_that_is_refused_does_not_keep_the_next_from_being_tried(fake, provider):
    handle, secret = issued(provider)
    fake.answers("POST auth/token/revoke-accessor", 403, DENIED, times=99)
    with pytest.raises(ProviderUnavailable, match="that the token died") as unavailable:
        provider.revoke(handle, secret.reference)
    assert "permission denied" in unavailable.value.reason
    assert not fake.alive


def test_a_target_that_is_down_leaves_an_open_debt_that_is_paid_when_it_is_back(fake, provider):
    handle, secret = issued(provider)
    fake.target_works = False
    for _ in range(8):
        with pytest.raises(ProviderUnavailable):
            provider.revoke(handle, secret.reference)
    lease = fake.leases[secret.reference]
    # Vault itself has given up, and would try again tomorrow.
    assert lease.irrevocable
    (live,) = provider.list_live()
    assert live.trouble == "the target does not answer"
    fake.target_works = True
    provider.revoke(handle, secret.reference)
    assert not fake.alive


def test_a_lease_that_is_registered_after_its_token_died_is_found_by_listing(fake, provider):
    """A request past its token check when the token is revoked: nothing but the list knows of what it made."""
    request = request_of()
    handle = provider.prepare(request, TTL)
    fake.flies(CREDS)
    with pytest.raises(ProviderUnavailable):
        provider.issue(handle, request, TTL)
    provider.revoke(handle, None)
    fake.advance(timedelta(seconds=89))
    assert provider.list_live() == ()
    fake.land()
    (late,) = provider.list_live()
    provider.revoke(handle, None)
    fake.advance(provider.settles_after)
    assert fake.alive, "the handle cannot kill it: its token was dead before the lease was there"
    assert late.issued_at is not None
    provider.revoke(None, late.reference)
    assert not fake.alive


# --- the list --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "document"),
    [
        (403, DENIED),
        (404, {"errors": ["no handler for route"]}),
        (404, "<html>"),
        (404, {"data": {}}),
        (200, {"data": {}}),
        (200, {"data": {"keys": "x"}}),
        (200, {"data": {"keys": [7]}}),
        (200, {"data": {"keys": ["../../sys/raw"]}}),
        (204, None),
        (503, {"errors": []}),
    ],
    ids=str,
)
def test_a_list_that_is_not_vault_s_own_is_not_an_empty_one(fake, provider, status, document):
    fake.answers("LIST sys/leases/lookup/", status, document, times=2)
    with pytest.raises(ProviderUnavailable):
        provider.list_live()


def test_what_is_said_of_another_lease_is_not_said_of_this_one(fake, provider):
    _, secret = issued(provider)
    fake.answers(LEASE_LOOK_UP, 200, {"data": {"id": secret.reference + "x", "issue_time": "2026-03-01T12:00:00Z"}})
    with pytest.raises(ProviderUnavailable):
        provider.list_live()


def test_a_list_that_loops_ends(fake, provider):
    fake.answers("LIST sys/leases/lookup/", 200, {"data": {"keys": ["again/"]}}, times=99)
    assert provider.list_live() == ()
    assert len([path for method, path, _ in fake.seen if method == "LIST"]) < 10


# --- the broker's own token ------------------------------------------------------------------------------------------


def test_the_broker_s_own_token_is_renewed_in_time_and_replaced_when_it_ends(fake, provider):
    for _ in range(3):
        provider.list_live()
    assert (fake.logins, fake.renewals) == (1, 0)
    fake.advance(timedelta(seconds=2401))
    provider.list_live()
    assert (fake.logins, fake.renewals) == (1, 1)
    fake.advance(timedelta(hours=2))
    provider.list_live()
    assert fake.logins == 2


def test_a_renewal_that_fails_does_no_harm_while_the_token_is_good(fake, provider):
    provider.list_live()
    fake.advance(timedelta(seconds=2401))
    fake.answers("POST auth/token/renew-self", 503, {"errors": []}, times=99)
    provider.list_live()
    provider.list_live()
    asked = [path for _, path, _ in fake.seen if path == "auth/token/renew-self"]
    assert len(asked) == 1, "it is left alone for a moment, and not asked by every call"


def test_a_renewal_that_adds_little_is_a_new_login(fake, provider):
    """Near the maximum of a token's life each renewal adds less."""
    provider.list_live()
    fake.advance(timedelta(seconds=2401))
    short = {"client_token": "x", "lease_duration": 30, "renewable": True}
    fake.answers("POST auth/token/renew-self", 200, {"auth": short})
    provider.list_live()
    assert fake.logins == 2


def test_a_token_that_vault_forgot_is_replaced_at_once(fake, provider):
    handle, secret = issued(provider)
    fake.advance(timedelta(seconds=5))
    for token in [token for token in fake.tokens.values() if "jit-broker" in token.policies]:
        del fake.tokens[token.id]
    provider.revoke(handle, secret.reference)
    assert fake.logins == 2


def test_a_policy_that_is_wrong_does_not_become_a_login_for_each_call(fake, provider):
    provider.list_live()
    fake.answers(CREATE, 403, DENIED, times=99)
    for _ in range(20):
        with pytest.raises(ProviderRefused):
            provider.prepare(request_of(), TTL)
    assert fake.logins <= 2


def test_a_login_that_is_refused_is_no_debt_and_is_not_tried_by_every_caller(fake, provider):
    fake.login_works = False
    for _ in range(5):
        with pytest.raises(ProviderRefused, match="refused to let the broker in"):
            provider.prepare(request_of(), TTL)
    assert fake.logins == 1
    fake.login_works = True
    fake.advance(timedelta(seconds=3))
    provider.prepare(request_of(), TTL)


def test_whoever_waited_while_a_login_had_no_answer_does_not_wait_for_the_next(fake, provider):
    """A login that nobody answers takes the whole deadline: ten callers would wait for ten of them in a row."""

    def silent(call):
        fake.now += timedelta(seconds=10)
        call.hang_up()

    fake.fault("POST auth/approle/login", silent, times=99)
    for _ in range(5):
        with pytest.raises(ProviderUnavailable):
            provider.list_live()
    assert len([path for _, path, _ in fake.seen if path == "auth/approle/login"]) == 1


def test_a_policy_that_refuses_is_not_a_vault_that_forgot_the_broker(fake, settings):
    """Taken for that, one role that is wrong would shut every other until all that lives was looked at anew."""
    forgotten = []
    provider = VaultProvider(settings(), fake.clock, forgotten=lambda: forgotten.append(fake.now))
    provider.prepare(request_of(), TTL)
    fake.advance(timedelta(seconds=5))
    fake.answers(CREATE, 403, DENIED)
    with pytest.raises(ProviderRefused):
        provider.prepare(request_of(), TTL)
    assert (forgotten, fake.logins) == ([], 1)
    fake.tokens.clear()
    provider.prepare(request_of(), TTL)
    assert (forgotten, fake.logins) == ([fake.now], 2)
    provider.close()


def test_that_vault_forgot_the_broker_is_told_where_it_shows_when_its_token_is_renewed(fake, settings):
    """INV-37: with a new token everything would go on as if Vault had not gone back in time."""
    forgotten = []
    provider = VaultProvider(settings(), fake.clock, forgotten=lambda: forgotten.append(fake.now))
    provider.prepare(request_of(), TTL)
    fake.advance(timedelta(seconds=2401))
    fake.answers("POST auth/token/renew-self", 403, DENIED)
    provider.prepare(request_of(), TTL)
    assert (forgotten, fake.logins) == ([], 2)
    fake.advance(timedelta(seconds=2401))
    fake.tokens.clear()
    provider.prepare(request_of(), TTL)
    assert (forgotten, fake.logins) == ([fake.now], 3)
    provider.close()


@pytest.mark.parametrize("auth", [{}, {"client_token": "s.x"}, {"client_token": "a\nb", "lease_duration": 60}], ids=str)
def test_a_login_without_a_usable_token_is_unknown(fake, provider, auth):
    fake.answers("POST auth/approle/login", 200, {"auth": auth})
    with pytest.raises(ProviderUnavailable):
        provider.prepare(request_of(), TTL)


def test_the_broker_logs_in_with_its_kubernetes_service_account(fake, settings, tmp_path):
    auth = {"method": "kubernetes", "role": "broker", "token_file": str(tmp_path / "jwt")}
    provider = VaultProvider(settings(auth=auth), fake.clock)
    provider.prepare(request_of(), TTL)
    assert fake.seen[0] == ("POST", "auth/kubernetes/login", {"role": "broker", "jwt": "a-word"})
    provider.close()


def test_a_file_of_the_login_that_is_missing_or_holds_more_than_a_word_is_told_by_its_name_alone(
    fake, provider, tmp_path
):
    for content in (None, "", "two words", "x" * 70_000, "\x00"):
        (tmp_path / "secret-id").unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "secret-id").write_text(content)
        with pytest.raises(ProviderRefused) as refused:
            provider.prepare(request_of(), TTL)
        assert "secret-id" in refused.value.reason
        assert "secret-id" not in refused.value.detail
        assert "two words" not in repr(vars(refused.value))
        fake.advance(timedelta(seconds=3))


def test_a_token_file_that_changed_is_read_at_once(fake, settings, tmp_path):
    """An agent beside the broker replaces the token before the old one ends."""
    heard = []
    fake.fault(CREATE, lambda call: (heard.append(call.token), call.answer(*fake._done(call))), times=2)
    file = tmp_path / "token"
    file.write_text(fake.own_token().id)
    auth = {"method": "token_file", "token_file": str(file)}
    provider = VaultProvider(settings(auth=auth), fake.clock)
    provider.prepare(request_of(), TTL)
    file.write_text(fake.own_token().id + "\n")
    provider.prepare(request_of(), TTL)
    provider.close()
    assert heard[1] == file.read_text().strip() != heard[0]


def test_many_callers_make_one_login(fake, provider):
    threads = [threading.Thread(target=provider.list_live) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fake.logins == 1


def test_a_ttl_below_a_second_and_an_id_that_is_no_grant_are_errors_of_ours(provider):
    with pytest.raises(ValueError, match="one second"):
        provider.prepare(request_of(), timedelta(milliseconds=900))
    with pytest.raises(ValueError, match="grant"):
        provider.prepare(SecretRequest(grant_id="x/../y", settings=DATABASE), TTL)


@pytest.mark.parametrize("reference", ["", "a//b", "../x", "a/..%2f", "a/b?c", "a b"])
def test_a_reference_that_vault_never_gave_reaches_no_path(fake, provider, reference):
    """INV-31: it comes out of a row, and rows are not beyond doubt."""
    with pytest.raises(ValueError, match="reference"):
        provider.revoke(None, reference)
    assert fake.seen == []
