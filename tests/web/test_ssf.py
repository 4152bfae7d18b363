"""What the OpenID conformance suite asserts of a transmitter (SSF 1.0, the CAEP interoperability profile), and more."""

import re
import threading

import pytest

from broker.config.settings import SsfSettings
from broker.domain.shared_signals import TOLD
from tests.house import ISSUER
from tests.ssf import CAEP, POLL, PUSH, SSF, Receiver, event_of, quick_keys, ssf_house, verified
from tests.web.conftest import Web

__all__ = ["quick_keys"]

REQUESTED = [f"{CAEP}/session-revoked", f"{CAEP}/credential-change", f"{CAEP}/device-compliance-change"]


@pytest.fixture
def house(store_url, tmp_path):
    built = ssf_house(store_url, tmp_path)
    yield built
    built.broker.close()


@pytest.fixture
def web(house):
    return Ssf(house)


class Ssf(Web):
    """A receiver that discovers everything, as the suite does."""

    def __init__(self, house):
        super().__init__(house)
        self.metadata = self.get("/.well-known/ssf-configuration").json

    def path(self, name):
        return self.metadata[name].removeprefix(ISSUER)

    def config(self, method, body=None, *, by="crm-api", stream_id=None, **more):
        query = {} if stream_id is None else {"stream_id": stream_id}
        return self.client.open(
            self.path("configuration_endpoint"),
            method=method,
            headers=self.as_(by),
            json=body,
            query_string=query,
            **more,
        )

    def create(self, *, by="crm-api", **wish):
        made = self.config("POST", {"description": "conformance", "events_requested": REQUESTED, **wish}, by=by)
        assert made.status_code == 201, made.json
        return made.json

    def call(self, endpoint, body, *, by="crm-api"):
        return self.post(self.path(endpoint), by, json=body)

    def poll(self, stream, *, by="crm-api", **asked):
        asked = {"returnImmediately": True, "maxEvents": 10} | asked
        answer = self.post(stream["delivery"]["endpoint_url"].removeprefix(ISSUER), by, json=asked)
        assert answer.status_code == 200, answer.json
        return answer.json

    def read(self, token, by="crm-api"):
        jwks = self.get(self.path("jwks_uri")).json
        return verified(token, jwks, issuer=self.metadata["issuer"], audience=by)


# --- metadata --------------------------------------------------------------------------------------------------------


def test_the_metadata_is_what_the_suite_and_the_profile_ask_for(web):
    answer = web.get("/.well-known/ssf-configuration")
    assert answer.status_code == 200
    assert answer.mimetype == "application/json"
    found = answer.json
    assert found["issuer"] == ISSUER
    assert found["spec_version"] == "1_0"
    assert set(found["delivery_methods_supported"]) == {PUSH, POLL}
    assert found["default_subjects"] in ("ALL", "NONE")
    assert {"spec_urn": "urn:ietf:rfc:6749"} in found["authorization_schemes"]
    assert all(scheme["spec_urn"].startswith("urn:") for scheme in found["authorization_schemes"])
    endpoints = [name for name in found if name.endswith(("_endpoint", "_uri"))]
    assert len(endpoints) == 6
    assert all(found[name].startswith(f"{ISSUER}/") for name in endpoints)
    # Claims without elements must not be there.
    assert all(found.values())


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [PUSH, POLL])
def test_the_life_of_a_stream(web, method):
    """openid-ssf-stream-control-happy-path."""
    delivery = {"method": method} | ({"endpoint_url": "https://receiver.example/events"} if method == PUSH else {})
    made = web.create(delivery=delivery)
    assert made.keys() >= {"stream_id", "iss", "aud", "events_delivered", "delivery"}
    assert re.fullmatch(r"[A-Za-z0-9._~-]+", made["stream_id"])
    assert (made["iss"], made["aud"], made["delivery"]["method"]) == (ISSUER, "crm-api", method)
    assert made["delivery"]["endpoint_url"]
    assert made["events_requested"] == REQUESTED
    assert made["events_supported"] == list(TOLD)
    assert made["events_delivered"] == REQUESTED[:2]
    assert isinstance(made["min_verification_interval"], int)
    stream_id = made["stream_id"]
    read = web.config("GET", stream_id=stream_id)
    assert (read.status_code, read.json) == (200, made)
    assert read.headers["Cache-Control"] == "no-store"
    assert web.config("GET").json == [made]

    changed = web.config("PATCH", {"stream_id": stream_id, "description": "another", "aud": "crm-api"})
    assert (changed.status_code, changed.json) == (200, made | {"description": "another"})
    whole = {"stream_id": stream_id, "delivery": delivery, "events_requested": REQUESTED[:1]}
    replaced = web.config("PUT", whole)
    assert replaced.status_code == 200
    assert replaced.json["events_delivered"] == REQUESTED[:1]
    # Missing receiver-supplied properties must be interpreted as requested to be deleted.
    assert "description" not in replaced.json

    status = web.path("status_endpoint")
    read = web.get(f"{status}?stream_id={stream_id}", "crm-api")
    assert (read.status_code, read.json) == (200, {"stream_id": stream_id, "status": "enabled"})
    for wanted in ("enabled", "paused", "disabled", "enabled"):
        # The suite names the stream in the query too.
        body = {"stream_id": stream_id, "status": wanted, "reason": f"to {wanted}"}
        answer = web.post(f"{status}?stream_id={stream_id}", "crm-api", json=body)
        assert answer.status_code == 200
        assert answer.json["status"] == wanted

    assert web.config("DELETE", stream_id=stream_id).status_code == 204
    assert web.config("DELETE", stream_id=stream_id).status_code == 404
    assert web.config("GET").json == []


def test_who_says_no_delivery_polls(web):
    made = web.config("POST", {}).json
    assert made["delivery"]["method"] == POLL
    assert made["delivery"]["endpoint_url"].startswith(f"{ISSUER}/ssf/poll/")
    assert made["inactivity_timeout"] == 7 * 86_400
    assert made["events_delivered"] == list(TOLD)
    assert "events_requested" not in made


def test_a_receiver_has_one_stream(web):
    """openid-ssf-stream-control-error-create-stream-with-duplicate-config."""
    web.create()
    again = web.config("POST", {})
    assert (again.status_code, again.json["code"]) == (409, "conflict")
    web.create(by="ledger-api")


def test_a_body_that_is_broken_is_a_400(web):
    web.create()
    for method in ["POST", "PATCH", "PUT"]:
        raw = {"data": ";{ broken", "content_type": "application/json", "headers": web.as_("crm-api")}
        assert web.client.open(web.path("configuration_endpoint"), method=method, **raw).status_code == 400


def test_a_token_that_is_none_is_a_401(web):
    made = web.create()
    for method in ["POST", "GET", "PATCH", "PUT", "DELETE"]:
        for headers in ({}, {"Authorization": "Bearer invalid"}):
            answer = web.client.open(
                f"{web.path('configuration_endpoint')}?stream_id={made['stream_id']}",
                method=method,
                headers=headers,
                json={"stream_id": made["stream_id"]},
            )
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"].startswith("Bearer ")


def test_a_stream_that_is_not_there_and_one_of_somebody_else_are_a_404(web):
    gone = web.create()
    web.config("DELETE", stream_id=gone["stream_id"])
    theirs = web.create(by="ledger-api")
    subject = {"subject": {"format": "email", "email": "a@example.com"}}
    for stream_id in (gone["stream_id"], theirs["stream_id"], "x", "stm_" + "0" * 26):
        named = {"stream_id": stream_id}
        answers = [
            web.config("GET", stream_id=stream_id),
            web.config("PATCH", named),
            web.config("PUT", {**named, "delivery": {"method": POLL}}),
            web.config("DELETE", stream_id=stream_id),
            web.get(f"{web.path('status_endpoint')}?stream_id={stream_id}", "crm-api"),
            web.call("status_endpoint", {**named, "status": "paused"}),
            web.call("add_subject_endpoint", {**named, **subject}),
            web.call("remove_subject_endpoint", {**named, **subject}),
            web.call("verification_endpoint", named),
            web.post(f"/ssf/poll/{stream_id}", "crm-api", json={"returnImmediately": True}),
        ]
        # INV-28: the same whichever it is.
        assert {(answer.status_code, answer.json["code"]) for answer in answers} == {(404, "not_found")}


def test_who_may_not_read_the_feed_may_not_have_a_stream(web):
    for by in ["summarizer", "pipeline", "gus"]:
        answers = [web.config("POST", {}, by=by), web.config("GET", by=by)]
        assert {(answer.status_code, answer.json["code"]) for answer in answers} == {(403, "role_missing")}


def test_what_is_the_transmitters_to_say_must_match(web):
    made = web.create()
    for name, value in [
        ("iss", "https://other.example"),
        ("aud", "ledger-api"),
        ("events_supported", []),
        ("events_delivered", ["https://other.example/event"]),
        ("min_verification_interval", 1),
        ("inactivity_timeout", 1),
    ]:
        for method, more in (("PATCH", {}), ("PUT", {"delivery": {"method": POLL}})):
            right = web.config(method, {"stream_id": made["stream_id"], name: made[name], **more})
            assert right.status_code == 200, right.json
            web.config("PATCH", {"stream_id": made["stream_id"], "events_requested": REQUESTED})
            wrong = web.config(method, {"stream_id": made["stream_id"], name: value, **more})
            assert (wrong.status_code, wrong.json["member"]) == (400, name)


# --- what opens the receiver, and where it is ------------------------------------------------------------------------


def test_what_opens_the_receiver_is_sealed_sent_and_never_shown(web, house):
    receiver = Receiver()
    try:
        secret = "Bearer hunter2-hunter2"
        delivery = {"method": PUSH, "endpoint_url": receiver.url, "authorization_header": secret}
        made = web.create(delivery=delivery)
        shown = [
            made,
            web.config("GET").json,
            web.get("/v1/event-streams", "ada").json,
            web.get("/v1/audit", "ada").json,
        ]
        assert "hunter2" not in str(shown)
        with house.broker.database.read() as db:
            rows = db.exec_driver_sql("SELECT * FROM event_streams").fetchall()
        assert "hunter2" not in str(rows)
        # It stays where the delivery is not said anew.
        web.config("PATCH", {"stream_id": made["stream_id"], "description": "x"})
        web.call("verification_endpoint", {"stream_id": made["stream_id"]})
        house.broker.transmitting.push(patience_s=10)
        assert receiver.received[0][1]["Authorization"] == secret
        # It goes where it is.
        web.config("PUT", {"stream_id": made["stream_id"], "delivery": {"method": PUSH, "endpoint_url": receiver.url}})
        house.clock.forward(seconds=60)
        web.call("verification_endpoint", {"stream_id": made["stream_id"]})
        house.broker.transmitting.push(patience_s=10)
        assert "Authorization" not in receiver.received[1][1]
    finally:
        receiver.close()


NOT_REACHED = (
    "http://receiver.example/events",
    "ftp://receiver.example/events",
    "https://user:hunter2@receiver.example/events",
    "https://receiver.example/#fragment",
    "https://10.0.0.7/events",
    "https://169.254.169.254/latest/meta-data",
    "https://[::1]/events",
    "https://[::ffff:10.0.0.7]/events",
    "https://192.168.1.1:8443/",
    "javascript:alert(7)",
    "https://receiver.example/\r\nX: y",
    "https://receiver.example/" + "x" * 2000,
    "",
    7,
    None,
)


def test_an_address_that_is_none_or_inside_is_refused(web):
    for url in NOT_REACHED:
        answer = web.config("POST", {"delivery": {"method": PUSH, "endpoint_url": url}})
        assert (answer.status_code, answer.json["member"]) == (400, "delivery")
        assert "hunter2" not in answer.get_data(as_text=True)


def test_loopback_is_inside_too_unless_the_operator_allows_it(store_url, tmp_path):
    house = ssf_house(store_url, tmp_path, inside=())
    try:
        web = Ssf(house)
        for url in ("http://127.0.0.1:9/events", "http://localhost:9/events", "https://127.0.0.1/"):
            answer = web.config("POST", {"delivery": {"method": PUSH, "endpoint_url": url}})
            assert (answer.status_code, answer.json["member"]) == (400, "delivery")
        assert SsfSettings().push_networks == ()
    finally:
        house.broker.close()


def test_a_wish_that_is_none_is_refused_and_leaves_nothing(web):
    for body in [
        [],
        "stream",
        {"delivery": []},
        {"delivery": {"method": "urn:ietf:rfc:9999"}},
        {"delivery": {"method": ["x"]}},
        {"delivery": {"endpoint_url": "https://receiver.example"}},
        {"delivery": {"method": PUSH, "endpoint_url": "https://receiver.example", "authorization_header": 7}},
        {"delivery": {"method": PUSH, "endpoint_url": "https://receiver.example", "authorization_header": ""}},
        {"delivery": {"method": PUSH, "endpoint_url": "https://receiver.example", "authorization_header": "a\r\nb: c"}},
        {"delivery": {"method": PUSH, "endpoint_url": "https://receiver.example", "authorization_header": "x" * 1025}},
        {"events_requested": "all"},
        {"events_requested": [7]},
        {"events_requested": ["x" * 256]},
        {"events_requested": [f"urn:{index}" for index in range(101)]},
        {"events_requested": ["a\nb"]},
        {"description": 7},
        {"description": "x" * 1001},
        {"description": "a\x1b[2Jb"},
    ]:
        assert web.config("POST", body).status_code == 400
        assert web.config("GET").json == []


def test_what_nobody_knows_is_ignored_in_a_wish(web):
    made = web.create(format="risc", delivery={"method": POLL, "endpoint_url": "https://mine.example", "x": 1})
    # The address of a poll is the transmitter's to say.
    assert made["delivery"]["endpoint_url"].startswith(ISSUER)


# --- subjects --------------------------------------------------------------------------------------------------------


def test_subjects_are_added_and_removed_and_nobody_learns_who_is_known(web):
    """openid-ssf-stream-subject-control."""
    stream_id = web.create()["stream_id"]
    for subject in (
        {"format": "email", "email": "example.user@example.com"},
        {"format": "iss_sub", "iss": ISSUER, "sub": "nobody"},
        {"format": "iss_sub", "iss": ISSUER, "sub": "summarizer"},
        {"format": "something-new", "x": "y"},
        {"format": "complex", "user": {"format": "email", "email": "a@example.com"}},
    ):
        body = {"stream_id": stream_id, "subject": subject}
        added = web.call("add_subject_endpoint", {**body, "verified": True})
        assert (added.status_code, added.get_data()) == (200, b"")
        removed = web.call("remove_subject_endpoint", body)
        assert (removed.status_code, removed.get_data()) == (204, b"")


def test_a_subject_that_breaks_the_rules_of_its_format_is_refused(web):
    stream_id = web.create()["stream_id"]
    for subject in [
        None,
        "summarizer",
        {},
        {"format": 7},
        {"format": "iss_sub", "iss": ISSUER},
        {"format": "iss_sub", "iss": ISSUER, "sub": "a", "extra": "b"},
        {"format": "opaque", "id": 7},
        {"format": "opaque", "id": ""},
        {"format": "complex"},
        {"format": "complex", "user": "summarizer"},
        {"format": "complex", "user": {"format": "complex", "user": {"format": "opaque", "id": "a"}}},
        {"format": "aliases", "identifiers": []},
        {"format": "opaque", "id": "x" * 5000},
        {"format": "new", "x": 1.5},
    ]:
        for endpoint in ("add_subject_endpoint", "remove_subject_endpoint"):
            answer = web.call(endpoint, {"stream_id": stream_id, "subject": subject})
            assert (answer.status_code, answer.json["member"]) == (400, "subject")


# --- verification ----------------------------------------------------------------------------------------------------


def test_a_verification_comes_as_the_suite_reads_it(web, house):
    """openid-ssf-transmitter-stream-verification-poll-only, -acknowledge-only, -poll-and-ack."""
    made = web.create(delivery={"method": POLL})
    first = web.call("verification_endpoint", {"stream_id": made["stream_id"], "state": "one"})
    assert (first.status_code, first.get_data()) == (204, b"")
    sets = web.poll(made)["sets"]
    [(jti, token)] = sets.items()
    claims = web.read(token)
    assert (claims["jti"], claims["iss"], claims["aud"]) == (jti, ISSUER, "crm-api")
    assert claims["iat"] <= int(house.clock().timestamp())
    assert claims["sub_id"] == {"format": "opaque", "id": made["stream_id"]}
    assert claims["events"] == {f"{SSF}/verification": {"state": "one"}}
    assert claims["txn"]

    house.clock.forward(seconds=made["min_verification_interval"])
    web.call("verification_endpoint", {"stream_id": made["stream_id"], "state": "two"})
    answer = web.poll(made, ack=[jti])
    [(other, token)] = answer["sets"].items()
    assert (other != jti, answer["moreAvailable"]) == (True, False)
    assert event_of(web.read(token)) == ("verification", {"state": "two"})
    assert web.poll(made, maxEvents=0, ack=[other]) == {"sets": {}, "moreAvailable": False}
    assert web.poll(made)["sets"] == {}


def test_a_verification_that_was_not_given_a_state_has_none(web):
    made = web.create()
    web.call("verification_endpoint", {"stream_id": made["stream_id"]})
    [token] = web.poll(made)["sets"].values()
    assert event_of(web.read(token)) == ("verification", {})


def test_verification_is_not_for_flooding(web, house):
    made = web.create()
    wanted = {"stream_id": made["stream_id"], "state": "x"}
    assert web.call("verification_endpoint", wanted).status_code == 204
    too_soon = web.call("verification_endpoint", wanted)
    assert too_soon.status_code == 429
    house.clock.forward(seconds=int(too_soon.headers["Retry-After"]))
    assert web.call("verification_endpoint", wanted).status_code == 204


def test_a_state_is_a_string(web):
    made = web.create()
    for state in [7, [], "x" * 1001]:
        answer = web.call("verification_endpoint", {"stream_id": made["stream_id"], "state": state})
        assert (answer.status_code, answer.json["member"]) == (400, "state")


def test_nothing_is_verified_on_a_stream_that_is_disabled(web):
    made = web.create()
    web.call("status_endpoint", {"stream_id": made["stream_id"], "status": "disabled"})
    assert web.call("verification_endpoint", {"stream_id": made["stream_id"]}).status_code == 400


# --- poll ------------------------------------------------------------------------------------------------------------


def test_a_poll_is_read_strictly(web):
    made = web.create()
    for name, value in [
        ("maxEvents", -1),
        ("maxEvents", True),
        ("maxEvents", 1.5),
        ("maxEvents", "10"),
        ("returnImmediately", 1),
        ("ack", "jti"),
        ("ack", [7]),
        ("ack", ["x"] * 1001),
        ("setErrs", []),
        ("setErrs", {"jti": "bad"}),
    ]:
        path = made["delivery"]["endpoint_url"].removeprefix(ISSUER)
        answer = web.post(path, "crm-api", json={"returnImmediately": True, name: value})
        assert (answer.status_code, answer.json["member"]) == (400, name)


def test_a_session_that_is_revoked_is_polled_until_it_is_acknowledged(web):
    made = web.create()
    task = web.open_task()
    granted = web.grant(task).json
    web.post(f"/v1/grants/{granted['grant']['id']}/revoke", "summarizer", json={})
    [(jti, token)] = web.poll(made)["sets"].items()
    assert web.poll(made)["sets"] == {jti: token}
    name, event = event_of(web.read(token))
    assert name == "session-revoked"
    # The profile: a reason for admins, by language, that is not empty; a number of seconds.
    assert all(text for text in event["reason_admin"].values())
    assert isinstance(event["event_timestamp"], int)
    assert web.read(token)["sub_id"] == {
        "format": "complex",
        "session": {"format": "opaque", "id": granted["grant"]["id"]},
    }
    assert web.poll(made, ack=[jti, "set_unknown", "x"])["sets"] == {}


def test_a_poll_that_may_wait_is_answered_when_something_ends(web, house):
    made = web.create()
    task = web.open_task()
    grant_id = web.grant(task).json["grant"]["id"]
    answers = []

    def polls():
        other = Ssf(house)
        answers.append(other.poll(made, returnImmediately=False))

    waiting = threading.Thread(target=polls)
    waiting.start()
    web.post(f"/v1/grants/{grant_id}/revoke", "summarizer", json={})
    waiting.join(20)
    assert not waiting.is_alive()
    assert len(answers[0]["sets"]) == 1


def test_a_stream_that_is_pushed_is_not_polled(web):
    made = web.create(delivery={"method": PUSH, "endpoint_url": "https://receiver.example/events"})
    answer = web.post(f"/ssf/poll/{made['stream_id']}", "crm-api", json={"returnImmediately": True})
    assert answer.status_code == 404


def test_what_a_receiver_could_not_take_is_recorded_and_gone(web):
    made = web.create()
    web.call("verification_endpoint", {"stream_id": made["stream_id"]})
    [jti] = web.poll(made)["sets"]
    problem = {jti: {"err": "invalid_state", "description": "unexpected"}}
    assert web.poll(made, setErrs=problem)["sets"] == {}
    [event] = [one for one in web.get("/v1/audit", "ada").json["items"] if one["type"] == "stream.refused"]
    assert event["reason"] == "the receiver answered invalid_state"
    assert event["data"]["jti"] == jti


# --- the admin's hand ------------------------------------------------------------------------------------------------


def test_an_admin_pauses_and_the_receiver_is_told_and_cannot_go_on_by_itself(web, house):
    made = web.create()
    stream_id = made["stream_id"]
    task = web.open_task()
    grant_id = web.grant(task).json["grant"]["id"]
    paused = web.post(f"/v1/event-streams/{stream_id}/pause", "ada", json={"reason": "maintenance"})
    assert (paused.status_code, paused.json["status"], paused.json["set_by"]) == (200, "paused", "admin")
    web.post(f"/v1/grants/{grant_id}/revoke", "summarizer", json={})
    # Nothing but that it is paused.
    [(jti, token)] = web.poll(made)["sets"].items()
    assert event_of(web.read(token)) == ("stream-updated", {"status": "paused", "reason": "maintenance"})
    assert web.read(token)["sub_id"] == {"format": "opaque", "id": stream_id}
    refused = web.call("status_endpoint", {"stream_id": stream_id, "status": "enabled"})
    assert refused.status_code == 403
    shown = web.get(f"{web.path('status_endpoint')}?stream_id={stream_id}", "crm-api").json
    assert shown == {"stream_id": stream_id, "status": "paused", "reason": "maintenance"}
    web.post(f"/v1/event-streams/{stream_id}/resume", "ada", json={})
    told = [event_of(web.read(token))[0] for token in web.poll(made, ack=[jti])["sets"].values()]
    assert told == ["stream-updated", "session-revoked"]


def test_streams_are_shown_to_admins_and_auditors_and_changed_by_admins(web):
    stream_id = web.create(delivery={"method": PUSH, "endpoint_url": "https://receiver.example/secret-path"})[
        "stream_id"
    ]
    for by in ("ada", "audrey"):
        listed = web.get("/v1/event-streams", by).json["items"]
        assert [one["id"] for one in listed] == [stream_id]
        assert web.get(f"/v1/event-streams/{stream_id}", by).json == listed[0]
    assert listed[0]["pushed_to"] == "receiver.example"
    assert "secret-path" not in str(listed)
    for by in ("audrey", "crm-api", "summarizer"):
        assert web.post(f"/v1/event-streams/{stream_id}/pause", by, json={"reason": "x"}).status_code == 403
        assert web.post(f"/v1/event-streams/{stream_id}/resume", by, json={}).status_code == 403
        assert web.client.delete(f"/v1/event-streams/{stream_id}", headers=web.as_(by)).status_code == 403
    assert web.get("/v1/event-streams", "crm-api").status_code == 403
    assert web.client.delete(f"/v1/event-streams/{stream_id}", headers=web.as_("ada")).status_code == 200
    assert web.get(f"/v1/event-streams/{stream_id}", "ada").status_code == 404
    assert web.config("GET").json == []


def test_every_change_of_a_stream_is_in_the_audit_trail(web):
    made = web.create()
    named = {"stream_id": made["stream_id"]}
    subject = {"subject": {"format": "iss_sub", "iss": ISSUER, "sub": "summarizer"}}
    web.config("PATCH", {**named, "description": "x"})
    web.call("remove_subject_endpoint", {**named, **subject})
    web.call("remove_subject_endpoint", {**named, **subject})
    web.call("add_subject_endpoint", {**named, **subject})
    web.call("verification_endpoint", named)
    web.call("verification_endpoint", named)
    for status in ("paused", "disabled", "enabled", "enabled"):
        web.call("status_endpoint", {**named, "status": status})
    web.config("DELETE", **named)
    events = [one for one in web.get("/v1/audit", "ada").json["items"] if one["type"].startswith("stream.")]
    assert [one["type"] for one in reversed(events)] == [
        "stream.created",
        "stream.updated",
        "stream.subject_removed",
        "stream.subject_added",
        "stream.verified",
        "stream.denied",
        "stream.paused",
        "stream.disabled",
        "stream.enabled",
        "stream.deleted",
    ]
    assert {one["actor"] for one in events} == {"crm-api"}
