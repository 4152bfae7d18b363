"""What was done with grants over the wire: told, in one line of time, and held against what was granted."""

from dataclasses import replace
from datetime import timedelta

import pytest

from broker.domain.audit import Event
from broker.domain.clock import rfc3339
from broker.domain.identity import new_id
from broker.store.transitions import record
from tests.house import CRM


def told(grant, id="r1", at="2026-03-01T12:00:00Z", **more):
    return {"id": id, "kind": "tool", "action": "search_contacts", "at": at, "grant_id": grant["id"], **more}


def tell(web, *activities, by="summarizer"):
    return web.post("/v1/activities", by, json={"activities": list(activities)})


def lines(web, task, by="pipeline", query=""):
    answer = web.get(f"/v1/tasks/{task['id']}/timeline{query}", by)
    assert answer.status_code == 200, answer.json
    return answer.json["items"]


def walked(web, task, by="pipeline", limit=2, between=lambda: None):
    """Every page after the other."""
    found, cursor = [], None
    while True:
        query = f"?limit={limit}" + (f"&cursor={cursor}" if cursor else "")
        answer = web.get(f"/v1/tasks/{task['id']}/timeline{query}", by).json
        found += answer["items"]
        cursor = answer["next_cursor"]
        if cursor is None:
            return found
        between()


def test_issue_use_and_end_stand_in_one_line(web_on_both):
    web = web_on_both
    task = web.open_task()
    web.house.clock.forward(seconds=10)
    grant = web.grant(task).json["grant"]
    web.house.clock.forward(seconds=10)
    answer = tell(web, told(grant, at=rfc3339(web.house.clock()), scope="contacts:read"))
    assert (answer.status_code, answer.json) == (200, {"recorded": 1, "repeated": 0, "refused": []})
    web.house.clock.forward(seconds=10)
    web.post(f"/v1/tasks/{task['id']}/complete", "pipeline")
    found = lines(web, task)
    assert [line["what"] for line in found[:3]] == ["task.opened", "grant.issued", "activity.tool"]
    assert {line["what"] for line in found[3:]} == {"task.completed", "grant.revoked"}
    issue, use = found[1:3]
    assert (issue["source"], issue["who"], issue["scopes"]) == ("broker", "summarizer", ["contacts:read"])
    assert (use["source"], use["who"], use["role"], use["action"], use["resource"], use["scopes"], use["beyond"]) == (
        "report", "summarizer", "agent", "search_contacts", CRM, ["contacts:read"], [],
    )  # fmt: skip
    assert use["received_at"] == use["at"] == "2026-03-01T12:00:20Z"


def test_within_one_second_what_was_told_stands_where_it_was_told(web_on_both):
    web = web_on_both
    task = web.open_task()
    grant = web.grant(task).json["grant"]
    tell(web, told(grant))
    web.post(f"/v1/grants/{grant['id']}/revoke", "summarizer", json={})
    assert [line["what"] for line in lines(web, task)] == [
        "task.opened", "grant.issued", "activity.tool", "grant.revoked",
    ]  # fmt: skip


def test_parts_of_a_task_stand_in_its_line(web):
    task = web.open_task()
    part = web.open_task(parent_task_id=task["id"])
    grant = web.grant(part).json["grant"]
    tell(web, told(grant))
    assert {line["task_id"] for line in lines(web, task)} == {task["id"], part["id"]}
    assert {line["task_id"] for line in lines(web, part)} == {part["id"]}


def test_a_line_of_time_comes_in_pages_that_neither_lose_nor_repeat(web_on_both):
    web = web_on_both
    task = web.open_task()
    grants = [web.grant(task).json["grant"] for _ in range(2)]
    for second in range(4):
        at = rfc3339(web.house.clock())
        tell(web, *(told(grant, id=f"{grant['id'][-4:]}-{second}-{n}", at=at) for grant in grants for n in range(2)))
        web.house.clock.forward(seconds=1)
    whole = lines(web, task)
    assert len(whole) == 3 + 16
    for limit in (1, 2, 3, 7, 19, 20):
        assert walked(web, task, limit=limit) == whole
    assert [line["at"] for line in whole] == sorted(line["at"] for line in whole)


def test_pages_stay_what_they_are_while_more_is_told(web_on_both):
    web = web_on_both
    task = web.open_task()
    grant = web.grant(task).json["grant"]
    first = rfc3339(web.house.clock())
    tell(web, *(told(grant, id=f"a{number}", at=first) for number in range(5)))
    web.house.clock.forward(seconds=30)
    tell(web, *(told(grant, id=f"b{number}", at=rfc3339(web.house.clock())) for number in range(5)))
    before = [line["id"] for line in lines(web, task)]
    told_late = iter(range(100))

    def late():
        """Of before the page, of the same second, and of after it."""
        for at in (first, rfc3339(web.house.clock())):
            tell(web, told(grant, id=f"late{next(told_late)}", at=at))

    seen = [line["id"] for line in walked(web, task, limit=2, between=late) if line["id"] in before]
    assert seen == before


@pytest.mark.parametrize(
    "cursor", ["x", "MTc3MjM2NjQwMC54", "evt_00000000000000000000000000", "MTc3MjM2NjQwMA==", "%00", ""]
)
def test_a_cursor_that_is_none_of_this_list_is_refused(web, cursor):
    task = web.open_task()
    answer = web.get(f"/v1/tasks/{task['id']}/timeline?cursor={cursor}", "pipeline")
    assert (answer.status_code, answer.json["member"]) == (400, "cursor")


def test_a_line_of_time_is_narrowed_to_a_grant_or_to_whose_word_it_is(web):
    task = web.open_task()
    first, second = (web.grant(task).json["grant"] for _ in range(2))
    tell(web, told(first))
    assert {line["source"] for line in lines(web, task, query="?source=broker")} == {"broker"}
    assert [line["what"] for line in lines(web, task, query="?source=report")] == ["activity.tool"]
    assert {line["grant_id"] for line in lines(web, task, query=f"?grant={second['id']}")} == {second["id"]}


def test_an_agent_sees_the_task_and_what_it_holds_and_no_more(web_on_both):
    """INV-28."""
    web = web_on_both
    task = web.open_task("summarizer", "scribe")
    part = web.open_task("scribe", parent_task_id=task["id"])
    mine, theirs = (web.grant(task, by=by).json["grant"] for by in ("summarizer", "scribe"))
    web.grant(part, by="scribe")
    tell(web, told(mine))
    tell(web, told(theirs), by="scribe")
    web.grant(task, by="scribe", scopes=["contacts:write"])
    seen = lines(web, task, by="summarizer")
    assert {line["grant_id"] for line in seen} == {None, mine["id"]}
    assert [line["what"] for line in seen] == ["task.opened", "grant.issued", "activity.tool"]
    assert lines(web, task, by="summarizer", query=f"?grant={theirs['id']}") == []
    drift = web.get(f"/v1/tasks/{task['id']}/drift", "summarizer").json
    assert [grant["grant_id"] for grant in drift["grants"]] == [mine["id"]]
    for by in ("pipeline", "audrey", "ada"):
        assert {mine["id"], theirs["id"]} < {line["grant_id"] for line in lines(web, task, by=by)}


@pytest.mark.parametrize("what", ["timeline", "drift"])
def test_whoever_may_not_see_a_task_sees_none(web, what):
    task = web.open_task()
    for by in ("other-pipeline", "scribe", "crm-api"):
        theirs = web.get(f"/v1/tasks/{task['id']}/{what}", by)
        nothing = web.get(f"/v1/tasks/task_{'0' * 25}a/{what}", by)
        assert (theirs.status_code, nothing.status_code) == (404, 404)


def test_why_something_outside_failed_is_for_administrators(web):
    task = web.open_task()
    grant = web.grant(task).json["grant"]
    now = web.house.clock() + timedelta(seconds=1)
    said = Event(
        id=new_id("evt", now),
        at=now,
        type="lease.stuck",
        actor="broker",
        grant_id=grant["id"],
        reason="vault-7 said no",
    )
    with web.house.broker.database.begin() as db:
        record(db, [said])
    seen = {by: lines(web, task, by=by)[-1]["reason"] for by in ("pipeline", "summarizer", "ada")}
    assert seen == {
        "pipeline": "an administrator sees why", "summarizer": "an administrator sees why", "ada": "vault-7 said no",
    }  # fmt: skip


def test_drift_says_what_was_never_used_what_was_used_outside_and_what_would_be_enough(web_on_both):
    web = web_on_both
    task = web.open_task()
    grant = web.grant(task).json["grant"]
    clean = web.get(f"/v1/tasks/{task['id']}/drift", "pipeline").json
    assert (clean["drifted"], clean["unused"][0]["unreported"]) == (True, 1)
    tell(web, told(grant, scope="contacts:read"))
    assert not web.get(f"/v1/tasks/{task['id']}/drift", "pipeline").json["drifted"]
    tell(
        web,
        told(grant, id="r2", scope="contacts:delete", outcome="denied"),
        told(grant, id="r3", resource="https://mail.example/api"),
        told(grant, id="r4", resource=f"{CRM}/contacts/7", scope="contacts:read"),
    )
    drift = web.get(f"/v1/tasks/{task['id']}/drift", "pipeline").json
    assert drift["drifted"]
    found = {(each["why"], each["scope"], each["resource"], each["denied"]) for each in drift["outside"]}
    assert found == {
        ("scope", "contacts:delete", CRM, True),
        ("resource", None, "https://mail.example/api", False),
    }
    assert drift["complete"]


def test_one_telling_is_bounded(web):
    task = web.open_task()
    grant = web.grant(task).json["grant"]
    assert tell(web, *(told(grant, id=f"r{number}") for number in range(100))).json["recorded"] == 100
    answer = tell(web, *(told(grant, id=f"r{number}") for number in range(101)))
    assert (answer.status_code, answer.json["member"]) == (400, "activities")
    assert tell(web).status_code == 400


@pytest.mark.parametrize(
    ("changed", "member"),
    [
        ({"id": "a b"}, "activities.0.id"),
        ({"id": "x" * 129}, "activities.0.id"),
        ({"id": "é"}, "activities.0.id"),
        ({"kind": "read"}, "activities.0.kind"),
        ({"action": "a\u202eb"}, "activities.0.action"),
        ({"at": "2026-03-01T12:00:00+01:00"}, "activities.0.at"),
        ({"at": "2026-02-30T12:00:00Z"}, "at"),
        ({"at": 1772366400}, "activities.0.at"),
        ({"scope": "a b"}, "activities.0.scope"),
        ({"outcome": "fine"}, "activities.0.outcome"),
        ({"attributes": {"a": 1}}, "activities.0.attributes.a"),
        ({"attributes": {str(number): "x" for number in range(17)}}, "activities.0.attributes"),
        ({"reporter": "ada"}, "activities.0.reporter"),
    ],
)
def test_a_bad_activity_is_a_400_that_names_what_is_wrong(web, changed, member):
    grant = web.grant(web.open_task()).json["grant"]
    answer = tell(web, {**told(grant), **changed})
    assert (answer.status_code, answer.json["member"]) == (400, member)


def test_an_activity_is_tied_by_its_traceparent(web):
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
    task = web.open_task()
    body = {"task_id": task["id"], "resource": CRM, "scopes": ["contacts:read"]}
    grant = web.post("/v1/grants", "summarizer", json=body, headers=headers).json["grant"]
    own = {**told(grant), "traceparent": f"00-{trace}-b7ad6b7169203331-01"}
    del own["grant_id"]
    assert tell(web, own).json["recorded"] == 1
    assert lines(web, task, query="?source=report")[0]["grant_id"] == grant["id"]
    refused = tell(web, {**own, "id": "r2", "traceparent": "nonsense"}).json["refused"]
    assert [(each["id"], each["code"], each["member"]) for each in refused] == [("r2", "invalid_request", "grant_id")]


def test_whoever_tells_too_much_is_told_when_to_come_again(web):
    grant = web.grant(web.open_task()).json["grant"]
    service = web.house.broker.activities
    service._limits = replace(service._limits, max_activities_per_minute=1)
    assert tell(web, told(grant)).status_code == 200
    answer = tell(web, told(grant, id="r2"))
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "60")
