"""What is kept of what somebody tells, what is outside of a grant, what a span is, and what all of it comes to."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.domain.activity import (
    Activity,
    Beyond,
    beyond,
    covers,
    is_called_like_a_secret,
    place_of,
    require_in_time,
    without_secrets,
)
from broker.domain.clock import LEEWAY
from broker.domain.drift import drift_of
from broker.domain.errors import Invalid
from broker.domain.span import Span, report_of

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
CRM = "https://crm.example/api"


@dataclass(frozen=True, kw_only=True)
class Given:
    """A grant as drift looks at it."""

    id: str = "grt_1"
    task_id: str = "task_1"
    agent: str = "summarizer"
    resource: str = CRM
    provider: str = "jwt"
    scopes: tuple[str, ...] = ("contacts:read", "contacts:write")
    issued_at: datetime = NOW
    expires_at: datetime = NOW + timedelta(minutes=5)
    revoked_at: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class Use:
    grant_id: str = "grt_1"
    scope: str | None = "contacts:read"
    resource: str = CRM
    role: str = "agent"
    denied: bool = False
    count: int = 1
    before_issue: int = 0
    after_end: int = 0
    first_at: datetime = NOW
    last_at: datetime = NOW


def activity(**more):
    told = {
        "id": "act_1",
        "task_id": "task_1",
        "grant_id": "grt_1",
        "reporter": "summarizer",
        "role": "agent",
        "report_sha256": "0" * 64,
        "kind": "request",
        "action": "GET /contacts",
        "resource": CRM,
        "scope": "contacts:read",
        "outcome": "ok",
        "trace_id": None,
        "attributes": {},
        "at": NOW,
        "received_at": NOW,
    }
    return Activity(**told | more)


@pytest.mark.parametrize(
    "used", [CRM, f"{CRM}/", f"{CRM}/contacts", f"{CRM}/contacts/7", f"{CRM}/a..b", f"{CRM}/.well-known/x"]
)
def test_what_lies_below_a_resource_is_the_resource(used):
    assert covers(CRM, used)
    assert covers("urn:db:orders", "urn:db:orders")


@pytest.mark.parametrize(
    "used",
    [
        "https://crm.example/api-admin",
        "https://crm.example",
        "https://crm.example.evil.test/api/x",
        "http://crm.example/api/x",
        "https://CRM.example/api/x",
        f"{CRM}/../admin",
        f"{CRM}/a/../../admin",
        f"{CRM}/%2e%2e/admin",
        f"{CRM}/..%2Fadmin",
        f"{CRM}/..\\admin",
        f"{CRM}/./x",
        "",
    ],
)
def test_what_does_not_is_not(used):
    assert not covers(CRM, used)
    assert not covers("urn:db:orders", "urn:db:orders/more")


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({}, []),
        ({"scope": None}, []),
        ({"scope": "contacts:delete"}, [Beyond.SCOPE]),
        ({"resource": "https://mail.example"}, [Beyond.RESOURCE]),
        ({"at": NOW - LEEWAY}, []),
        ({"at": NOW - LEEWAY - timedelta(seconds=1)}, [Beyond.BEFORE_ISSUE]),
        ({"at": NOW + timedelta(minutes=5)}, []),
        ({"at": NOW + timedelta(minutes=5, seconds=1)}, [Beyond.AFTER_END]),
        ({"scope": "x", "resource": "y", "at": NOW + timedelta(hours=1)}, ["resource", "scope", "after_end"]),
    ],
)
def test_what_is_outside_of_a_grant_says_in_which_way(changed, found):
    assert list(beyond(activity(**changed), Given())) == found


def test_a_grant_that_was_revoked_ended_then():
    grant = Given(revoked_at=NOW + timedelta(seconds=10))
    assert list(beyond(activity(at=NOW + timedelta(seconds=11)), grant)) == [Beyond.AFTER_END]
    assert not list(beyond(activity(at=NOW + timedelta(seconds=10)), grant))


def test_what_is_told_is_neither_to_come_nor_history():
    require_in_time(NOW, NOW)
    require_in_time(NOW + LEEWAY, NOW)
    require_in_time(NOW - timedelta(days=1), NOW)
    for wrong in (NOW + LEEWAY + timedelta(seconds=1), NOW - timedelta(days=1, seconds=1)):
        with pytest.raises(Invalid, match="at is"):
            require_in_time(wrong, NOW)


@pytest.mark.parametrize(
    "name",
    [
        "password", "db.password", "PASSWORD", "userPassword", "token", "access_token", "X-Auth-Token", "Authorization",
        "api_key", "apiKey", "x-api-key", "APIKey", "private-key", "privateKey", "set-cookie", "client_secret", "jwt",
        "aws.secret.access.key", "http.request.header.authorization", "otp", "signature", "ssh_key",
    ],
)  # fmt: skip
def test_a_name_of_a_secret_is_known(name):
    assert is_called_like_a_secret(name)


@pytest.mark.parametrize(
    "name",
    ["usage.input_tokens", "key", "primary_key", "author", "passenger", "tokenizer", "monkey", "batch", "", "🔑"],
)
def test_a_name_of_something_else_is_no_secret(name):
    assert not is_called_like_a_secret(name)


JWT = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl"


@pytest.mark.parametrize(
    ("secret", "around"),
    [
        (JWT, "GET /x with {} and more"),
        ("hvs.CAESIJ1234567890abcdef", "{}"),
        ("ghp_0123456789abcdefghij0123", "as {}!"),
        ("github_pat_0123456789abcdefghij", "as {}!"),
        ("AKIAIOSFODNN7EXAMPLE", "({})"),
        ("xoxb-1234567890-abcdef", "slack {}"),
        ("sk-abcdefghij0123456789", "{}"),
        ("s3cret-and-more", "Authorization: Bearer {}"),
        ("YWRhOnMzY3JldA==", "basic {}"),
        ("MIIEvQIBADANBg", "-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----"),
        ("ada:pw", "https://{}@crm.example/x"),
        ("hunter2", "login password={} user=ada"),
        ("hunter2", "https://crm.example/x?a=b&token={}&c=d"),
    ],
)
def test_what_looks_like_a_secret_is_taken_out(secret, around):
    """INV-30."""
    assert secret not in without_secrets(around.format(secret))
    assert "[secret]" in without_secrets(around.format(secret))


@pytest.mark.parametrize(
    "text", ["search_contacts", "SELECT orders", "GET /contacts/{id}", "basic tier", "eyJ", "sk-1"]
)
def test_text_like_any_other_stays(text):
    assert without_secrets(text) == text


@given(st.text(alphabet="eyJ.-:/@=? sk_hvpaword\n", max_size=2000))
def test_taking_secrets_out_takes_no_longer_than_reading(text):
    assert len(without_secrets(text)) <= len(text) + 8 * len(text)


def test_a_place_has_no_query_and_nobody_who_logs_in():
    assert place_of(f"https://ada:pw@crm.example:8443/api/c?token={JWT}#x") == "https://crm.example:8443/api/c"
    assert place_of("urn:db:orders") == "urn:db:orders"
    assert place_of("http://[::1/x?password=a") == "http://[::1/x"
    assert JWT not in place_of(f"https://crm.example/{JWT}")


# --- spans -----------------------------------------------------------------------------------------------------------


def span(name="work", **attributes):
    more = {key: attributes.pop(key) for key in ("failed", "inbound", "around") if key in attributes}
    told = {key.replace("__", "."): value for key, value in attributes.items()}
    return Span(trace_id="a" * 32, span_id="b" * 16, name=name, started_at=NOW, attributes=told, **more)


@pytest.mark.parametrize(
    ("made", "kind", "action", "outcome"),
    [
        (span(gen_ai__tool__name="search", gen_ai__operation__name="execute_tool"), "tool", "search", "ok"),
        (span("execute_tool search", gen_ai__operation__name="execute_tool"), "tool", "execute_tool search", "ok"),
        (span(gen_ai__tool__name="search", failed=True), "tool", "search", "error"),
        (span(gen_ai__tool__name="search", error__type="timeout"), "tool", "search", "error"),
        (span(db__system__name="postgresql", db__operation__name="SELECT", db__collection__name="orders"),
         "request", "SELECT orders", "ok"),
        (span("SELECT", db__system="postgresql"), "request", "SELECT", "ok"),
        (span(http__request__method="GET", http__route="/contacts/{id}", http__response__status_code="200"),
         "request", "GET /contacts/{id}", "ok"),
        (span(http__method="POST", http__url=f"{CRM}/contacts?token=x", http__status_code="403"),
         "request", "POST /api/contacts", "denied"),
        (span(http__request__method="GET", http__response__status_code="503"), "request", "GET", "error"),
        (span(rpc__system="grpc", rpc__service="crm.Contacts", rpc__method="List"),
         "request", "crm.Contacts/List", "ok"),
        (span("login", broker__kind="secret_use"), "secret_use", "login", "ok"),
        (span("my step", broker__grant_id="grt_1"), "tool", "my step", "ok"),
        (span("my step", broker__grant_id="grt_1", broker__scope="a"), "request", "my step", "ok"),
    ],
)  # fmt: skip
def test_a_span_is_what_its_conventions_say(made, kind, action, outcome):
    report = report_of(made)
    assert (report.kind, report.action, report.outcome) == (kind, action, outcome)
    assert report.id == f"{'a' * 32}:{'b' * 16}"


@pytest.mark.parametrize("made", [span(), span(broker__kind="tools"), span(gen_ai__operation__name="chat")])
def test_a_span_of_a_programs_own_affairs_is_no_activity(made):
    assert report_of(made) is None


def test_a_span_keeps_what_is_chosen_and_nothing_else():
    made = span(
        gen_ai__tool__name="search", gen_ai__tool__call__id="call_7", gen_ai__tool__call__arguments="all of it",
        db__query__text="SELECT name FROM people", broker__grant_id="grt_1", around={"service.name": "crew"},
    )  # fmt: skip
    assert dict(report_of(made).attributes) == {"gen_ai.tool.call.id": "call_7", "service.name": "crew"}


def test_a_span_says_itself_to_which_grant_it_belongs_or_its_program_does():
    own = report_of(span(gen_ai__tool__name="x", broker__grant_id="grt_1", around={"broker.grant_id": "grt_2"}))
    assert (own.grant_id, own.loose) == ("grt_1", False)
    around = report_of(span(gen_ai__tool__name="x", around={"broker.grant_id": "grt_2"}))
    assert (around.grant_id, around.loose) == ("grt_2", True)
    assert report_of(span(gen_ai__tool__name="x")).loose


def test_what_a_program_does_elsewhere_is_not_of_its_grant():
    jwt, login = Given(), Given(provider="vault", resource="urn:db:orders")
    elsewhere = report_of(span(http__request__method="POST", url__full="https://llm.example/v1/chat"))
    there = report_of(span(http__request__method="GET", url__full=f"{CRM}/contacts"))
    asked = report_of(span(http__request__method="GET", http__route="/chat", inbound=True))
    database = report_of(span(db__system__name="postgresql"))
    assert not elsewhere.may_be_of(jwt, "agent")
    assert there.may_be_of(jwt, "agent")
    assert (asked.may_be_of(jwt, "agent"), asked.may_be_of(jwt, "verifier")) == (False, True)
    assert (database.may_be_of(jwt, "agent"), database.may_be_of(login, "agent")) == (False, True)
    named = report_of(
        span(http__request__method="POST", url__full="https://llm.example/v1/chat", broker__grant_id="grt_1")
    )
    assert named.may_be_of(jwt, "agent"), "a span that names the grant means it"


# --- drift -----------------------------------------------------------------------------------------------------------


def test_what_was_used_as_granted_is_no_drift():
    found = drift_of("task_1", [Given()], [Use(), Use(scope="contacts:write")])
    assert not found.drifted
    assert (found.unused, found.outside, found.narrower) == ((), (), ())


def test_what_was_granted_and_never_used_is_told_by_grant_and_summed():
    second = Given(id="grt_2")
    found = drift_of("task_1", [Given(), second], [Use(), Use(grant_id="grt_2", scope="contacts:write")])
    assert [grant.unused for grant in found.grants] == [("contacts:write",), ("contacts:read",)]
    assert not found.drifted, "together they were used whole"
    found = drift_of("task_1", [Given(), second], [Use()])
    [unused] = found.unused
    assert (unused.unused, unused.grants, unused.unreported) == (("contacts:write",), 2, 1)
    [narrower] = found.narrower
    assert narrower.scopes == ("contacts:read",)
    assert "contacts:write" in narrower.in_words


def test_the_narrower_policy_is_one_and_names_hold_nothing_open():
    """INV-31: whatever a resource is called, it stays a name."""
    trick = 'x") when { true }; permit (principal, action, resource); //'
    grant = Given(resource=trick, agent='a"b\\')
    [narrower] = drift_of("task_1", [grant], [Use(resource=trick)]).narrower
    assert narrower.policy.count("permit (") == 2  # the one, and the one that is in a name
    assert '\\") when' in narrower.policy
    [plain] = drift_of("task_1", [Given()], [Use()]).narrower
    assert plain.policy == (
        'permit (principal == Agent::"summarizer", action in [Action::"contacts:read"], '
        'resource == Resource::"https://crm.example/api");'
    )


def test_a_report_that_names_no_scope_proves_nothing_about_scopes():
    found = drift_of("task_1", [Given()], [Use(), Use(scope=None, count=3)])
    assert (found.grants[0].unsaid, found.unused[0].unsaid) == (3, 3)
    assert found.narrower == (), "perhaps it was the other scope"


def test_what_was_refused_is_no_use_and_may_be_an_attempt():
    found = drift_of("task_1", [Given()], [Use(denied=True), Use(scope="contacts:delete", denied=True, count=2)])
    assert found.grants[0].used == ()
    [outside] = found.outside
    assert (outside.why, outside.scope, outside.denied, outside.count) == (Beyond.SCOPE, "contacts:delete", True, 2)


def test_a_use_may_be_outside_in_several_ways():
    used = Use(scope="x", resource="https://mail.example", count=4, before_issue=1, after_end=2)
    found = drift_of("task_1", [Given()], [used])
    assert [(each.why, each.count) for each in found.outside] == [
        (Beyond.RESOURCE, 4), (Beyond.SCOPE, 4), (Beyond.BEFORE_ISSUE, 1), (Beyond.AFTER_END, 2),
    ]  # fmt: skip


def test_what_was_not_kept_makes_it_incomplete():
    assert drift_of("task_1", [Given()], [Use()]).complete
    assert not drift_of("task_1", [Given()], [Use()], dropped=1).complete
    assert not drift_of("task_1", [Given()], [Use()], complete=False).complete
