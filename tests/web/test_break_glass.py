"""A break-glass over HTTP: how it is asked for, what an approver sees first, and the reviews."""

import pytest

from tests.break_glass import REASON, broken, glass_house, review_of
from tests.hostile.corpus import MALFORMED, NOT_A_STRING, TRICKS
from tests.house import CRM


@pytest.fixture
def web(web):
    glass_house(web.house)
    return web


def ask(web, reason=REASON, **more):
    body = {"task_id": web.open_task()["id"], "resource": CRM, "scopes": ["contacts:write"]}
    return web.post("/v1/grants", "summarizer", json={**body, "break_glass": {"reason": reason}, **more})


def test_it_waits_and_is_seen_to_be_one_before_anything_else(web):
    answer = ask(web)
    assert answer.status_code == 202
    assert answer.json["grant"]["break_glass"] == {"reason": REASON}
    shown = web.get(f"/v1/approvals/{answer.json['approval']['id']}", "sam").json
    assert shown["break_glass"] is True
    assert shown["unverified"]["break_glass"] == REASON
    assert "break_glass" not in shown["opens"]


@pytest.mark.parametrize("sent", [{}, {"reason": ""}, {"reason": None}, {"reason": "x", "more": 1}, "down", True, []])
def test_without_a_reason_it_is_none(web, sent):
    answer = ask(web, break_glass=sent)
    assert (answer.status_code, answer.json["code"]) == (400, "invalid_request")
    assert answer.json["member"].startswith("break_glass")


@pytest.mark.parametrize("reason", [*MALFORMED, *NOT_A_STRING])
def test_a_reason_that_is_no_plain_text_is_refused(web, reason):
    answer = web.client.post(
        "/v1/grants",
        headers=web.as_("summarizer"),
        json={
            "task_id": web.open_task()["id"],
            "resource": CRM,
            "scopes": ["contacts:write"],
            "break_glass": {"reason": reason},
        },
    )
    assert answer.status_code in (400, 413)


@pytest.mark.parametrize("reason", TRICKS)
def test_whatever_else_it_says_is_text(web, reason):
    """INV-31: what cannot be seen, or turns around what is read, is shown as the escape that it is."""
    answer = ask(web, reason=reason)
    if answer.status_code == 400:
        assert answer.json["member"] == "break_glass.reason"
        return
    shown = web.get(f"/v1/approvals/{answer.json['approval']['id']}", "sam").json["unverified"]["break_glass"]
    assert shown.isprintable()
    assert len(shown) <= 601


def test_901_seconds_are_refused_and_named(web):
    answer = ask(web, ttl_s=901)
    assert (answer.status_code, answer.json["member"]) == (400, "ttl_s")


def test_a_plain_request_for_the_same_is_denied(web):
    answer = ask(web, break_glass=None)
    assert (answer.status_code, answer.json["code"]) == (403, "policy_denied")


def test_it_can_be_found_among_all_grants(web):
    case, issued = broken(web.house)
    plain = web.house.issue(web.house.open_task())
    only = web.get("/v1/grants?break_glass=true", "ada").json["items"]
    assert [item["id"] for item in only] == [issued.grant.id]
    assert only[0]["break_glass"] == {"reason": REASON}
    others = web.get("/v1/grants?break_glass=false", "ada").json["items"]
    assert [item["id"] for item in others] == [plain.grant.id]
    assert web.get("/v1/grants?break_glass=yes", "ada").status_code == 400
    assert case.grant.id == issued.grant.id


def test_it_is_renewed_by_neither_door(web):
    _, issued = broken(web.house)
    answer = web.post(f"/v1/grants/{issued.grant.id}/renew", "summarizer", json={})
    assert (answer.status_code, answer.json["code"]) == (403, "forbidden")
    exchanged = web.form(
        "/oauth2/token",
        grant_type="urn:ietf:params:oauth:grant-type:token-exchange",
        subject_token=issued.credential.token.reveal(),
        subject_token_type="urn:ietf:params:oauth:token-type:access_token",
        **web.assertion("summarizer"),
    )
    assert exchanged.status_code == 400
    assert "break-glass" in exchanged.json["error_description"]


def test_a_review_is_listed_shown_and_completed(web):
    case, _ = broken(web.house)
    web.post(f"/v1/grants/{case.grant.id}/revoke", "ada", json={"reason": "repaired"})
    [item] = web.get("/v1/reviews?state=open", "audrey").json["items"]
    assert (item["state"], item["approved_by"], item["grant_state"]) == ("owed", ["sam", "sue"], "revoked")
    assert item["unverified"] == {"reason": REASON}
    path = f"/v1/reviews/{review_of(web.house, case)}"
    assert web.get(path, "audrey").json == item
    assert web.post(f"{path}/complete", "sam", json={"note": "fine"}).status_code == 403
    assert web.post(f"{path}/complete", "audrey", json={}).status_code == 400
    done = web.post(f"{path}/complete", "audrey", json={"note": "as it was said"})
    assert (done.status_code, done.json["state"], done.json["completed_by"]) == (200, "completed", "audrey")
    assert web.post(f"{path}/complete", "ada", json={"note": "again"}).status_code == 409
    assert web.get("/v1/reviews?state=open", "audrey").json["items"] == []
    assert web.get(f"{path}/complete", "audrey").status_code == 405


def test_a_review_that_is_not_for_somebody_is_like_none(web):
    """INV-28."""
    case, _ = broken(web.house)
    path, unknown = f"/v1/reviews/{review_of(web.house, case)}", "/v1/reviews/rev_" + "0" * 26
    for by in ("summarizer", "pipeline", "dana"):
        there, none = web.get(path, by), web.get(unknown, by)
        assert there.status_code == none.status_code == 404
        assert there.json["title"] == none.json["title"]
        assert web.get("/v1/reviews", by).json["items"] == []
    assert web.get(path).status_code == 401


def test_reviews_come_in_pages(web):
    for _ in range(3):
        case, _ = broken(web.house)
        web.house.broker.revocation.revoke_grant(web.house.caller("ada"), case.grant.id)
    first = web.get("/v1/reviews?limit=2", "ada").json
    rest = web.get(f"/v1/reviews?limit=2&cursor={first['next_cursor']}", "ada").json
    assert len(first["items"]) == 2 and len(rest["items"]) == 1
    assert rest["next_cursor"] is None


def test_a_vote_by_http_is_told_like_any_other(web):
    pending = ask(web).json
    approve_path = f"/v1/approvals/{pending['approval']['id']}/approve"
    assert web.post(approve_path, "sam", json={}).status_code == 200
    types = {item["type"] for item in web.get("/v1/audit", "audrey").json["items"]}
    assert {"break_glass.requested", "break_glass.voted"} <= types
