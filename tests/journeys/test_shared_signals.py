"""Shared Signals between real processes: a broker that is killed, two that share a stream, one that is told."""

import json

import httpx
import pytest

from broker.domain.clock import system_clock
from tests.processes import until
from tests.ssf import CAEP, PUSH, Other, Receiver

OPERATED = """
[ssf]
push_networks = ["127.0.0.0/8"]

[[transmitters]]
name = "corp-idp"
issuer = "https://idp.example/tenant"
jwks_file = "corp-idp.jwks"
speaks_of = ["dev"]
"""


@pytest.fixture
def receiver():
    made = Receiver()
    yield made
    made.close()


def operated(deployment):
    """A transmitter that this deployment believes; its configuration is completed."""
    other = Other(deployment.directory, speaks_of=("dev",), audience=deployment.issuer)
    deployment.configuration.write_text(deployment.configuration.read_text() + OPERATED)
    return other


def stream_to(broker, receiver, by="crm-api"):
    answer = broker.post("/ssf/streams", by, {"delivery": {"method": PUSH, "endpoint_url": receiver.url}})
    assert answer.status_code == 201, answer.text
    return answer.json()


def revoke(broker, grant):
    assert broker.post(f"/v1/grants/{grant.id}/revoke", "summarizer").status_code == 200


def sessions(receiver):
    return [claims["sub_id"]["session"]["id"] for claims in receiver.claims]


def test_killed_between_delivery_and_its_mark_it_delivers_the_same_set_again(deployment, receiver):
    operated(deployment)
    with deployment.broker() as broker:
        stream_to(broker, receiver)
        grant = broker.grant(broker.open_task())
        receiver.released.clear()
        revoke(broker, grant)
        # It has arrived, and the broker was not told that it was taken.
        assert receiver.arrived.acquire(timeout=30)
        broker.kill()
        receiver.released.set()
        broker.start()
        broker.until_ready()
        # The claim of the one that died has to run out first.
        assert receiver.arrived.acquire(timeout=60)
        assert sessions(receiver) == [grant.id] * 2
        assert len({claims["jti"] for claims in receiver.claims}) == 1
        until(lambda: waiting(broker) == 0, what="an empty stream")


def waiting(broker):
    [stream] = broker.get("/v1/event-streams", "ada").json()["items"]
    return stream["waiting"]


def test_two_brokers_tell_a_receiver_each_event_once_and_in_order(postgres_deployment, receiver):
    operated(postgres_deployment)
    with postgres_deployment.starting() as one, postgres_deployment.starting() as other:
        one.until_ready()
        other.until_ready()
        stream_to(one, receiver)
        task_id, ended = one.open_task(), []
        for broker in (one, other) * 10:
            grant = broker.grant(task_id)
            revoke(broker, grant)
            ended.append(grant.id)
        until(lambda: len(receiver.received) >= len(ended), what="every event")
        assert sessions(receiver) == ended
        until(lambda: waiting(other) == 0, what="an empty stream")
        assert len(receiver.received) == len(ended)


def test_a_broker_that_is_told_ends_what_it_issued_and_tells_of_it(deployment, receiver):
    """From an identity provider's push to a receiver's push, through every part of both."""
    other = operated(deployment)
    with deployment.broker() as broker:
        stream_to(broker, receiver)
        grant = broker.grant(broker.open_task())
        subject = {"format": "iss_sub", "iss": deployment.dev_issuer.issuer, "sub": "dev:summarizer"}
        token = other.signed(other.claims(system_clock(), f"{CAEP}/session-revoked", sub_id=subject))

        def push(body, media_type="application/secevent+jwt"):
            return httpx.post(f"{broker.url}/ssf/events", content=body, headers={"Content-Type": media_type})

        for body, media_type in ((b"", "application/secevent+jwt"), (token.encode(), "application/json")):
            refused = push(body, media_type)
            assert (refused.status_code, refused.json()["err"]) == (400, "invalid_request")
        assert broker.is_active(grant.token)
        for _ in range(2):
            answer = push(token.encode())
            assert (answer.status_code, answer.content) == (202, b"")
        assert not broker.is_active(grant.token)
        assert receiver.arrived.acquire(timeout=30)
        named = {"format": "iss_sub", "iss": deployment.issuer, "sub": "summarizer"}
        assert receiver.claims[0]["sub_id"] == named
        events = broker.get("/v1/audit", "audrey").json()["items"]
        assert [event["type"] for event in events].count("set.received") == 1
        assert "hunter" not in json.dumps(events)
