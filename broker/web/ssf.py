"""Shared Signals over HTTP: the management of streams (SSF 1.0 section 8), poll (RFC 8936), and what others push to us.

Read by the rules of those standards and not by a shape: a member that nobody knows is ignored, as receivers of every
make send some. `/ssf/events` is for transmitters, whose SET is all that proves them; the rest is for callers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flask import Blueprint, Response

from broker import telemetry
from broker.domain import strict_json
from broker.domain.errors import Invalid
from broker.domain.identity import Caller, is_id
from broker.domain.lifecycle import StreamState
from broker.domain.secret import Secret
from broker.domain.shared_signals import (
    CRITICAL_MEMBERS,
    MEDIA_TYPE,
    SPEC_VERSION,
    TOLD,
    Delivery,
    Stream,
    Subject,
    Wish,
    error_code,
    strings,
    subject_of,
)
from broker.services.receiving import MAX_SET_BYTES, SetRefused
from broker.services.transmitting import MOST_ACKNOWLEDGED, MOST_POLLED, Asked, Polled
from broker.web import auth
from broker.web.answers import Answer, json_response, kept_response
from broker.web.context import broker, current
from broker.web.reading import MAX_BODY_BYTES, UnsupportedMediaType, is_plain, printable, raw_body, text_query

ssf = Blueprint("ssf", __name__)

LONGEST_POLL_S = 20
_KEPT_FOR_S = 300
_LOOK_AGAIN_S = 2.0
_MOST_EVENT_TYPES = 100
_LONGEST = 1000
_DELIVERY = {delivery.uri: delivery for delivery in Delivery}


def _at(path: str) -> str:
    return f"{broker().settings.issuer}/ssf/{path}"


@ssf.get("/.well-known/ssf-configuration")
def ssf_configuration() -> Response:
    document = {
        "spec_version": SPEC_VERSION,
        "issuer": broker().settings.issuer,
        "jwks_uri": f"{broker().settings.issuer}/oauth2/jwks",
        "delivery_methods_supported": [delivery.uri for delivery in Delivery],
        "configuration_endpoint": _at("streams"),
        "status_endpoint": _at("status"),
        "add_subject_endpoint": _at("subjects:add"),
        "remove_subject_endpoint": _at("subjects:remove"),
        "verification_endpoint": _at("verify"),
        "critical_subject_members": list(CRITICAL_MEMBERS),
        "authorization_schemes": [{"spec_urn": "urn:ietf:rfc:6749"}, {"spec_urn": "urn:ietf:rfc:6750"}],
        "default_subjects": "ALL",
    }
    return kept_response(json.dumps(document).encode(), kept_for_s=_KEPT_FOR_S)


# --- configuration ---------------------------------------------------------------------------------------------------


@ssf.post("/ssf/streams")
def create_stream() -> Answer:
    caller, body = _read()
    stream = broker().streams.create(caller, _wish(body))
    return json_response(_shown(stream), 201)


@ssf.get("/ssf/streams")
def read_streams() -> Answer:
    caller, stream_id = auth.caller(), _stream_in_query()
    if stream_id is not None:
        return json_response(_shown(broker().streams.find(caller, stream_id)))
    stream = broker().streams.mine(caller)
    return json_response([] if stream is None else [_shown(stream)])


@ssf.patch("/ssf/streams")
def update_stream() -> Answer:
    caller, body = _read()
    before = broker().streams.find(caller, _stream_in(body))
    _require_as_it_is(body, before)
    # What is not there stays as it is, what opens the receiver included.
    given = {name: body[name] for name in ("delivery", "events_requested", "description") if name in body}
    wish = _wish({**_supplied(before), **given})
    keeps = "delivery" not in body
    return json_response(_shown(broker().streams.update(caller, before.id, wish, keeps_authorization=keeps)))


@ssf.put("/ssf/streams")
def replace_stream() -> Answer:
    caller, body = _read()
    before = broker().streams.find(caller, _stream_in(body))
    _require_as_it_is(body, before)
    return json_response(_shown(broker().streams.update(caller, before.id, _wish(body), keeps_authorization=False)))


@ssf.delete("/ssf/streams")
def delete_stream() -> Response:
    caller, stream_id = auth.caller(), _stream_in_query()
    if stream_id is None:
        raise Invalid("name the stream in the query: ?stream_id=…", member="stream_id")
    broker().streams.delete(caller, stream_id)
    return Response(status=204)


# --- status, subjects, verification ----------------------------------------------------------------------------------


@ssf.get("/ssf/status")
def read_status() -> Answer:
    caller, stream_id = auth.caller(), _stream_in_query()
    if stream_id is None:
        raise Invalid("name the stream in the query: ?stream_id=…", member="stream_id")
    return json_response(_status_of(broker().streams.find(caller, stream_id)))


@ssf.post("/ssf/status")
def update_status() -> Answer:
    caller, body = _read()
    status, reason = body.get("status"), _text(body, "reason")
    if not isinstance(status, str) or status not in set(StreamState):
        raise Invalid("status is enabled, paused or disabled", member="status")
    changed = broker().streams.set_state(caller, _stream_in(body), StreamState(status), reason=reason)
    return json_response(_status_of(changed))


@ssf.post("/ssf/subjects:add")
def add_subject() -> Response:
    caller, body = _read()
    if not isinstance(body.get("verified", True), bool):
        raise Invalid("verified is true or false", member="verified")
    broker().streams.add_subject(caller, _stream_in(body), _subject_in(body))
    return Response(status=200)


@ssf.post("/ssf/subjects:remove")
def remove_subject() -> Response:
    caller, body = _read()
    broker().streams.remove_subject(caller, _stream_in(body), _subject_in(body))
    return Response(status=204)


@ssf.post("/ssf/verify")
def verify_stream() -> Response:
    caller, body = _read()
    broker().streams.verify(caller, _stream_in(body), _state_in(body))
    return Response(status=204)


# --- poll ------------------------------------------------------------------------------------------------------------


@ssf.post("/ssf/poll/<stream_id>")
def poll_stream(stream_id: str) -> Answer:
    caller, body = _read()
    polled = _polled(caller, stream_id, _asked(body))
    return json_response({"sets": dict(polled.sets), "moreAvailable": polled.more})


def _polled(caller: Caller, stream_id: str, asked: Asked) -> Polled:
    """At once where something waits, nothing is wanted, or too many wait already; else when there is something."""
    house = broker()
    polled = house.transmitting.poll(caller, stream_id, asked)
    if polled.sets or asked.at_once or not asked.most or not house.feed_waiting.try_take(caller.name):
        return polled
    waits_on = Asked(most=asked.most, at_once=True)
    try:
        with house.broadcast.reading():
            edition = house.broadcast.newest()
            for _ in range(int(LONGEST_POLL_S / _LOOK_AGAIN_S)):
                if polled.sets or house.broadcast.is_stopped:
                    break
                edition = house.broadcast.wait(edition, at_most_s=_LOOK_AGAIN_S)
                polled = house.transmitting.poll(caller, stream_id, waits_on)
    finally:
        house.feed_waiting.give_back(caller.name)
    return polled


def _asked(body: Mapping[str, Any]) -> Asked:
    most, at_once, errors = (
        body.get("maxEvents", MOST_POLLED),
        body.get("returnImmediately", False),
        body.get("setErrs"),
    )
    if type(most) is not int or most < 0:
        raise Invalid("maxEvents is a whole number, 0 or more", member="maxEvents")
    if not isinstance(at_once, bool):
        raise Invalid("returnImmediately is true or false", member="returnImmediately")
    errors = {} if errors is None else errors
    well_formed = isinstance(errors, dict) and all(isinstance(problem, dict) for problem in errors.values())
    if not well_formed or len(errors) > MOST_ACKNOWLEDGED:
        raise Invalid(f"setErrs is an object of at most {MOST_ACKNOWLEDGED} errors, by jti", member="setErrs")
    taken = strings(body.get("ack", []), "ack", most=MOST_ACKNOWLEDGED, longest=_LONGEST)
    return Asked(
        most=min(most, MOST_POLLED),
        at_once=at_once,
        # Nothing but an id of ours reaches a query.
        taken=[jti for jti in taken if is_id(jti, "set")],
        refused={jti: error_code(problem.get("err")) for jti, problem in errors.items() if is_id(jti, "set")},
    )


# --- what others push ------------------------------------------------------------------------------------------------


@ssf.post("/ssf/events")
def receive_event() -> Response:
    """RFC 8935: 202 for a SET that was heard, now or before; 400 says in its words what is wrong with one."""
    call = current()
    # It ends authority, so it waits in the lane of those; who sends it is proven by what it sends.
    raw = raw_body(None, ends=True)
    try:
        if call.mimetype != MEDIA_TYPE:
            raise SetRefused("invalid_request", f"send a SET as {MEDIA_TYPE}", "another content type")
        if len(raw) > MAX_SET_BYTES:
            raise SetRefused("invalid_request", f"a SET has at most {MAX_SET_BYTES} bytes", "too long")
        broker().receiving.receive(raw.decode("latin-1"))
    except SetRefused as refused:
        telemetry.set_refused(printable(refused.reason), call.trace_id)
        problem = json.dumps({"err": refused.code, "description": printable(refused.detail)})
        return Response(problem, 400, mimetype="application/json", headers={"Content-Language": "en"})
    return Response(status=202)


# --- reading and showing ---------------------------------------------------------------------------------------------


def _read() -> tuple[Caller, Mapping[str, Any]]:
    """The caller and the JSON object it sent; a stream in the query must be the one in the body."""
    caller = auth.caller()
    raw = raw_body(caller)
    if current().mimetype != "application/json":
        raise UnsupportedMediaType("application/json")
    body = strict_json.loads(raw, max_bytes=MAX_BODY_BYTES)
    if not isinstance(body, dict):
        raise Invalid("the body is not a JSON object")
    named = _stream_in_query()
    if named is not None and body.get("stream_id", named) != named:
        raise Invalid("the query names another stream than the body", member="stream_id")
    return caller, body


def _stream_in_query() -> str | None:
    return text_query().get("stream_id")


def _stream_in(body: Mapping[str, Any]) -> str:
    stream_id = body.get("stream_id")
    if not isinstance(stream_id, str):
        raise Invalid("stream_id is missing, or not a string", member="stream_id")
    return stream_id


def _subject_in(body: Mapping[str, Any]) -> Subject:
    return subject_of(body.get("subject"))


def _text(body: Mapping[str, Any], name: str) -> str | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > _LONGEST or not is_plain(value):
        raise Invalid(f"{name} is text of at most {_LONGEST} characters without control characters", member=name)
    return value


def _state_in(body: Mapping[str, Any]) -> str | None:
    """Whatever the receiver wants to hear again: nobody but the receiver reads it."""
    state = body.get("state")
    if state is not None and (not isinstance(state, str) or len(state) > _LONGEST):
        raise Invalid(f"state is a string of at most {_LONGEST} characters", member="state")
    return state


def _wish(body: Mapping[str, Any]) -> Wish:
    delivery = body.get("delivery")
    # SSF 1.0 section 8.1.1.1: who says nothing polls.
    delivery = {"method": Delivery.POLL.uri} if delivery is None else delivery
    if not isinstance(delivery, dict):
        raise Invalid("delivery is an object", member="delivery")
    method = _DELIVERY.get(delivery["method"]) if isinstance(delivery.get("method"), str) else None
    if method is None:
        raise Invalid(f"delivery.method is one of {', '.join(_DELIVERY)}", member="delivery")
    requested = body.get("events_requested")
    if requested is not None:
        requested = tuple(strings(requested, "events_requested", most=_MOST_EVENT_TYPES, longest=255))
        if not all(map(is_plain, requested)):
            raise Invalid("events_requested holds control characters", member="events_requested")
    endpoint_url = authorization = None
    if method is Delivery.PUSH:
        endpoint_url, header = delivery.get("endpoint_url"), delivery.get("authorization_header")
        if not isinstance(endpoint_url, str):
            raise Invalid("delivery.endpoint_url is missing, or not a string", member="delivery")
        if header is not None and not isinstance(header, str):
            raise Invalid("delivery.authorization_header is not a string", member="delivery")
        authorization = None if header is None else Secret(header)
    return Wish(
        method=method,
        endpoint_url=endpoint_url,
        authorization=authorization,
        events_requested=requested,
        description=_text(body, "description"),
    )


def _supplied(stream: Stream) -> dict[str, Any]:
    """What the receiver said of it, but for what opens the receiver."""
    delivery = {"method": stream.method.uri}
    if stream.endpoint_url is not None:
        delivery["endpoint_url"] = stream.endpoint_url
    supplied: dict[str, Any] = {"delivery": delivery}
    if stream.events_requested is not None:
        supplied["events_requested"] = list(stream.events_requested)
    if stream.description is not None:
        supplied["description"] = stream.description
    return supplied


def _require_as_it_is(body: Mapping[str, Any], stream: Stream) -> None:
    """SSF 1.0 section 8.1.1.3: what is ours to say may be there, and then it must be what we say."""
    said = _shown(stream)
    ours = ("iss", "aud", "events_supported", "events_delivered", "min_verification_interval", "inactivity_timeout")
    for name in ours:
        if name in body and body[name] != said.get(name):
            raise Invalid(f"{name} is the broker's to say, and another: read the stream, or leave it out", member=name)


def _shown(stream: Stream) -> dict[str, Any]:
    """A stream's configuration. What opens the receiver is never among it (INV-30)."""
    bounds = broker().streams.bounds
    shown: dict[str, Any] = {
        "stream_id": stream.id,
        "iss": broker().settings.issuer,
        "aud": stream.receiver,
        "events_supported": list(TOLD),
        "events_delivered": list(stream.delivered),
        "min_verification_interval": int(bounds.min_verification_interval.total_seconds()),
        **_supplied(stream),
    }
    if stream.method is Delivery.POLL:
        shown["delivery"]["endpoint_url"] = _at(f"poll/{stream.id}")
        shown["inactivity_timeout"] = int(bounds.inactivity_timeout.total_seconds())
    return shown


def _status_of(stream: Stream) -> dict[str, Any]:
    status = {"stream_id": stream.id, "status": str(stream.state)}
    return status if stream.reason is None else {**status, "reason": stream.reason}
