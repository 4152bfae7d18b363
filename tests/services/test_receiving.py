"""What other transmitters say is believed if it is theirs, acted on once, and recorded; and nothing else is."""

import json
from datetime import timedelta

import pytest

from broker.domain.errors import BrokerError, Conflict, RoleMissing, TaskNotActive, Unavailable
from broker.domain.identity import User
from broker.domain.lifecycle import TaskState
from broker.services.receiving import SetRefused
from broker.store import locks
from tests.ssf import CAEP, IDP, RISC, SSF, Other, Receiver, ssf_house
from tests.workloads import issuer_key, write_key_set

REVOKING = (f"{CAEP}/session-revoked", f"{RISC}/account-disabled", f"{RISC}/credential-compromise")


@pytest.fixture
def other(tmp_path):
    return Other(tmp_path, speaks_of=("people", "dev"), lockdown_on=frozenset({"credential-compromise"}))


@pytest.fixture
def house(store_url, tmp_path, other):
    built = ssf_house(store_url, tmp_path, transmitters=[other.settings])
    yield built
    built.broker.close()


def issuers(house):
    return {one.name: one.issuer for one in house.broker.standing.now().catalogue.issuers}


def zoe(house):
    return {"format": "iss_sub", "iss": issuers(house)["people"], "sub": "zoe"}


def say(house, other, type_, event=None, **more):
    token = other.signed(other.claims(house.clock(), type_, event, **more))
    house.broker.receiving.receive(token)
    return token


def grant_for_zoe(house):
    user = User(name="people:zoe", expires_at=house.clock() + timedelta(hours=1))
    return house.issue(house.open_task(), user=user)


def recorded(house, type_="set.received"):
    return [
        event
        for event in house.broker.audit_trail.page(house.caller("audrey"), {}, before=None, limit=200)
        if event.type == type_
    ]


def refused(house, token, code):
    with pytest.raises(SetRefused) as problem:
        house.broker.receiving.receive(token)
    assert problem.value.code == code, problem.value.reason
    return problem.value


# --- what is done ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_", REVOKING)
def test_what_was_issued_on_behalf_of_a_user_ends_when_their_issuer_says_so(house, other, type_):
    mine, others = grant_for_zoe(house), house.issue(house.open_task())
    assert house.is_active(mine)
    say(house, other, type_, sub_id=zoe(house))
    assert not house.is_active(mine)
    assert house.is_active(others)
    [event] = recorded(house)
    assert event.actor == "transmitter:corp-idp"
    assert event.data["jti"] == "jti-1"
    assert event.reason.startswith("revoked user people:zoe")
    [ordered] = recorded(house, "revocation.ordered")
    assert (ordered.actor, ordered.user) == ("transmitter:corp-idp", "people:zoe")
    locked = house.broker.revocation.lockdowns(house.caller("ada"))
    assert [one.value for one in locked] == (["people:zoe"] if "compromise" in type_ else [])


def task_for(house, name, **more):
    user = User(name=f"people:{name}", expires_at=house.clock() + timedelta(hours=1))
    return house.open_task(user=user, **more)


@pytest.mark.parametrize("type_", REVOKING)
def test_a_task_on_behalf_of_a_user_ends_with_them_and_its_agents_get_nothing_more(house, other, type_):
    mine, theirs, nobodys = task_for(house, "zoe"), task_for(house, "bob"), house.open_task()
    idle = task_for(house, "zoe")
    part = house.open_task(parent_task_id=mine.id, deadline_s=60)
    issued = house.issue(mine)
    say(house, other, type_, sub_id=zoe(house))
    assert not house.is_active(issued)
    for task in (mine, idle, part):
        with pytest.raises(BrokerError):
            house.issue(task)
        assert house.broker.tasks.find(house.caller("ada"), task.id).state is TaskState.CANCELLED
    assert "corp-idp says" in house.broker.tasks.find(house.caller("ada"), mine.id).reason
    assert {event.actor for event in recorded(house, "task.cancelled")} == {"transmitter:corp-idp"}
    assert house.is_active(house.issue(theirs))
    assert house.is_active(house.issue(nobodys))


def test_a_task_under_which_nothing_was_issued_yet_ends_too(house, other):
    task = task_for(house, "zoe")
    say(house, other, f"{CAEP}/session-revoked", sub_id=zoe(house))
    with pytest.raises(TaskNotActive):
        house.issue(task)


def test_a_grant_that_is_being_committed_is_not_missed(house, other, monkeypatch):
    """INV-11: the first look comes too early for it, and the second waits for whoever issues."""
    steps, mine = [], []
    look, wait = house.broker.receiving._finds_live, locks.hold_gate_alone

    def looked(axis, value):
        found = look(axis, value)
        steps.append("look")
        if len(steps) == 1:
            mine.append(grant_for_zoe(house))
        return found

    def waited(db):
        steps.append("wait")
        wait(db)

    token = other.signed(other.claims(house.clock(), f"{CAEP}/session-revoked", sub_id=zoe(house)))
    with monkeypatch.context() as patched:
        patched.setattr(house.broker.receiving, "_finds_live", looked)
        patched.setattr(locks, "hold_gate_alone", waited)
        house.broker.receiving.receive(token)
    assert steps[:3] == ["look", "wait", "look"]
    assert not house.is_active(mine[0])


def test_a_set_that_is_acted_on_again_ends_no_task_that_was_opened_since(house, other, monkeypatch):
    task_for(house, "zoe")
    token = other.signed(other.claims(house.clock(), f"{CAEP}/session-revoked", sub_id=zoe(house)))

    def dies(*_, **__):
        raise RuntimeError("the process died here")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr("broker.services.receiving.consume", dies)
        house.broker.receiving.receive(token)
    house.clock.forward(seconds=31)
    since = task_for(house, "zoe")
    house.broker.receiving.receive(token)
    assert house.is_active(house.issue(since))


def test_an_agent_is_called_by_its_issuer_and_subject(house, other):
    issued = house.issue(house.open_task())
    subject = {"format": "iss_sub", "iss": issuers(house)["dev"], "sub": "dev:summarizer"}
    say(house, other, f"{CAEP}/session-revoked", sub_id=subject)
    assert not house.is_active(issued)


def test_an_orchestrator_that_is_disabled_ends_with_all_it_opened(house, other):
    issued = house.issue(house.open_task())
    subject = {"format": "iss_sub", "iss": issuers(house)["dev"], "sub": "dev:pipeline"}
    say(house, other, f"{RISC}/account-disabled", sub_id=subject)
    assert not house.is_active(issued)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda subject: {"format": "complex", "user": subject},
        lambda subject: {
            "format": "complex",
            "user": subject,
            "session": {"format": "opaque", "id": "their-session"},
            "tenant": {"format": "opaque", "id": "t"},
        },
        lambda subject: {"format": "complex", "application": subject},
        lambda subject: {
            "format": "aliases",
            "identifiers": [{"format": "email", "email": "zoe@example.com"}, subject],
        },
    ],
)
def test_a_subject_is_found_in_a_complex_one_and_among_aliases(house, other, wrapped):
    mine = grant_for_zoe(house)
    say(house, other, f"{CAEP}/session-revoked", sub_id=wrapped(zoe(house)))
    assert not house.is_active(mine)


def test_an_opaque_subject_is_of_the_one_issuer_that_is_spoken_of(store_url, tmp_path):
    other = Other(tmp_path, speaks_of=("people",))
    house = ssf_house(store_url, tmp_path, transmitters=[other.settings])
    try:
        mine = grant_for_zoe(house)
        say(house, other, f"{CAEP}/session-revoked", sub_id={"format": "opaque", "id": "zoe"})
        assert not house.is_active(mine)
    finally:
        house.broker.close()


def test_a_risk_is_a_signal_that_policies_see(house, other):
    event = {"current_level": "HIGH", "principal": "USER", "risk_reason": "PASSWORD_FOUND_IN_DATA_BREACH"}
    say(house, other, f"{CAEP}/risk-level-change", event, sub_id=zoe(house))
    [signal] = house.broker.signals.page(house.caller("ada"), standing_only=True)
    assert (signal.axis, signal.value, signal.level) == ("user", "people:zoe", "high")
    assert (signal.source, signal.sent_by) == ("corp-idp", "transmitter:corp-idp")
    assert "PASSWORD_FOUND_IN_DATA_BREACH" in signal.reason
    assert signal.expires_at == house.clock() + timedelta(hours=1)
    assert house.broker.standing.now().risks.level("summarizer", "people:zoe", house.clock()) == "high"


def test_text_that_would_change_a_line_is_not_repeated(house, other):
    event = {"current_level": "LOW", "principal": "USER", "risk_reason": "x\u2028\x1b[2J<script>"}
    say(house, other, f"{CAEP}/risk-level-change", event, sub_id=zoe(house))
    [signal] = house.broker.signals.page(house.caller("ada"), standing_only=True)
    assert signal.reason == "corp-idp says risk-level-change"


# --- what is not -----------------------------------------------------------------------------------------------------


def unknown_subjects(house):
    return [
        {"format": "iss_sub", "iss": "https://other.example", "sub": "zoe"},
        {"format": "iss_sub", "iss": issuers(house)["dev"], "sub": "dev:nobody"},
        {"format": "iss_sub", "iss": f"{issuers(house)['people']}/", "sub": "zoe"},
        # A name alone is nobody (INV-17), and of two issuers an opaque one could be either's.
        {"format": "email", "email": "zoe@example.com"},
        {"format": "opaque", "id": "zoe"},
        {"format": "complex", "device": {"format": "opaque", "id": "laptop"}},
        {"format": "something-new", "id": "zoe"},
        {"format": "iss_sub", "iss": issuers(house)["people"], "sub": "z" * 300},
    ]


def test_whom_we_do_not_know_is_accepted_recorded_and_nothing_is_done(house, other):
    mine = grant_for_zoe(house)
    subjects = unknown_subjects(house)
    for index, subject in enumerate(subjects):
        say(house, other, f"{RISC}/credential-compromise", sub_id=subject, jti=f"jti-{index}")
    assert house.is_active(mine)
    assert {event.reason for event in recorded(house)} == {"nothing of this concerns anybody here"}
    assert len(recorded(house)) == len(subjects)
    assert recorded(house, "revocation.ordered") == []
    assert house.broker.revocation.lockdowns(house.caller("ada")) == []


def test_a_user_who_has_nothing_live_costs_no_revocation(house, other):
    say(house, other, f"{CAEP}/session-revoked", sub_id=zoe(house))
    assert recorded(house, "revocation.ordered") == []
    assert recorded(house)[0].reason == "user people:zoe has nothing live"


def test_a_transmitter_speaks_of_the_issuers_it_was_given_and_of_no_others(store_url, tmp_path):
    other = Other(tmp_path, speaks_of=("people",))
    house = ssf_house(store_url, tmp_path, transmitters=[other.settings])
    try:
        issued = house.issue(house.open_task())
        subject = {"format": "iss_sub", "iss": issuers(house)["dev"], "sub": "dev:summarizer"}
        say(house, other, f"{CAEP}/session-revoked", sub_id=subject)
        assert house.is_active(issued)
    finally:
        house.broker.close()


@pytest.mark.parametrize(
    "type_", [f"{CAEP}/session-established", f"{SSF}/verification", f"{SSF}/stream-updated", "urn:example:new"]
)
def test_an_event_nobody_knows_is_accepted_and_ignored(house, other, type_):
    mine = grant_for_zoe(house)
    say(house, other, type_, {"anything": [1]}, sub_id=zoe(house))
    say(house, other, type_, sub_id=None, jti="jti-2")
    assert house.is_active(mine)
    assert len(recorded(house)) == 2


def test_an_event_it_is_not_believed_in_is_ignored(store_url, tmp_path):
    other = Other(tmp_path, events=frozenset({"risk-level-change"}))
    house = ssf_house(store_url, tmp_path, transmitters=[other.settings])
    try:
        mine = grant_for_zoe(house)
        say(house, other, f"{CAEP}/session-revoked", sub_id=zoe(house))
        assert house.is_active(mine)
    finally:
        house.broker.close()


# --- what is no SET of theirs ----------------------------------------------------------------------------------------


def test_only_what_a_transmitter_signed_for_us_and_lately_is_believed(house, other):
    now, type_ = house.clock(), f"{CAEP}/session-revoked"
    mine = grant_for_zoe(house)

    def claims(**changed):
        return other.claims(now, type_, **{"sub_id": zoe(house)} | changed)

    forged = issuer_key("idp-1", "PS256")
    seconds = int(now.timestamp())
    good = other.signed(claims())
    head, body, signature = good.split(".")
    cases = {
        # forged, or by another key
        other.signed(claims(), key=issuer_key("unknown", "ES256")): "invalid_key",
        f"{head}.{body}.{signature[:-8]}AAAAAAAA": "invalid_key",
        f"{head}.{other.signed(claims(jti='jti-9')).split('.')[1]}.{signature}": "invalid_key",
        other.signed(claims(), kid="unknown"): "invalid_key",
        other.signed(claims(), alg="none"): "invalid_request",
        other.signed(claims(), alg="HS256"): "invalid_request",
        other.signed(claims(), key=forged): "invalid_key",
        other.signed(claims(), jku="https://evil.test/keys"): "invalid_request",
        other.signed(claims(), jwk=other.key.jwk): "invalid_request",
        other.signed(claims(), crit=["x"]): "invalid_request",
        # of another type
        other.signed(claims(), typ="JWT"): "invalid_request",
        other.signed(claims(), typ="at+jwt"): "invalid_request",
        other.signed(claims(), typ=None): "invalid_request",
        # for somebody else, or by somebody else
        other.signed(claims(aud="https://other.example")): "invalid_audience",
        other.signed(claims(aud=[other.settings.audience, "https://other.example"])): "invalid_audience",
        other.signed({k: v for k, v in claims().items() if k != "aud"}): "invalid_audience",
        other.signed(claims(iss="https://unknown.example")): "invalid_issuer",
        other.signed(claims(iss=f"{IDP}/")): "invalid_issuer",
        other.signed(claims(iss=7)): "invalid_issuer",
        # old, of the future, or of no time
        other.signed(claims(iat=seconds - 86_400 - 31)): "invalid_request",
        other.signed(claims(iat=seconds + 31)): "invalid_request",
        other.signed(claims(iat=float(seconds))): "invalid_request",
        other.signed({k: v for k, v in claims().items() if k != "iat"}): "invalid_request",
        # what no SET has, and what each has
        other.signed(claims(exp=seconds + 60)): "invalid_request",
        other.signed(claims(sub="zoe")): "invalid_request",
        other.signed({k: v for k, v in claims().items() if k != "jti"}): "invalid_request",
        other.signed(claims(jti="")): "invalid_request",
        other.signed(claims(jti="a\nb")): "invalid_request",
        other.signed(claims(events={})): "invalid_request",
        other.signed(claims(events=[type_])): "invalid_request",
        other.signed(claims(events={type_: "revoked"})): "invalid_request",
        other.signed(claims(events={f"urn:{n}": {} for n in range(11)})): "invalid_request",
        other.signed({k: v for k, v in claims().items() if k != "sub_id"}): "invalid_request",
        other.signed(claims(sub_id="zoe")): "invalid_request",
        other.signed(claims(sub_id={"format": "iss_sub", "iss": 7, "sub": "zoe"})): "invalid_request",
        "": "invalid_request",
        "a.b.c": "invalid_request",
        "a.b": "invalid_request",
        good + "." + good: "invalid_request",
        "x" * 9000: "invalid_request",
        "é.é.é": "invalid_request",
    }
    for token, code in cases.items():
        refused(house, token, code)
    assert house.is_active(mine)
    # INV-35: what anybody can send costs no row.
    assert recorded(house) == []
    house.broker.receiving.receive(good)
    assert not house.is_active(mine)


def test_a_level_that_is_none_is_refused(house, other):
    for level in (None, "critical", "low", 3, {}):
        claims = other.claims(house.clock(), f"{CAEP}/risk-level-change", {"current_level": level}, sub_id=zoe(house))
        refused(house, other.signed(claims), "invalid_request")


def test_a_set_that_comes_again_does_nothing(house, other):
    first = grant_for_zoe(house)
    token = say(house, other, f"{CAEP}/session-revoked", sub_id=zoe(house))
    assert not house.is_active(first)
    for hours in (0, 1, 22):
        house.clock.forward(hours=hours)
        house.broker.sweeper.sweep()
        again = grant_for_zoe(house)
        house.broker.receiving.receive(token)
        assert house.is_active(again)
    assert len(recorded(house)) == 1
    house.clock.forward(hours=25)
    house.broker.sweeper.sweep()
    refused(house, token, "invalid_request")


def test_a_set_is_remembered_for_as_long_as_it_could_be_believed(store_url, tmp_path):
    """INV-20: longer than the idempotency keys, by which it was acted on, are kept."""
    other = Other(tmp_path, max_age=timedelta(days=3))
    house = ssf_house(store_url, tmp_path, transmitters=[other.settings])
    try:
        grant_for_zoe(house)
        token = say(house, other, f"{CAEP}/session-revoked", sub_id=zoe(house))
        for _ in range(2):
            house.clock.forward(hours=35)
            house.broker.sweeper.sweep()
            again = grant_for_zoe(house)
            house.broker.receiving.receive(token)
            assert house.is_active(again)
    finally:
        house.broker.close()


def test_a_set_that_was_acted_on_and_not_marked_does_nothing_more(house, other, monkeypatch):
    grant_for_zoe(house)
    claims = other.claims(house.clock(), f"{CAEP}/session-revoked", sub_id=zoe(house))
    token = other.signed(claims)

    def dies(*_, **__):
        raise RuntimeError("the process died here")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr("broker.services.receiving.consume", dies)
        house.broker.receiving.receive(token)
    after = grant_for_zoe(house)
    house.broker.receiving.receive(token)
    # The one revocation that was ordered is carried out again, and covers what was issued up to then.
    assert house.is_active(after)
    assert len(recorded(house, "revocation.ordered")) == 1
    assert len(recorded(house)) == 1


def test_while_its_keys_are_not_known_nothing_is_lost(store_url, tmp_path):
    other = Other(tmp_path)
    other.file.unlink()
    house = ssf_house(store_url, tmp_path, transmitters=[other.settings])
    try:
        mine = grant_for_zoe(house)
        token = other.signed(other.claims(house.clock(), f"{CAEP}/session-revoked", sub_id=zoe(house)))
        with pytest.raises(Unavailable):
            house.broker.receiving.receive(token)
        write_key_set(other.file, other.key)
        house.broker.receiving.receive(token)
        assert not house.is_active(mine)
    finally:
        house.broker.close()


# --- by poll ---------------------------------------------------------------------------------------------------------


class Polled(Receiver):
    """A transmitter that is polled: it has these SETs until they are acknowledged or refused."""

    def __init__(self):
        super().__init__()
        self.sets = {}
        self.errors = {}

    def answer(self, asked):
        for jti in asked.get("ack", []):
            self.sets.pop(jti, None)
        for jti, problem in asked.get("setErrs", {}).items():
            self.errors[jti] = problem["err"]
            self.sets.pop(jti, None)
        some = dict(list(self.sets.items())[: asked["maxEvents"]])
        return 200, json.dumps({"sets": some, "moreAvailable": len(some) < len(self.sets)}).encode(), {}


@pytest.fixture
def transmitter():
    made = Polled()

    class Answers(list):
        def __getitem__(self, index):
            return made.answer(json.loads(made.received[-1][2]))

    made.answers = Answers([200])
    yield made
    made.close()


def test_a_transmitter_is_polled_and_what_it_says_is_acknowledged_once_it_is_done(store_url, tmp_path, transmitter):
    other = Other(tmp_path, poll_url=transmitter.url, poll_token_file=str(tmp_path / "token"))
    (tmp_path / "token").touch(mode=0o600)
    (tmp_path / "token").write_text("hunter2")
    house = ssf_house(store_url, tmp_path, transmitters=[other.settings])
    try:
        mine = grant_for_zoe(house)
        now, type_ = house.clock(), f"{CAEP}/session-revoked"
        transmitter.sets = {
            "jti-1": other.signed(other.claims(now, type_, sub_id=zoe(house))),
            "jti-2": other.signed(
                other.claims(now, type_, sub_id=zoe(house), jti="jti-2", aud="https://other.example")
            ),
            "jti-3": other.signed(other.claims(now, type_, sub_id=zoe(house), jti="jti-other")),
        }
        assert house.broker.receiving.poll() == 3
        assert not house.is_active(mine)
        assert transmitter.sets == {}
        assert transmitter.errors == {"jti-2": "invalid_audience", "jti-3": "invalid_request"}
        assert {headers["Authorization"] for _, headers, _ in transmitter.received} == {"Bearer hunter2"}
        assert house.broker.receiving.poll() == 0
        # A token that is gone is a line in the log, and the next run tries again.
        (tmp_path / "token").unlink()
        assert house.broker.receiving.poll() == 0
    finally:
        house.broker.close()


@pytest.mark.parametrize("answer", [500, 302, (200, b"[]", {}), (200, b"{", {}), (200, b'{"sets": {"a": 1}}', {})])
def test_a_transmitter_that_answers_nonsense_stops_nothing(store_url, tmp_path, answer):
    receiver = Receiver(answer)
    other = Other(tmp_path, poll_url=receiver.url)
    house = ssf_house(store_url, tmp_path, transmitters=[other.settings])
    try:
        assert house.broker.receiving.poll() == 0
        assert len(receiver.received) == 1
    finally:
        receiver.close()
        house.broker.close()


def test_what_cannot_be_heard_yet_is_neither_taken_nor_refused(store_url, tmp_path, transmitter):
    other = Other(tmp_path, poll_url=transmitter.url)
    other.file.unlink()
    house = ssf_house(store_url, tmp_path, transmitters=[other.settings])
    try:
        mine = grant_for_zoe(house)
        claims = other.claims(house.clock(), f"{CAEP}/session-revoked", sub_id=zoe(house))
        transmitter.sets = {"jti-1": other.signed(claims)}
        house.broker.receiving.poll()
        assert list(transmitter.sets) == ["jti-1"]
        write_key_set(other.file, other.key)
        house.broker.receiving.poll()
        assert transmitter.sets == {}
        assert not house.is_active(mine)
    finally:
        house.broker.close()


@pytest.mark.parametrize("problem", [Conflict("somebody else's"), RoleMissing("no")])
def test_what_goes_wrong_with_one_set_keeps_none_after_it_from_being_heard(
    store_url, tmp_path, transmitter, monkeypatch, problem
):
    other = Other(tmp_path, poll_url=transmitter.url)
    house = ssf_house(store_url, tmp_path, transmitters=[other.settings])
    try:
        mine = grant_for_zoe(house)
        said = {jti: other.claims(house.clock(), f"{CAEP}/session-revoked", sub_id=zoe(house), jti=jti)
                for jti in ("jti-1", "jti-2")}  # fmt: skip
        transmitter.sets = {jti: other.signed(claims) for jti, claims in said.items()}
        real, broken = house.broker.receiving.receive, transmitter.sets["jti-1"]

        def receive(token):
            if token == broken:
                raise problem
            real(token)

        with monkeypatch.context() as patched:
            patched.setattr(house.broker.receiving, "receive", receive)
            house.broker.receiving.poll()
        assert not house.is_active(mine)
        # It may come again: neither taken nor refused.
        assert (list(transmitter.sets), transmitter.errors) == (["jti-1"], {})
        house.broker.receiving.poll()
        assert transmitter.sets == {}
    finally:
        house.broker.close()
