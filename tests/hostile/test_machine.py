"""The state machines against a model in plain Python: whatever is done in whatever order, both say what is live.

INV-23: what was once refused for good is never accepted again, by no lift, renewal, sweep or passing of time.
"""

import shutil
import tempfile
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule
from hypothesis.stateful import run_state_machine_as_test as run

from tests.house import CRM, build_house
from tests.web.conftest import Web

AGENTS = ("summarizer", "scribe")
DEFAULT_S, RESOURCE_S, MAX_S = 300, 900, 3600


@dataclass
class ModelTask:
    id: str
    agents: tuple[str, ...]
    deadline_at: datetime
    heartbeat_s: int | None
    heartbeat_due_at: datetime | None
    state: str = "active"

    def is_open(self, now):
        due = min(filter(None, (self.deadline_at, self.heartbeat_due_at)))
        return self.state == "active" and now < due


@dataclass
class ModelGrant:
    id: str
    task: ModelTask
    agent: str
    expires_at: datetime
    renewable_until: datetime
    revoked: bool = False
    tokens: list = field(default_factory=list)  # (token, when it expires)


class Model(RuleBasedStateMachine):
    migrated = None
    tokens_made = 0
    tasks, grants, lockdowns = Bundle("tasks"), Bundle("grants"), Bundle("lockdowns")

    def __init__(self):
        super().__init__()
        self.directory = tempfile.TemporaryDirectory(prefix="broker-tests-")
        path = Path(self.directory.name)
        shutil.copyfile(self.migrated, path / "broker.db")
        self.house = build_house(f"sqlite:///{path / 'broker.db'}", path)
        self.web = Web(self.house)
        self.all_tasks, self.all_grants, self.standing, self.dead = [], [], {}, set()
        # Something to act upon, so that the few steps of a run are not spent on coming so far.
        self.open_task(AGENTS, 3600, None)
        self.open_task(AGENTS, 600, 120)

    def teardown(self):
        self.house.broker.close()
        self.directory.cleanup()

    @property
    def now(self):
        return self.house.clock()

    def covered(self, grant, axis, value):
        of = {"task": grant.task.id, "agent": grant.agent, "resource": CRM, "all": "all"}
        return of[axis] == value

    def is_live(self, grant):
        return not grant.revoked and grant.task.is_open(self.now) and self.now < grant.expires_at

    def locked(self, task, agent):
        grant = ModelGrant("", task, agent, self.now, self.now)
        return any(self.covered(grant, *lockdown) for lockdown in self.standing.values())

    def end(self, task, state):
        task.state = state
        for grant in self.all_grants:
            if grant.task is task and self.now < grant.expires_at:
                grant.revoked = True

    # --- what callers do -----------------------------------------------------------------------------------------

    @initialize(target=tasks)
    def tasks_at_the_beginning(self):
        return multiple(*self.all_tasks)

    @initialize(target=grants)
    def grants_at_the_beginning(self):
        asked = [
            (task, agent, ttl_s) for task in self.all_tasks for agent, ttl_s in zip(AGENTS, (None, 600), strict=True)
        ]
        return multiple(*(self.issue(*each) for each in asked))

    @rule(
        target=tasks,
        agents=st.sampled_from([AGENTS[:1], AGENTS[1:], AGENTS]),
        deadline_s=st.sampled_from([1, 60, 600, 3600, 86_400]),
        heartbeat_s=st.sampled_from([None, None, 30, 120]),
    )
    def open_task(self, agents, deadline_s, heartbeat_s):
        made = self.web.open_task(*agents, deadline_s=deadline_s, heartbeat_s=heartbeat_s)
        due = None if heartbeat_s is None else self.now + timedelta(seconds=heartbeat_s)
        task = ModelTask(made["id"], agents, self.now + timedelta(seconds=deadline_s), heartbeat_s, due)
        self.all_tasks.append(task)
        return task

    @rule(target=grants, task=tasks, agent=st.sampled_from(AGENTS), ttl_s=st.sampled_from([None, 1, 60, 600]))
    def issue(self, task, agent, ttl_s):
        more = {} if ttl_s is None else {"ttl_s": ttl_s}
        answer = self.web.grant({"id": task.id}, by=agent, **more)
        if agent not in task.agents:
            assert answer.json["code"] == "not_found"
        elif not task.is_open(self.now):
            assert answer.json["code"] == "task_not_active"
        elif self.locked(task, agent):
            assert answer.json["code"] == "locked_down"
        else:
            assert answer.status_code == 201, answer.json
            made = answer.json["grant"]
            renewable_until = min(self.now + timedelta(seconds=MAX_S), task.deadline_at)
            grant = ModelGrant(made["id"], task, agent, self.ends(task, ttl_s), renewable_until)
            self.issued(grant, answer.json)
            self.all_grants.append(grant)
            return grant
        return multiple()

    def ends(self, task, ttl_s, renewable_until=None):
        ceilings = [self.now + timedelta(seconds=ttl_s or DEFAULT_S), self.now + timedelta(seconds=RESOURCE_S)]
        return min(filter(None, [*ceilings, task.deadline_at, renewable_until]))

    def issued(self, grant, answer):
        """INV-08: the least of all ceilings, to the second."""
        expires_at = datetime.fromisoformat(answer["credential"]["expires_at"])
        assert answer["grant"]["expires_at"] == f"{grant.expires_at:%Y-%m-%dT%H:%M:%SZ}"
        grant.tokens.append((answer["credential"]["token"], expires_at))
        Model.tokens_made += 1

    @rule(grant=grants, ttl_s=st.sampled_from([None, 1, 600]))
    def renew(self, grant, ttl_s):
        body = {} if ttl_s is None else {"ttl_s": ttl_s}
        answer = self.web.post(f"/v1/grants/{grant.id}/renew", grant.agent, json=body)
        if not self.is_live(grant):
            assert answer.status_code in (403, 409), answer.json
            return
        if self.now >= grant.renewable_until:
            assert answer.status_code == 409
            return
        assert answer.status_code == 200, answer.json
        assert answer.json["grant"]["id"] == grant.id
        ends = self.ends(grant.task, ttl_s, grant.renewable_until)
        grant.expires_at = max(grant.expires_at, ends)
        self.issued(grant, answer.json)
        assert grant.tokens[-1][1] == ends

    @rule(grant=grants, by=st.sampled_from(["holder", "pipeline", "ada", "other-pipeline", "audrey"]))
    def revoke(self, grant, by):
        answer = self.web.post(f"/v1/grants/{grant.id}/revoke", grant.agent if by == "holder" else by, json={})
        if by in ("other-pipeline", "audrey"):
            assert answer.status_code == (404 if by == "other-pipeline" else 403)
            return
        assert answer.status_code == 200
        grant.revoked |= self.now < grant.expires_at

    @rule(task=tasks, verb=st.sampled_from(["heartbeat", "heartbeat", "complete", "fail", "cancel"]))
    def act_on_task(self, task, verb):
        if verb == "heartbeat":
            self.beat(task)
        else:
            self.end_task(task, verb, "pipeline")

    @rule(task=tasks, by=st.sampled_from(["ada", "scribe", "other-pipeline"]))
    def act_on_a_task_of_others(self, task, by):
        self.end_task(task, "cancel", by)

    def end_task(self, task, verb, by):
        answer = self.web.post(f"/v1/tasks/{task.id}/{verb}", by, json={})
        if by in ("scribe", "other-pipeline"):
            assert answer.status_code in (403, 404)
            return
        assert answer.status_code == 200
        if task.state == "active":
            states = {"complete": "completed", "fail": "failed", "cancel": "cancelled"}
            self.end(task, states[verb] if task.is_open(self.now) else "expired")
        assert answer.json["outcome"] == task.state
        assert {line["grant_id"] for line in answer.json["grants"]} == {
            grant.id for grant in self.all_grants if grant.task is task
        }

    def beat(self, task):
        answer = self.web.post(f"/v1/tasks/{task.id}/heartbeat", "pipeline")
        assert answer.status_code == (200 if task.is_open(self.now) else 409)
        if answer.status_code == 200 and task.heartbeat_s is not None:
            task.heartbeat_due_at = self.now + timedelta(seconds=task.heartbeat_s)

    @rule(target=lockdowns, data=st.data(), lockdown=st.booleans())
    def revoke_along(self, data, lockdown):
        axes = [("agent", AGENTS[0]), ("agent", AGENTS[1]), ("resource", CRM), ("agent", "nobody"), ("all", "all")]
        axis, value = data.draw(st.sampled_from(axes + [("task", task.id) for task in self.all_tasks]))
        hit = [grant for grant in self.all_grants if self.covered(grant, axis, value) and self.now < grant.expires_at]
        order = {axis: value, "reason": "drill", "lockdown": lockdown}
        dry = self.web.post("/v1/revocations", "ada", json=order | {"dry_run": True})
        answer = self.web.post("/v1/revocations", "ada", json=order)
        assert answer.status_code == 200, answer.json
        assert dry.json["grants"] == answer.json["grants"] == sum(not grant.revoked for grant in hit)
        for grant in hit:
            grant.revoked = True
        if not lockdown:
            return multiple()
        self.standing[answer.json["lockdown"]["id"]] = (axis, value)
        return answer.json["lockdown"]["id"]

    @rule(lockdown=consumes(lockdowns))
    def lift(self, lockdown):
        answer = self.web.client.delete(f"/v1/lockdowns/{lockdown}", headers=self.web.as_("ada"))
        assert answer.status_code == 200
        del self.standing[lockdown]

    # --- what time does ------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0, 1, 29, 31, 60, 119, 120, 299, 300, 301, 600]), and_sweep=st.booleans())
    def wait(self, seconds, and_sweep):
        """A late sweep costs tidiness and never safety, so whether there is one must change no answer."""
        self.house.clock.forward(seconds=seconds)
        if not and_sweep:
            return
        self.house.broker.sweeper.sweep()
        for task in self.all_tasks:
            if task.state == "active" and not task.is_open(self.now):
                self.end(task, "expired")

    # --- what must be so after each step -------------------------------------------------------------------------

    @invariant()
    def both_say_what_is_live(self):
        listed = {shown["id"]: shown for shown in self.web.get("/v1/grants?limit=1000", "ada").json["items"]}
        assert listed.keys() == {grant.id for grant in self.all_grants}
        for grant in self.all_grants:
            shown = listed[grant.id]
            live = self.is_live(grant)
            assert shown["live"] is live, (shown, grant)
            # Rows follow later, and never say more than is so.
            assert shown["state"] == "active" or not live
            for token, expires_at in grant.tokens:
                active = self.web.introspect(token)["active"]
                assert active is (live and self.now < expires_at), (shown, grant)
                assert not (active and token in self.dead), "a token that was refused is accepted again"
                if not active:
                    self.dead.add(token)

    @invariant()
    def tasks_are_what_the_model_says(self):
        listed = {shown["id"]: shown["state"] for shown in self.web.get("/v1/tasks?limit=1000", "ada").json["items"]}
        assert listed == {task.id: task.state for task in self.all_tasks}


@pytest.fixture
def machine(migrated_file, monkeypatch):
    monkeypatch.setattr(Model, "migrated", migrated_file)
    monkeypatch.setattr(Model, "tokens_made", 0)
    return Model


def test_whatever_is_done_in_whatever_order_is_live_or_not_as_the_model_says(machine):
    run(
        machine,
        settings=settings(
            derandomize=True, database=None, deadline=None, max_examples=16, stateful_step_count=20,
            suppress_health_check=list(HealthCheck), phases=[Phase.generate],
        ),
    )  # fmt: skip
    assert machine.tokens_made > 60, "few runs came so far that anything could be wrong"
