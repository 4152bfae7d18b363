"""A break-glass: declared beforehand, given by two, for minutes, loud at each step, and reviewed afterwards."""

from dataclasses import replace
from datetime import timedelta

import pytest
import sqlalchemy as sa

from broker.domain.approval import Route
from broker.domain.catalogue import PrincipalRule
from broker.domain.errors import (
    ConfigurationError,
    Conflict,
    Forbidden,
    Invalid,
    InvalidScope,
    InvalidTarget,
    LimitExceeded,
    LockedDown,
    NotFound,
    PolicyDenied,
    ProviderUnavailable,
    RoleMissing,
)
from broker.domain.grant import BREAK_GLASS_LIFE, OPEN_BREAK_GLASSES, GrantRequest
from broker.domain.lifecycle import TaskState
from broker.domain.policy import PolicySet
from broker.providers.alerts import body_of
from broker.providers.notices import Mail, mail_of, signed_json, slack, teams
from broker.services import approval
from broker.services.alerting import Alerting
from broker.services.notifying import Notifying, notice_of
from broker.store import models
from tests.approvals import PEOPLE, apply, approve, ask, asking, collect, deny, person, states, withdraw
from tests.break_glass import (
    EMERGENCY,
    GLASS,
    REASON,
    WRITE,
    break_glass,
    broken,
    glass_house,
    review_of,
    with_limits,
)
from tests.house import CRM, ISSUER, build_house

HOSTILE = "down\u202egpj.exe <script>alert(7)</script> *bold* [link](http://evil.test) " + "x" * 800


@pytest.fixture
def house(house):
    return glass_house(house)


@pytest.fixture
def glass(sqlite_house):
    return glass_house(sqlite_house)


def events(house, *types):
    table = models.table_of(models.AuditEvent)
    with house.broker.database.read() as db:
        return db.execute(sa.select(table).where(table.c.type.in_(types)).order_by(table.c.id)).fetchall()


def loud(house):
    table = models.table_of(models.AuditEvent)
    where = table.c.type.like("break_glass.%") | table.c.type.like("review.%")
    with house.broker.database.read() as db:
        return [row.type for row in db.execute(sa.select(table).where(where).order_by(table.c.id))]


class Heard:
    """Alerts and notices that a test listens to."""

    def __init__(self):
        self.heard = []

    def send(self, message):
        self.heard.append(message)


SAMS_BOT = person("sams-bot", "security", owner="sam", roles=("approver", "auditor"))
ASKS_ONE = """
@id("read-asks-one") @approval("security")
permit (principal == Agent::"summarizer", action == Action::"contacts:read", resource == Resource::"https://crm.example/api");
"""


# --- What is asked for ---


def test_two_people_open_it_for_minutes(house):
    case = break_glass(house)
    assert states(house, case) == ("open", "pending")
    assert (case.grant.break_glass, case.grant.ttl_s) == (REASON, 300)
    assert [(need.group, need.quorum, need.owner_may) for need in case.approval.needs] == [("security", 2, False)]
    approve(house, case, by="sam")
    assert states(house, case) == ("open", "pending")
    with pytest.raises(Conflict, match="waits for people"):
        collect(house, case)
    approve(house, case, by="sue")
    issued = collect(house, case)
    assert house.is_active(issued)
    assert (issued.grant.policies, issued.grant.break_glass) == (("crm-emergency",), REASON)
    house.clock.forward(seconds=300)
    assert not house.is_active(issued)


def test_a_plain_request_is_never_decided_by_it(house):
    with pytest.raises(PolicyDenied) as refused:
        house.issue(house.open_task(), scope="contacts:write", may_wait=True)
    # Nor is it held out: nobody is to be led to break a glass.
    assert "crm-emergency" not in str(refused.value.detail)
    assert loud(house) == []


def test_a_break_glass_is_decided_by_nothing_else(house):
    """What a plain permit allows is asked for plainly."""
    with pytest.raises(PolicyDenied):
        break_glass(house, scopes=frozenset({"contacts:read"}))
    with pytest.raises(PolicyDenied):
        break_glass(house, scopes=WRITE | {"contacts:read"})


@pytest.mark.parametrize(
    ("by", "more"),
    [
        ("scribe", {}),
        ("summarizer", {"resource": "https://ledger.example/api", "scopes": frozenset({"entries:read"})}),
        ("summarizer", {"scopes": frozenset({"contacts:read"})}),
    ],
)
def test_what_is_not_declared_beforehand_is_refused_and_on_record(house, by, more):
    with pytest.raises(PolicyDenied):
        break_glass(house, house.open_task("summarizer", "scribe"), by=by, **more)
    [refused] = events(house, "break_glass.refused")
    assert (refused.actor, refused.outcome, refused.data["break_glass"]) == (by, "policy_denied", REASON)
    # Whoever is refused decides how often: that is no alert.
    table = models.table_of(models.Alert)
    with house.broker.database.read() as db:
        assert db.execute(sa.select(table)).fetchall() == []


def test_it_may_last_900_seconds_and_not_901(house):
    with pytest.raises(Invalid, match="900 s at most") as refused:
        break_glass(house, ttl=timedelta(seconds=901))
    assert refused.value.member == "ttl_s"
    case, issued = broken(house, ttl=timedelta(seconds=900))
    assert issued.grant.expires_at == house.clock() + timedelta(seconds=900) == house.clock() + BREAK_GLASS_LIFE
    assert case.grant.ttl_s == 900


def test_its_ceiling_holds_whatever_is_configured(house):
    catalogue = house.broker.standing.now().catalogue
    longer = tuple(replace(resource, max_ttl_s=3600) for resource in catalogue.resources)
    apply(house, replace(catalogue, resources=longer))
    house.broker.issuance._limits = replace(house.broker.settings.limits, default_ttl=timedelta(hours=1))
    case, issued = broken(house)
    assert (case.grant.ttl_decided_by, issued.grant.ttl_s) == ("break_glass", 900)
    # And the database keeps it, whoever writes.
    grants = models.table_of(models.Grant)
    with pytest.raises(sa.exc.IntegrityError), house.broker.database.engine.begin() as db:
        db.execute(sa.update(grants).where(grants.c.id == case.grant.id).values(ttl_s=901))


def test_a_lockdown_wins(house):
    case = break_glass(house)
    approve(house, case, by="sam")
    house.broker.revocation.set_lockdown(house.caller("ada"), "agent", "summarizer", reason="an incident")
    assert states(house, case) == ("withdrawn", "revoked")
    with pytest.raises(LockedDown):
        break_glass(house)


def test_it_is_not_renewed(house):
    case, issued = broken(house, ttl=timedelta(seconds=300))
    with pytest.raises(Forbidden, match="not renewed"):
        house.broker.renewal.renew(house.caller("summarizer"), case.grant.id, ttl=timedelta(seconds=10))
    assert house.is_active(issued)


def test_it_is_not_handed_down(house):
    task = house.open_task("summarizer", "scribe")
    wrong = {"hand_to": {"hand_to": ("scribe",)}, "break_glass": {"parent_grant_id": "grt_" + "0" * 26}}
    for member, more in wrong.items():
        with pytest.raises(Invalid) as refused:
            break_glass(house, task, **more)
        assert refused.value.member == member
    everybody = GLASS + '@id("scribe-writes") permit (principal == Agent::"scribe", action, resource);'
    apply(house, asking(house, policies=everybody))
    case, _ = broken(house, task)
    for by_token, by in ((True, "scribe"), (False, "summarizer")):
        with pytest.raises(Forbidden, match="not handed down"):
            house.broker.issuance.request(
                GrantRequest(
                    caller=house.caller(by),
                    task_id=task.id,
                    resource=CRM,
                    scopes=WRITE,
                    parent_grant_id=case.grant.id,
                    parent_by_token=by_token,
                )
            )


def test_the_same_emergency_joins_the_one_that_waits_and_other_words_are_told_so(house):
    task = house.open_task()
    first = break_glass(house, task)
    assert break_glass(house, task).approval.id == first.approval.id
    with pytest.raises(Conflict, match=first.approval.id):
        break_glass(house, task, reason="another reason")
    assert loud(house).count("break_glass.requested") == 1


def test_the_reason_is_part_of_what_people_approve(house):
    """INV-14: with other words it is another request."""
    case = break_glass(house)
    approve(house, case, by="sam")
    approve(house, case, by="sue")
    grants = models.table_of(models.Grant)
    with house.broker.database.begin() as db:
        db.execute(sa.update(grants).where(grants.c.id == case.grant.id).values(break_glass="something else"))
    with pytest.raises(Conflict, match="not what grant"):
        collect(house, case)


# --- Who gives it ---


def test_one_person_is_never_two(house):
    case = break_glass(house)
    approve(house, case, by="sam")
    approve(house, case, by="sam")
    assert states(house, case) == ("open", "pending")


def test_nor_by_what_they_own(house):
    """INV-15."""
    apply(house, asking(house, policies=GLASS, people=(*PEOPLE, SAMS_BOT)))
    case = break_glass(house)
    approve(house, case, by="sam")
    with pytest.raises(Forbidden, match="may be the same person"):
        approve(house, case, by="sams-bot")
    assert states(house, case) == ("open", "pending")


def test_who_asks_and_who_owns_who_asks_does_not_count(house):
    case = break_glass(house)
    with pytest.raises(Forbidden, match="one owner"):
        approve(house, case, by="olga")
    for name in ("pipeline", "summarizer"):
        with pytest.raises(RoleMissing):
            approve(house, case, by=name)
    found = asking(house, policies=GLASS)
    both = tuple(
        replace(rule, roles=(*rule.roles, "approver"), groups=("security",))
        if rule.name in ("pipeline", "summarizer")
        else rule
        for rule in found.principals
    )
    apply(house, replace(found, principals=both))
    for name in ("pipeline", "summarizer"):
        with pytest.raises(Forbidden, match="asked for this itself"):
            approve(house, case, by=name)
    assert states(house, case) == ("open", "pending")


def test_a_no_ends_it(house):
    case = break_glass(house)
    approve(house, case, by="sam")
    deny(house, case, by="sid", reason="use the runbook")
    assert states(house, case) == ("denied", "denied")
    assert loud(house)[-2:] == ["break_glass.voted", "break_glass.ended"]
    assert house.broker.reviews.page(house.caller("ada")) == []


def test_whose_yes_lapsed_does_not_open_it(house):
    case = break_glass(house)
    approve(house, case, by="sam")
    approve(house, case, by="sue")
    without_sue = (*(rule for rule in PEOPLE if rule.name != "sue"), person("sol", "security"))
    apply(house, asking(house, policies=GLASS, people=without_sue))
    with pytest.raises(Forbidden, match="other people"):
        collect(house, case)


# --- What waits beside it ---


def plainly(house, *, by="summarizer"):
    return ask(house, house.open_task("summarizer", "scribe"), by=by, scopes=frozenset({"contacts:read"}))


def test_plain_requests_never_stop_an_emergency(house):
    apply(house, asking(house, policies=EMERGENCY + ASKS_ONE))
    with_limits(house, max_open_approvals_per_agent=2, max_open_approvals_per_group=2)
    for _ in range(2):
        plainly(house)
    with pytest.raises(LimitExceeded) as refused:
        plainly(house)
    assert refused.value.limit == "max_open_per_agent"
    case = break_glass(house)
    assert states(house, case) == ("open", "pending")


def test_emergencies_stop_no_plain_request(house):
    apply(house, asking(house, policies=EMERGENCY + ASKS_ONE))
    with_limits(house, max_open_approvals_per_agent=2, max_open_approvals_per_group=2)
    for _ in range(OPEN_BREAK_GLASSES):
        break_glass(house)
    for _ in range(2):
        plainly(house)
    with pytest.raises(LimitExceeded) as refused:
        plainly(house)
    assert refused.value.limit == "max_open_per_agent"


def test_a_full_group_is_asked_in_an_emergency_still(house):
    apply(house, asking(house, policies=EMERGENCY + ASKS_ONE))
    with_limits(house, max_open_approvals_per_group=1)
    break_glass(house)
    plainly(house)
    with pytest.raises(LimitExceeded) as refused:
        plainly(house)
    assert refused.value.limit == "max_open_per_group"
    break_glass(house)


def test_an_agent_has_three_of_them_open_and_not_four(house):
    """INV-34: each is told to everybody."""
    cases = [break_glass(house) for _ in range(3)]
    with pytest.raises(LimitExceeded) as refused:
        break_glass(house)
    assert (refused.value.limit, refused.value.value) == ("open_break_glasses", OPEN_BREAK_GLASSES)
    assert len([kind for kind in loud(house) if kind == "break_glass.requested"]) == 3
    withdraw(house, cases[0])
    break_glass(house)


@pytest.mark.parametrize("more", [{}, {"resource": "https://nowhere.example"}, {"scopes": frozenset({"no:such"})}])
def test_who_probes_for_a_glass_pauses_and_is_locked_down_like_any_other(store_url, tmp_path, more):
    pause = timedelta(seconds=5)
    house = build_house(store_url, tmp_path, denials_throttle=2, denials_lockdown=3, throttle_pause=pause)
    try:
        apply(house, asking(house, policies=GLASS, people=PEOPLE))
        task = house.open_task("scribe")
        for _ in range(2):
            with pytest.raises((PolicyDenied, InvalidTarget, InvalidScope)):
                break_glass(house, task, by="scribe", **more)
        with pytest.raises(LimitExceeded) as refused:
            break_glass(house, task, by="scribe", **more)
        assert refused.value.limit == "denials_throttle"
        house.clock.forward(seconds=5)
        with pytest.raises((PolicyDenied, InvalidTarget, InvalidScope)):
            break_glass(house, task, by="scribe", **more)
        [lockdown] = house.broker.revocation.lockdowns(house.caller("ada"))
        assert (lockdown.axis, lockdown.value, lockdown.set_by) == ("agent", "scribe", "broker")
    finally:
        house.broker.close()


# --- Declared beforehand ---

_TWO = '@break_glass("true") @approval("security") @quorum("2")'
_AGENT, _SCOPE = 'principal == Agent::"summarizer"', 'action == Action::"contacts:write"'
_RESOURCE = f'resource == Resource::"{CRM}"'
_EXACT = f"permit ({_AGENT}, {_SCOPE}, {_RESOURCE});"


@pytest.mark.parametrize(
    ("policy", "sentence"),
    [
        (f"{_TWO} permit (principal, {_SCOPE}, {_RESOURCE});", "one agent"),
        (f"{_TWO} permit (principal is Agent, {_SCOPE}, {_RESOURCE});", "one agent"),
        (f'{_TWO} permit (principal in Agent::"summarizer", {_SCOPE}, {_RESOURCE});', "one agent"),
        (f"{_TWO} permit ({_AGENT}, action, {_RESOURCE});", "its scopes"),
        (f"{_TWO} permit ({_AGENT}, {_SCOPE}, resource);", "one resource"),
        (f"{_TWO} permit ({_AGENT}, {_SCOPE}, resource is Resource);", "one resource"),
        (f'@break_glass("true") {_EXACT}', "by 2 people at least"),
        (f'@break_glass("true") @approval("security") {_EXACT}', "by 2 people at least"),
        (f'@break_glass("true") @approval("security") @quorum("1") {_EXACT}', "by 2 people at least"),
        (f'{_TWO} @owner_may_approve("true") {_EXACT}', "never counts"),
        (f'{_TWO} @max_ttl("901") {_EXACT}', "900 s at most"),
        (f'@break_glass("true") forbid ({_AGENT}, {_SCOPE}, {_RESOURCE});', "opens nothing"),
        (f'@break_glass("yes") @approval("security") @quorum("2") {_EXACT}', "write @break_glass"),
        (f'@break_glas("true") @approval("security") @quorum("2") {_EXACT}', "did you mean"),
        (f'@break_glass("true") @approval("security") @quorum("4") {_EXACT}', "there are 3"),
        (f'@break_glass("true") @approval("databases") @quorum("2") {_EXACT}', "there are 1"),
        (f'@break_glass("true") @approval("nobody") @quorum("2") {_EXACT}', "there are 0"),
    ],
)
def test_one_that_is_too_wide_or_that_nobody_could_give_is_refused_on_load(sqlite_house, policy, sentence):
    with pytest.raises(ConfigurationError) as refused:
        apply(sqlite_house, asking(sqlite_house, policies=f'@id("emergency") {policy}'))
    assert sentence in refused.value.problems[0]


def test_several_scopes_may_be_named_one_by_one(sqlite_house):
    both = 'action in [Action::"contacts:read", Action::"contacts:write"]'
    several = f'@id("emergency") {_TWO} permit ({_AGENT}, {both}, {_RESOURCE});'
    glass_house(sqlite_house, several)
    case = break_glass(sqlite_house, scopes=WRITE | {"contacts:read"})
    assert states(sqlite_house, case) == ("open", "pending")


def test_an_agent_that_is_many_workloads_has_no_break_glass(sqlite_house):
    catalogue = asking(sqlite_house, policies=GLASS)
    many = tuple(
        replace(rule, subject=None, subject_prefix="dev:agents/") if rule.name == "summarizer" else rule
        for rule in catalogue.principals
    )
    with pytest.raises(ConfigurationError, match="one workload"):
        apply(sqlite_house, replace(catalogue, principals=many))


@pytest.mark.parametrize("shared", [{"owner": "sam"}, {"subject": "dev:sam", "issuer": "people"}])
def test_two_principals_of_one_person_are_not_two_who_could_give_it(sqlite_house, shared):
    catalogue = asking(sqlite_house, policies=GLASS, people=(PEOPLE[0], replace(SAMS_BOT, **shared)))
    with pytest.raises(ConfigurationError, match="there are 1"):
        PolicySet.compile(catalogue)
    PolicySet.compile(asking(sqlite_house, policies=GLASS, people=(*PEOPLE[:2], SAMS_BOT)))


def test_nor_is_one_of_what_asks(sqlite_house):
    people = (PEOPLE[0], person("its-own", "security", owner="summarizer"))
    with pytest.raises(ConfigurationError, match="there are 1"):
        PolicySet.compile(asking(sqlite_house, policies=GLASS, people=people))


def test_who_gave_it_and_what_they_own_leave_nobody_to_review_it(sqlite_house):
    catalogue = asking(sqlite_house, policies=GLASS, people=(*PEOPLE[:2], SAMS_BOT))
    alone = tuple(rule for rule in catalogue.principals if rule.name not in ("ada", "audrey"))
    with pytest.raises(ConfigurationError, match="nobody is left who may review"):
        PolicySet.compile(replace(catalogue, principals=alone))


def test_somebody_has_to_be_left_who_may_review_it(sqlite_house):
    people = PEOPLE[:2]
    catalogue = asking(sqlite_house, policies=GLASS, people=people)
    alone = tuple(rule for rule in catalogue.principals if rule.name not in ("ada", "audrey"))
    with pytest.raises(ConfigurationError, match="nobody is left who may review"):
        PolicySet.compile(replace(catalogue, principals=alone))
    one_more = PrincipalRule(name="audrey", kind="person", issuer="dev", subject="dev:audrey", roles=("auditor",))
    PolicySet.compile(replace(catalogue, principals=(*alone, one_more)))


# --- Decided again ---


def test_a_live_one_stays_while_it_is_declared(house):
    case, issued = broken(house)
    apply(house, asking(house, policies=GLASS + '@id("more") permit (principal == Agent::"scribe", action, resource);'))
    assert house.broker.redeciding.run().ended == 0
    assert house.is_active(issued)
    assert case.grant.id


@pytest.mark.parametrize(
    ("policies", "why"),
    [
        ('@id("other") permit (principal == Agent::"scribe", action, resource);', "no policy permits it"),
        # A plain permit is none for a break-glass, and neither is one that asks the same people plainly.
        ('@id("plain") permit (principal, action == Action::"contacts:write", resource);', "no policy permits it"),
        (GLASS.replace('@break_glass("true") ', ""), "no policy permits it"),
        (GLASS.replace('@quorum("2")', '@quorum("3")'), "people have to approve it now"),
        (GLASS + '@id("never") forbid (principal, action, resource) when { context.break_glass };', "forbids it"),
    ],
)
def test_a_new_version_that_does_not_declare_it_ends_it(house, policies, why):
    case, issued = broken(house)
    apply(house, asking(house, policies=policies))
    house.broker.redeciding.run()
    assert not house.is_active(issued)
    found = house.broker.verification.find_grant(house.caller("ada"), case.grant.id)[0]
    assert why in found.reason
    assert loud(house)[-1] == "break_glass.ended"


def test_it_shares_no_decision_with_a_plain_grant_for_the_same_thing(house):
    both = GLASS + '@id("plain") permit (principal, action == Action::"contacts:write", resource);'
    apply(house, asking(house, policies=both))
    task = house.open_task()
    plain = house.issue(task, scope="contacts:write")
    _, glass = broken(house, task)
    apply(house, asking(house, policies=f"// Without the plain one.\n{GLASS}"))
    house.broker.redeciding.run()
    assert (house.is_active(plain), house.is_active(glass)) == (False, True)


# --- Loud ---


def test_every_step_is_an_event_an_alert_and_a_notice_by_every_channel(house):
    alerts, channels = Heard(), {"databases-only": Heard()}
    house.broker.issuance._routes = ()
    alerting = Alerting(database=house.broker.database, alerts=alerts, clock=house.clock)
    notifying = Notifying(
        database=house.broker.database,
        standing=house.broker.standing,
        channels=channels,
        issuer=ISSUER,
        clock=house.clock,
    )
    case, _ = broken(house)
    house.broker.revocation.revoke_grant(house.caller("summarizer"), case.grant.id)
    review_id = review_of(house, case)
    house.clock.forward(days=1)
    house.broker.reviews.note_overdue()
    house.broker.reviews.complete(house.caller("audrey"), review_id, "as it was said")
    steps = ["requested", "voted", "voted", "approved", "collected", "ended"]
    expected = [f"break_glass.{step}" for step in steps] + ["review.overdue", "review.completed"]
    assert loud(house) == expected
    alerting.send_due()
    assert sorted(alert.kind for alert in alerts.heard) == sorted(expected)
    assert all(alert.summary.startswith("BREAK-GLASS") for alert in alerts.heard)
    while notifying.send_due():
        pass
    told = channels["databases-only"].heard
    # That it was asked for is told with the approval; all that follows, whosever the channel is.
    assert sorted(notice.kind for notice in told) == sorted(expected[1:])
    assert all(notice.summary.startswith("BREAK-GLASS") for notice in told)
    assert {notice.link for notice in told if notice.kind.startswith("review")} == {f"{ISSUER}/v1/reviews/{review_id}"}


def test_that_it_is_asked_for_is_told_by_every_channel_with_the_approval_first_of_all(house):
    house.broker.issuance._routes = (Route(channel="databases", groups=frozenset({"databases"})),)
    channels = {"databases": Heard()}
    case = break_glass(house)
    plain = GLASS + '@id("asks") @approval("security") permit (principal == Agent::"scribe", action, resource);'
    apply(house, asking(house, policies=plain))
    ask(house, house.open_task("scribe"), by="scribe")
    Notifying(
        database=house.broker.database,
        standing=house.broker.standing,
        channels=channels,
        issuer=ISSUER,
        clock=house.clock,
    ).send_due()
    [notice] = channels["databases"].heard
    assert notice.id == case.approval.id
    assert notice.summary.startswith("BREAK-GLASS: summarizer asks for contacts:write")
    assert next(iter(notice.words.items())) == ("the emergency", REASON)


def test_a_channel_that_is_down_is_told_later_and_once(house):
    class Down(Heard):
        down = True

        def send(self, message):
            if self.down:
                raise ProviderUnavailable("a notice was not delivered", reason="503")
            super().send(message)

    channels = {"a": Heard(), "b": Down()}
    notifying = Notifying(
        database=house.broker.database,
        standing=house.broker.standing,
        channels=channels,
        issuer=ISSUER,
        clock=house.clock,
    )
    case = break_glass(house)
    approve(house, case, by="sam")
    assert notifying.send_due() == 1
    assert notifying.send_due() == 0
    channels["b"].down = False
    house.clock.forward(seconds=61)
    assert notifying.send_due() == 1
    assert [notice.kind for notice in channels["a"].heard + channels["b"].heard] == ["break_glass.voted"] * 2
    # A channel that is new hears of the last day, and not of all that ever was.
    house.clock.forward(days=2)
    new = {"c": Heard()}
    notifying._channels = new
    assert notifying.send_due() == 0


def test_hostile_words_are_cut_and_escaped_where_people_see_them(house):
    """INV-31."""
    case = break_glass(house, reason=HOSTILE)
    notice = notice_of(case, ISSUER)

    mail = Mail(host="m", port=25, tls="none", sender="a@b.c", recipients=("d@e.f",))
    drawn = [str(form(notice)) for form in (signed_json, slack, teams)]
    drawn.append(mail_of(notice, mail, house.clock()).as_string())
    alerts = Heard()
    Alerting(database=house.broker.database, alerts=alerts, clock=house.clock).send_due()
    [alert] = alerts.heard
    assert "reason" not in alert.data and alert.claimed["reason"]
    drawn.append(body_of(alert).decode())
    for shown in drawn:
        assert "\u202e" not in shown
        assert "x" * 400 not in shown
    assert "<script>" not in body_of(alert).decode().split('"text":')[1].split('"data":')[0]


def test_where_a_step_is_not_recorded_it_is_not_done(house, monkeypatch):
    """INV-32: without the event there is no yes."""
    case = break_glass(house)
    real = approval.record

    def failing(db, found):
        if any(event.type == "break_glass.voted" for event in found):
            raise RuntimeError("the disk is full")
        real(db, found)

    monkeypatch.setattr(approval, "record", failing)
    with pytest.raises(RuntimeError):
        approve(house, case, by="sam")
    monkeypatch.undo()
    assert house.broker.approvals.find(house.caller("ada"), case.approval.id).votes == ()


def test_what_time_ends_is_said_too(house):
    _, issued = broken(house)
    house.clock.forward(seconds=300)
    house.broker.sweeper.sweep()
    [ended] = events(house, "break_glass.ended")
    assert (ended.grant_id, ended.data["state"], ended.data["credential"]) == (
        issued.grant.id,
        "expired",
        "was handed out",
    )


def test_what_is_taken_back_is_said_and_owes_no_review(house):
    case = break_glass(house)
    withdraw(house, case)
    [ended] = events(house, "break_glass.ended")
    assert (ended.actor, ended.data["credential"]) == ("summarizer", "none was handed out")
    assert house.broker.reviews.page(house.caller("ada")) == []


def test_a_plain_grant_is_quiet(house):
    issued = house.issue(house.open_task())
    house.broker.revocation.revoke_grant(house.caller("summarizer"), issued.grant.id)
    assert loud(house) == []


# --- Reviewed ---


def test_a_review_is_owed_from_the_moment_it_is_collected(house):
    case = break_glass(house)
    approve(house, case, by="sam")
    approve(house, case, by="sue")
    assert house.broker.reviews.page(house.caller("ada")) == []
    collect(house, case)
    [found] = house.broker.reviews.page(house.caller("ada"))
    assert (str(found.state), found.grant.id, found.approved_by) == ("owed", case.grant.id, ("sam", "sue"))
    assert found.review.due_at == house.clock() + timedelta(days=1)
    assert house.broker.reviews.measure().live == 1


def test_it_is_overdue_the_second_its_time_is_over_and_that_is_said_once(house):
    case, _ = broken(house)
    review_id = review_of(house, case)
    house.clock.forward(seconds=86_399)
    assert house.broker.reviews.note_overdue() == 0
    assert house.broker.reviews.find(house.caller("ada"), review_id).state == "owed"
    house.clock.forward(seconds=1)
    # Whether or not somebody came by to say so.
    assert house.broker.reviews.find(house.caller("ada"), review_id).state == "overdue"
    for state, count in (("overdue", 1), ("open", 1), ("owed", 0), ("completed", 0)):
        assert len(house.broker.reviews.page(house.caller("ada"), state=state)) == count
    assert (house.broker.reviews.note_overdue(), house.broker.reviews.note_overdue()) == (1, 0)
    assert len(events(house, "review.overdue")) == 1
    measured = house.broker.reviews.measure()
    assert (measured.owed, measured.overdue, measured.live) == (1, 1, 0)
    # Late is late and not never.
    assert house.broker.reviews.complete(house.caller("audrey"), review_id, "late").state == "completed"
    assert house.broker.reviews.measure().owed == 0


@pytest.mark.parametrize("by", ["ada", "audrey", "sid"])
def test_an_admin_an_auditor_or_an_approver_who_had_no_part_in_it_reviews_it(house, by):
    case, _ = broken(house)
    house.clock.forward(seconds=300)
    found = house.broker.reviews.complete(house.caller(by), review_of(house, case), "three leads were moved")
    assert (str(found.state), found.review.completed_by, found.review.note) == (
        "completed",
        by,
        "three leads were moved",
    )
    [event] = events(house, "review.completed")
    assert (event.actor, event.reason, event.grant_id) == (by, "three leads were moved", case.grant.id)


@pytest.mark.parametrize(
    ("by", "kind", "sentence"),
    [
        ("sam", Forbidden, "decided about this"),
        ("sue", Forbidden, "decided about this"),
        ("olga", Forbidden, "one owner"),
        ("dana", NotFound, "that you may see"),
        ("summarizer", NotFound, "that you may see"),
        ("pipeline", NotFound, "that you may see"),
        ("crm-api", NotFound, "that you may see"),
    ],
)
def test_who_asked_or_decided_or_has_no_business_does_not_review_it(house, by, kind, sentence):
    case, _ = broken(house)
    house.clock.forward(seconds=300)
    review_id = review_of(house, case)
    with pytest.raises(kind, match=sentence):
        house.broker.reviews.complete(house.caller(by), review_id, "all good")
    assert house.broker.reviews.find(house.caller("ada"), review_id).state == "owed"
    [refused] = events(house, "review.refused")
    assert refused.actor == by


@pytest.mark.parametrize("name", ["pipeline", "summarizer"])
def test_who_asked_does_not_review_it_whatever_roles_they_have(house, name):
    """INV-15."""
    case, _ = broken(house)
    house.clock.forward(seconds=300)
    catalogue = house.broker.standing.now().catalogue
    rules = tuple(
        replace(rule, roles=(*rule.roles, "auditor"), owner=None) if rule.name == name else rule
        for rule in catalogue.principals
    )
    apply(house, replace(catalogue, principals=rules))
    with pytest.raises(Forbidden, match="asked for this itself"):
        house.broker.reviews.complete(house.caller(name), review_of(house, case), "all good")


def test_a_voter_under_another_name_does_not_review_it(house):
    case, _ = broken(house)
    house.clock.forward(seconds=300)
    catalogue = house.broker.standing.now().catalogue
    renamed = tuple(
        replace(rule, name="samuel", roles=("auditor",)) if rule.name == "sam" else rule
        for rule in catalogue.principals
    )
    apply(house, replace(catalogue, principals=(*renamed, person("sol", "security"))))
    with pytest.raises(Forbidden, match="decided about this"):
        house.broker.reviews.complete(house.caller("sam"), review_of(house, case), "all good")


def test_what_a_voter_owns_does_not_review_it(house):
    """INV-15, whether or not the voter is configured still."""
    case, _ = broken(house)
    house.clock.forward(seconds=300)
    for people in ((*PEOPLE, SAMS_BOT), (*PEOPLE[1:], SAMS_BOT)):
        apply(house, asking(house, policies=GLASS, people=people))
        with pytest.raises(Forbidden, match="sam decided about this, and may be the same person as sams-bot"):
            house.broker.reviews.complete(house.caller("sams-bot"), review_of(house, case), "all good")
    house.broker.reviews.complete(house.caller("sid"), review_of(house, case), "three leads were moved")


def test_it_is_not_reviewed_while_it_may_be_used(house):
    case, _ = broken(house)
    with pytest.raises(Conflict, match="may be in use still"):
        house.broker.reviews.complete(house.caller("ada"), review_of(house, case), "all good")
    house.broker.revocation.revoke_grant(house.caller("ada"), case.grant.id)
    house.broker.reviews.complete(house.caller("ada"), review_of(house, case), "all good")


def test_it_is_reviewed_once(house):
    case, _ = broken(house)
    house.clock.forward(seconds=300)
    review_id = review_of(house, case)
    first = house.broker.reviews.complete(house.caller("ada"), review_id, "as it was said")
    assert house.broker.reviews.complete(house.caller("ada"), review_id, "as it was said") == first
    for by, note in (("ada", "other words"), ("audrey", "as it was said")):
        with pytest.raises(Conflict, match="done once"):
            house.broker.reviews.complete(house.caller(by), review_id, note)
    assert len(events(house, "review.completed")) == 1
    house.clock.forward(days=3)
    assert house.broker.reviews.find(house.caller("ada"), review_id).state == "completed"


def test_a_strangers_review_is_not_to_be_seen(house):
    case, _ = broken(house)
    review_id = review_of(house, case)
    for by in ("dana", "summarizer", "pipeline", "scribe", "gus"):
        with pytest.raises(NotFound):
            house.broker.reviews.find(house.caller(by), review_id)
        assert house.broker.reviews.page(house.caller(by)) == []
    assert len(house.broker.reviews.page(house.caller("sid"))) == 1
    for unknown in ("rev_" + "0" * 26, case.grant.id, "rev_../etc", ""):
        with pytest.raises(NotFound):
            house.broker.reviews.find(house.caller("ada"), unknown)
        with pytest.raises(NotFound):
            house.broker.reviews.complete(house.caller("ada"), unknown, "x")


def test_a_task_that_ends_takes_it_along_and_the_review_stays_owed(house):
    task = house.open_task()
    case, issued = broken(house, task)
    house.broker.tasks.end(house.caller("pipeline"), task.id, TaskState.COMPLETED)
    assert not house.is_active(issued)
    assert house.broker.reviews.find(house.caller("ada"), review_of(house, case)).state == "owed"


def test_the_explanation_tells_of_it_and_marks_whose_words_they_are(house):
    case, _ = broken(house, reason="down\u202e")
    found = house.broker.explaining.explain(house.caller("ada"), case.grant.id)
    assert found.facts["context"]["break_glass"] is True
    assert found.facts["agents_words"]["break_glass"] == "down\\u202e"
    assert found.missing == ()


def test_questions_are_told_apart_in_a_replay(house):
    case, _ = broken(house)
    catalogue = asking(house, policies='@id("plain") permit (principal, action == Action::"contacts:write", resource);')
    catalogue = replace(catalogue, version=99)
    found = house.broker.replaying.replayed(
        catalogue, PolicySet.compile(catalogue), period=timedelta(hours=1), at_most=100
    )
    assert (found.requests, found.newly_denied) == (1, 1)
    assert found.samples[0].grant_id == case.grant.id
