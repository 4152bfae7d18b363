"""Telling what was done with grants: by whom, of what, how often; and what becomes of it."""

from dataclasses import replace
from datetime import timedelta

import pytest
import sqlalchemy as sa

from broker.domain.activity import MAX_TOGETHER, Beyond, Kind, Outcome, Report
from broker.domain.clock import LEEWAY
from broker.domain.errors import Invalid, LimitExceeded, RoleMissing, Unavailable
from broker.domain.identity import is_id
from broker.domain.lifecycle import TaskState
from broker.store import activities, models
from tests.conftest import NOW
from tests.house import CRM, build_house

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def report(grant=None, id="r1", **more):
    told = {"kind": Kind.REQUEST, "action": "GET /contacts", "at": NOW, "scope": "contacts:read"}
    return Report(id=id, grant_id=None if grant is None else grant.id, **told | more)


def tell(house, *reports, by="summarizer", caller=None):
    return house.broker.activities.take(caller or house.caller(by), list(reports))


def codes(taken):
    return [refused.why.code for refused in taken.refused]


def rows(house):
    table = models.table_of(models.Activity)
    with house.broker.database.read() as db:
        return db.execute(sa.select(table).order_by(table.c.id)).fetchall()


def events(house, type_):
    return house.broker.audit_trail.page(house.caller("audrey"), {"type": type_}, before=None, limit=100)


def traced(house, task, trace=TRACE, **more):
    caller = replace(house.caller("summarizer"), trace_id=trace)
    return house.issue(task, caller=caller, **more).grant


@pytest.fixture
def task(house):
    return house.open_task("summarizer", "scribe")


@pytest.fixture
def grant(house, task):
    return house.issue(task).grant


def test_an_agent_tells_what_it_did_with_its_grant(house, task, grant):
    told = report(grant, attributes={"batch": "seven"}, outcome=Outcome.ERROR)
    taken = tell(house, told)
    assert (taken.recorded, taken.repeated, taken.refused) == (1, 0, ())
    [row] = rows(house)
    assert is_id(row.id, "act")
    assert (row.task_id, row.grant_id, row.reporter, row.role) == (task.id, grant.id, "summarizer", "agent")
    assert (row.kind, row.action, row.scope, row.resource) == ("request", "GET /contacts", "contacts:read", CRM)
    assert (row.outcome, row.attributes, row.at, row.received_at) == ("error", {"batch": "seven"}, NOW, NOW)


def test_a_verifier_tells_of_grants_on_what_it_verifies(house, grant):
    assert tell(house, report(grant), by="crm-api").recorded == 1
    assert rows(house)[0].role == "verifier"


@pytest.mark.parametrize("by", ["scribe", "ledger-api"])
def test_of_a_grant_of_others_one_tells_as_of_one_that_is_not_there(house, grant, by):
    """INV-26, INV-28."""
    absent = replace(report(id="r2"), grant_id=f"grt_{'0' * 25}a")
    refused = tell(house, report(grant), absent, by=by).refused
    assert [each.why.code for each in refused] == ["not_found", "not_found"]
    theirs, nothing = (each.why.detail for each in refused)
    assert theirs.replace(grant.id, "") == nothing.replace(absent.grant_id, "")
    assert rows(house) == []
    [event] = events(house, "activity.refused")
    assert (event.actor, event.outcome, event.data["activities"]) == (by, "not_found", 2)


def test_what_is_not_ones_own_stops_nothing_else_of_the_same_telling(house, task, grant):
    other = house.issue(task, by="scribe").grant
    taken = tell(house, report(grant), report(other, id="r2"), report(grant, id="r3"))
    assert (taken.recorded, codes(taken), taken.refused[0].place) == (2, ["not_found"], 1)
    assert [row.grant_id for row in rows(house)] == [grant.id, grant.id]


def test_another_workload_of_the_same_name_holds_another_grant(house, grant):
    """INV-17."""
    caller = house.caller("summarizer")
    other = replace(caller, principal=replace(caller.principal, subject="dev:another"))
    assert codes(tell(house, report(grant), caller=other)) == ["not_found"]


def test_two_workloads_of_one_name_do_not_take_each_others_ids(house, grant):
    caller = house.caller("crm-api")
    other = replace(caller, principal=replace(caller.principal, subject="dev:another"))
    for each in (caller, other):
        assert tell(house, report(grant), caller=each).recorded == 1


@pytest.mark.parametrize("by", ["pipeline", "ada", "audrey", "gus"])
def test_whoever_is_neither_agent_nor_verifier_tells_nothing(house, grant, by):
    with pytest.raises(RoleMissing):
        tell(house, report(grant), by=by)
    assert events(house, "activity.refused")[0].outcome == "role_missing"


def test_a_grant_without_a_credential_was_not_used(house, task):
    with pytest.raises(Exception, match="polic"):
        house.issue(task, scope="contacts:write")
    with house.broker.database.read() as db:
        [denied] = db.execute(sa.select(models.table_of(models.Grant))).fetchall()
    for by in ("summarizer", "crm-api"):
        assert codes(tell(house, report(denied), by=by)) == ["not_found"]


def test_told_again_it_is_the_same_activity(house, grant):
    batch = [report(grant, id=f"r{number}") for number in range(20)]
    assert tell(house, *batch).recorded == 20
    house.clock.forward(seconds=5)
    again = tell(house, *batch, report(grant, id="r20"))
    assert (again.recorded, again.repeated) == (1, 20)
    assert len(rows(house)) == 21


def test_the_same_id_for_something_else_is_refused_and_the_first_stands(house, grant):
    """INV-06."""
    tell(house, report(grant))
    assert codes(tell(house, report(grant, action="DELETE /contacts"))) == ["idempotency_conflict"]
    together = tell(
        house, report(grant, id="r2"), report(grant, id="r2"), report(grant, id="r2", outcome=Outcome.ERROR)
    )
    assert (together.recorded, together.repeated, codes(together)) == (1, 1, ["idempotency_conflict"])
    assert [row.action for row in rows(house)] == ["GET /contacts"] * 2


def test_who_tells_again_may_have_read_the_clock_again_and_the_first_time_stands(house, grant):
    house.clock.forward(seconds=600)
    tell(house, report(grant))
    assert tell(house, report(grant, at=NOW + timedelta(minutes=5))).repeated == 1
    assert codes(tell(house, report(grant, at=NOW + timedelta(minutes=5, seconds=1)))) == ["idempotency_conflict"]
    assert [row.at for row in rows(house)] == [NOW]


def test_two_reporters_have_ids_of_their_own(house, grant):
    assert tell(house, report(grant)).recorded == 1
    assert tell(house, report(grant), by="crm-api").recorded == 1


def test_what_was_done_is_told_within_a_day_and_not_before_it_is_done(house, grant):
    early, late = NOW - timedelta(days=1, seconds=1), NOW + LEEWAY + timedelta(seconds=1)
    taken = tell(house, report(grant, id="a", at=early), report(grant, id="b", at=late), report(grant, id="c"))
    assert (taken.recorded, codes(taken)) == (1, ["invalid_request"] * 2)
    assert {refused.why.member for refused in taken.refused} == {"at"}


def test_no_secret_is_kept(house, grant):
    """INV-30."""
    token = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl"
    named = report(grant, id="a", attributes={"db.password": "hunter2"})
    hidden = report(
        grant, id="b", action=f"GET /x?token={token}", resource=f"https://ada:letmein@{CRM[8:]}/x?sig=hush-hush",
        attributes={"note": f"Bearer {token}"},
    )  # fmt: skip
    taken = tell(house, named, hidden)
    assert codes(taken) == ["invalid_request"]
    [row] = rows(house)
    for secret in (token, "hunter2", "letmein", "hush-hush"):
        assert secret not in str(tuple(row))
    assert row.resource == f"{CRM}/x"


def test_what_is_told_of_a_grant_that_has_ended_is_kept_and_says_so(house, task, grant):
    house.broker.tasks.end(house.caller("pipeline"), task.id, TaskState.COMPLETED)
    house.clock.forward(seconds=60)
    assert tell(house, report(grant, at=house.clock())).recorded == 1
    lines = [line for line, _ in house.broker.timeline.page(house.caller("pipeline"), task.id, source="report")]
    assert [line.beyond for line in lines] == [(Beyond.AFTER_END,)]


# --- traces ----------------------------------------------------------------------------------------------------------


def test_a_report_is_tied_by_the_trace_in_which_the_grant_was_asked_for(house, task):
    grant = traced(house, task)
    assert tell(house, report(trace_id=TRACE)).recorded == 1
    assert [row.grant_id for row in rows(house)] == [grant.id]
    for by in ("scribe", "ledger-api"):
        assert codes(tell(house, report(trace_id=TRACE), by=by)) == ["not_found"]
    assert codes(tell(house, report(id="r2", trace_id="0" * 31 + "1"))) == ["not_found"]


def test_whoever_verifies_names_the_grant_because_its_caller_chooses_the_trace(house, task):
    """Else one agent could put down what it does to the grant of another, in the words of a resource."""
    grant = traced(house, task)
    [refused] = tell(house, report(trace_id=TRACE), by="crm-api").refused
    assert (refused.why.code, "grant_id" in refused.why.detail) == ("not_found", True)
    asked = report(trace_id=TRACE, loose=True, inbound=True)
    assert tell(house, asked, by="crm-api").passed_over == 1
    assert rows(house) == []
    assert tell(house, replace(asked, grant_id=grant.id), by="crm-api").recorded == 1


def test_a_trace_ties_to_what_the_very_workload_holds(house, task, monkeypatch):
    """INV-17: grants of another of the same name are not among those that are looked through."""
    monkeypatch.setattr("broker.services.activities._GRANTS_OF_TRACES", 1)
    grant = traced(house, task)
    traced(house, task)
    with house.broker.database.begin() as db:
        table = models.table_of(models.Grant)
        db.execute(sa.update(table).where(table.c.id != grant.id).values(subject="dev:another"))
    assert tell(house, report(trace_id=TRACE)).recorded == 1
    assert [row.grant_id for row in rows(house)] == [grant.id]


@pytest.mark.parametrize("changed", [{"subject": "dev:another"}, {"issuer": "another"}])
def test_an_agent_sees_nothing_of_what_another_of_its_name_holds(house, task, grant, changed):
    """INV-17, INV-28."""
    tell(house, report(grant))
    caller = house.caller("summarizer")
    other = replace(caller, principal=replace(caller.principal, **changed))
    timeline = house.broker.timeline
    for asks, sees in ((caller, {None, grant.id}), (other, {None})):
        assert {line.grant_id for line, _ in timeline.page(asks, task.id)} == sees
        assert {each.grant_id for each in timeline.drift(asks, task.id).grants} == sees - {None}
    assert [line for line, _ in timeline.page(other, task.id, source="report")] == []


def test_grants_of_others_in_a_trace_hide_none_of_ones_own(house, task, monkeypatch):
    monkeypatch.setattr("broker.services.activities._GRANTS_OF_TRACES", 2)
    grant = traced(house, task)
    scribe = replace(house.caller("scribe"), trace_id=TRACE)
    for _ in range(3):
        house.issue(task, by="scribe", caller=scribe)
    assert tell(house, report(trace_id=TRACE)).recorded == 1
    assert [row.grant_id for row in rows(house)] == [grant.id]


def test_of_several_grants_in_a_trace_none_is_guessed(house, task):
    for _ in range(2):
        traced(house, task)
    assert codes(tell(house, report(trace_id=TRACE))) == ["conflict"]
    assert rows(house) == []


def test_of_several_grants_in_a_trace_the_one_that_lived_then_is_meant(house, task):
    first = traced(house, task)
    house.broker.revocation.revoke_grant(house.caller("summarizer"), first.id)
    house.clock.forward(seconds=60)
    second = traced(house, task)
    tell(house, report(trace_id=TRACE, at=house.clock()))
    assert [row.grant_id for row in rows(house)] == [second.id]


def test_a_report_without_a_grant_and_without_a_trace_is_about_nothing(house):
    assert codes(tell(house, report())) == ["invalid_request"]


def test_what_a_program_does_besides_is_passed_over(house, task):
    traced(house, task)
    elsewhere = report(trace_id=TRACE, resource="https://llm.example/v1/chat", loose=True)
    nowhere = report(id="r2", trace_id="0" * 31 + "1", loose=True)
    taken = tell(house, elsewhere, nowhere)
    assert (taken.passed_over, taken.recorded, taken.refused) == (2, 0, ())
    assert (rows(house), events(house, "activity.refused")) == ([], [])


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_so_many_of_a_grant_are_kept_and_the_rest_is_counted(store_url, tmp_path):
    """INV-34: whoever tells."""
    house = build_house(store_url, tmp_path, max_activities_per_grant=5)
    try:
        task = house.open_task()
        grant = house.issue(task).grant
        assert tell(house, *(report(grant, id=f"a{number}") for number in range(4))).recorded == 4
        taken = tell(house, *(report(grant, id=f"b{number}") for number in range(4)), by="crm-api")
        assert (taken.recorded, codes(taken)) == (1, ["limit_exceeded"] * 3)
        assert len(rows(house)) == 5
        assert tell(house, report(grant, id="a0")).repeated == 1, "what is kept may be told again"
        drift = house.broker.timeline.drift(house.caller("pipeline"), task.id)
        assert (drift.dropped, drift.complete) == (3, False)
    finally:
        house.broker.close()


def test_one_reporter_tells_so_much_in_a_minute(store_url, tmp_path):
    house = build_house(store_url, tmp_path, max_activities_per_minute=10)
    try:
        grant = house.issue(house.open_task()).grant
        house.clock.forward(seconds=15)
        assert tell(house, *(report(grant, id=f"a{number}") for number in range(10))).recorded == 10
        with pytest.raises(LimitExceeded) as refused:
            tell(house, report(grant, id="b"))
        assert refused.value.retry_after_s == 45
        assert events(house, "activity.refused") == [], "or a flood would be one in the audit trail"
        assert tell(house, report(grant, id="c"), by="crm-api").recorded == 1, "others have their own"
        house.clock.forward(seconds=45)
        assert tell(house, report(grant, id="b")).recorded == 1
        with pytest.raises(LimitExceeded):
            tell(house, *(report(grant, id=f"d{number}") for number in range(11)))
    finally:
        house.broker.close()


def test_one_telling_has_an_end(house, grant):
    with pytest.raises(Invalid, match="2049"):
        tell(house, *[report(grant)] * (MAX_TOGETHER + 1))


def test_the_largest_telling_fits_into_one_statement(house, grant):
    every = [report(grant, id=f"r{number}") for number in range(MAX_TOGETHER)]
    assert tell(house, *every).recorded == MAX_TOGETHER
    assert tell(house, *every).repeated == MAX_TOGETHER


def test_whoever_tells_leaves_connections_for_those_who_end_authority(house, grant, monkeypatch):
    """INV-27."""
    monkeypatch.setattr("broker.services.activities._PATIENCE_S", 0.01)
    with house.broker.activities._turn(), house.broker.activities._turn():
        with pytest.raises(Unavailable):
            tell(house, report(grant))
        house.broker.revocation.revoke_grant(house.caller("summarizer"), grant.id)
    assert tell(house, report(grant)).recorded == 1


def test_what_was_told_long_ago_is_forgotten_in_bits(house, grant):
    tell(house, *(report(grant, id=f"a{number}") for number in range(25)))
    house.clock.forward(days=10)
    tell(house, report(grant, id="b", at=house.clock()))
    now = house.clock.forward(days=20)
    keep = house.broker.settings.limits.keep_activities
    bits = []
    while not bits or bits[-1]:
        with house.broker.database.begin() as db:
            bits.append(activities.forget_activities(db, now=now + timedelta(seconds=1), keep=keep, limit=10))
    assert bits == [10, 10, 5, 0]
    assert len(rows(house)) == 1
    assert _tallies(house) == 1
    house.clock.forward(days=11)
    assert house.broker.sweeper.sweep().activities_forgotten == 1
    assert (rows(house), _tallies(house)) == ([], 0)


def test_what_is_as_old_as_it_is_kept_is_still_there(house, grant):
    tell(house, report(grant))
    house.clock.forward(days=30)
    assert house.broker.sweeper.sweep().activities_forgotten == 0
    house.clock.forward(seconds=1)
    assert house.broker.sweeper.sweep().activities_forgotten == 1


def _tallies(house):
    with house.broker.database.read() as db:
        return db.execute(sa.select(sa.func.count()).select_from(models.table_of(models.ActivityTally))).scalar_one()


def test_both_ways_of_holding_a_report_against_its_grant_agree(house, task, grant):
    """`beyond` looks at one activity, the store counts many."""
    house.broker.revocation.revoke_grant(house.caller("summarizer"), grant.id)
    moments = [NOW + timedelta(seconds=seconds) for seconds in (-31, -30, -1, 0, 1, 30)]
    house.clock.forward(seconds=60)
    tell(house, *(report(grant, id=f"r{number}", at=at) for number, at in enumerate(moments)))
    caller = house.caller("pipeline")
    lines = [line for line, _ in house.broker.timeline.page(caller, task.id, source="report")]
    counted = {each.why: each.count for each in house.broker.timeline.drift(caller, task.id).outside}
    for why in (Beyond.BEFORE_ISSUE, Beyond.AFTER_END):
        assert sum(why in line.beyond for line in lines) == counted.get(why, 0) > 0


def test_a_resource_that_is_registered_no_longer_has_no_verifier(house, grant):
    catalogue = replace(house.broker.settings.catalogue, resources=())
    house.broker.administration.apply(replace(catalogue, policies={}), by="tests")
    assert codes(tell(house, report(grant), by="crm-api")) == ["not_found"]
    assert tell(house, report(grant)).recorded == 1
