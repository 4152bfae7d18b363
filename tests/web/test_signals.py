"""Signals over the wire."""

import pytest

SIGNAL = {"agent": "summarizer", "level": "high", "reason": "unusual volume", "source": "detector"}


def test_a_signal_is_sent_and_listed(web_on_both):
    web = web_on_both
    sent = web.post("/v1/signals", "ada", json={**SIGNAL, "expires_s": 60})
    assert sent.status_code == 201
    assert {name: sent.json[name] for name in ("axis", "value", "level", "source", "sent_by")} == {
        "axis": "agent", "value": "summarizer", "level": "high", "source": "detector", "sent_by": "ada",
    }  # fmt: skip
    assert web.get("/v1/signals", "audrey").json == {"items": [sent.json], "next_cursor": None}
    web.house.clock.forward(seconds=60)
    assert web.get("/v1/signals", "ada").json["items"] == []
    assert web.get("/v1/signals?over=true", "ada").json["items"] == [sent.json]
    first = web.get("/v1/signals?over=true&limit=1", "ada").json["next_cursor"]
    assert web.get(f"/v1/signals?over=true&cursor={first}", "ada").json["items"] == []


def test_the_same_key_is_the_same_signal(web):
    headers = {"Idempotency-Key": "once"}
    first, again = (web.post("/v1/signals", "ada", json=SIGNAL, headers=headers) for _ in range(2))
    assert first.json == again.json
    other = web.post("/v1/signals", "ada", json={**SIGNAL, "level": "low"}, headers=headers)
    assert (other.status_code, other.json["code"]) == (409, "idempotency_conflict")


@pytest.mark.parametrize(
    ("changed", "member"),
    [
        ({"agent": None}, "agent"),
        ({"user": "alice"}, "agent"),
        ({"agent": "nobody"}, "agent"),
        ({"agent": ""}, "agent"),
        ({"level": "HIGH"}, "level"),
        ({"level": None}, "level"),
        ({"reason": ""}, "reason"),
        ({"reason": "a\u202eb"}, "reason"),
        ({"source": "a\nb"}, "source"),
        ({"source": "s" * 256}, "source"),
        ({"expires_s": 0}, "expires_s"),
        ({"expires_s": 2_592_001}, "expires_s"),
        ({"expires_s": "60"}, "expires_s"),
        ({"risk": "high"}, "risk"),
    ],
)
def test_a_bad_signal_is_a_400_that_names_what_is_wrong(web, changed, member):
    body = {name: value for name, value in {**SIGNAL, **changed}.items() if value is not None}
    answer = web.post("/v1/signals", "ada", json=body)
    assert (answer.status_code, answer.json["member"]) == (400, member)
    assert web.get("/v1/signals", "ada").json["items"] == []


def test_a_signal_from_somebody_without_the_role_is_403_and_audited(web):
    answer = web.post("/v1/signals", "summarizer", json=SIGNAL)
    assert (answer.status_code, answer.json["code"]) == (403, "role_missing")
    [event] = web.get("/v1/audit?type=signal.refused", "audrey").json["items"]
    assert event["actor"] == "summarizer"
    assert web.get("/v1/signals", "summarizer").status_code == 403
    assert web.post("/v1/signals", json=SIGNAL).status_code == 401
