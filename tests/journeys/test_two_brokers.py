"""Two brokers on one PostgreSQL database: what one is told, the other knows at its next request."""

import jwt
import pytest

from tests.house import POLICIES
from tests.processes import until


@pytest.fixture
def here_and_there(pair):
    """Both have issued, so both remember what stood before."""
    here, there = pair
    task_id = here.open_task("summarizer", "scribe")
    return here, there, task_id, there.grant(task_id)


def kids(broker):
    return [key["kid"] for key in broker.get("/oauth2/jwks").json()["keys"]]


def current_kid(broker, task_id):
    return jwt.get_unverified_header(broker.grant(task_id).token)["kid"]


def test_a_task_ended_at_one_is_ended_at_the_other(here_and_there):
    here, there, task_id, grant = here_and_there
    here.complete(task_id)
    assert not there.is_active(grant.token)
    assert there.ask(task_id).json()["code"] == "task_not_active"
    assert there.post(f"/v1/grants/{grant.id}/renew", "summarizer").json()["code"] == "task_not_active"
    assert there.status_of(grant.token) == 1


def test_a_grant_handed_back_at_one_is_refused_at_the_other(here_and_there):
    here, there, _, grant = here_and_there
    assert here.post(f"/v1/grants/{grant.id}/revoke", "summarizer").status_code == 200
    assert not there.is_active(grant.token)


def test_a_revocation_along_an_axis_at_one_holds_at_the_other(here_and_there):
    here, there, task_id, grant = here_and_there
    answer = here.post("/v1/revocations", "ada", {"task": task_id, "reason": "drill"}).json()
    assert answer["grants"] == 1
    assert not there.is_active(grant.token)
    assert there.status_of(grant.token) == 1
    assert there.is_active(there.grant(task_id).token)


def test_a_lockdown_at_one_stands_at_the_other_until_it_is_lifted_at_either(here_and_there):
    here, there, task_id, _ = here_and_there
    held = there.grant(task_id, "scribe")
    lockdown = here.post("/v1/lockdowns", "ada", {"agent": "scribe", "reason": "under investigation"}).json()
    assert there.ask(task_id, "scribe").json()["code"] == "locked_down"
    assert not there.is_active(held.token)
    lifted = there.client.delete(f"/v1/lockdowns/{lockdown['id']}", headers=there.as_("ada"))
    assert lifted.status_code == 200
    assert here.ask(task_id, "scribe").status_code == 201
    assert not here.is_active(held.token)


def test_keys_rotated_by_command_sign_at_both_and_the_old_ones_are_still_believed(here_and_there):
    here, there, task_id, grant = here_and_there
    before = current_kid(there, task_id)
    assert here.deployment.run("keys", "rotate").returncode == 0
    after = current_kid(there, task_id)
    assert after != before
    assert {before, after} <= set(kids(here)) == set(kids(there))
    assert there.is_active(grant.token)


def test_a_key_condemned_by_command_is_believed_by_neither_and_takes_its_tokens_with_it(here_and_there):
    here, there, task_id, grant = here_and_there
    kid = current_kid(there, task_id)
    assert there.is_active(grant.token)
    condemned = here.deployment.run("keys", "compromise", kid, "--reason", "found in a log", "--yes")
    assert condemned.returncode == 0, condemned.stderr
    for broker in (here, there):
        assert kid not in kids(broker)
        assert not broker.is_active(grant.token)
        assert current_kid(broker, task_id) != kid


NOTHING = {"none.cedar": '@id("none") forbid (principal, action, resource);'}


def apply(broker, **changed):
    """By command, so that neither broker was told."""
    broker.deployment.configure(**changed)
    applied = broker.deployment.run("apply", "--allow-older")
    assert applied.returncode == 0, applied.stderr


class TestConfiguration:
    @pytest.fixture(autouse=True)
    def put_back(self, pair):
        yield
        apply(pair[0])
        # Whoever was put back is nobody to a broker that has not looked since, and asking for its readiness is a look.
        assert [broker.get("/readyz").status_code for broker in pair] == [200, 200]

    def test_a_policy_decides_at_the_next_request(self, here_and_there):
        here, there, task_id, _ = here_and_there
        stop = {"stop.cedar": '@id("stop") forbid (principal, action, resource);'}
        apply(here, policies=POLICIES | stop)
        for broker in (here, there):
            refused = broker.ask(task_id)
            assert refused.status_code == 403
            assert refused.json()["decision"]["policies"] == ["stop"]

    def test_a_principal_that_was_taken_out_is_nobody_at_the_next_request(self, here_and_there):
        """Not for asking, and not for what an admin may do: withdrawn authority waits for no timer."""
        here, there, task_id, grant = here_and_there
        lockdown = there.post("/v1/lockdowns", "grace", {"agent": "scribe", "reason": "drill"}).json()
        apply(here, without=("grace", "scribe", "audrey"), policies=NOTHING)
        assert there.client.delete(f"/v1/lockdowns/{lockdown['id']}", headers=there.as_("grace")).status_code == 401
        assert there.get("/v1/audit", "audrey").status_code == 401
        assert there.ask(task_id, "scribe").status_code == 401
        assert there.post(f"/v1/grants/{grant.id}/renew", "scribe").status_code == 401
        assert there.post(f"/v1/grants/{grant.id}/revoke", "scribe").status_code == 401
        revoked = there.client.post("/oauth2/revoke", data={"token": grant.token}, headers=there.as_("scribe"))
        assert revoked.status_code == 401
        assert there.client.delete(f"/v1/lockdowns/{lockdown['id']}", headers=there.as_("ada")).status_code == 200

    def test_an_orchestrator_that_was_taken_out_opens_and_ends_nothing(self, here_and_there):
        here, there, task_id, grant = here_and_there
        apply(here, without=("pipeline",))
        assert there.post(f"/v1/tasks/{task_id}/complete", "pipeline").status_code == 401
        assert there.is_active(grant.token)

    def test_a_verifier_that_was_taken_out_learns_nothing(self, here_and_there):
        here, there, _, grant = here_and_there
        configuration = here.deployment.configuration
        here.deployment.configure()
        configuration.write_text(configuration.read_text().replace('verifiers = ["crm-api"]', "verifiers = []"))
        applied = here.deployment.run("apply")
        assert applied.returncode == 0, applied.stderr
        assert there.introspect(grant.token).json() == {"active": False}

    def test_a_broker_that_starts_with_an_older_file_does_not_undo_a_newer_one(self, pair):
        here, _ = pair
        stop = {"stop.cedar": '@id("stop") forbid (principal, action, resource);'}
        apply(here, policies=POLICIES | stop)
        here.deployment.configure()
        refused = here.deployment.run("serve")
        assert refused.returncode == 1
        assert "--allow-older" in refused.stderr


def test_a_scheduler_sweeps_for_brokers_that_do_not(postgres_deployment):
    """`serve --no-scheduler` answers rightly without any sweep; `broker scheduler` tidies up behind it."""
    with postgres_deployment.broker("--no-scheduler") as broker:
        task_id = broker.open_task(deadline_s=5)
        grant = broker.grant(task_id)
        until(lambda: not broker.is_active(grant.token), what="the end of the task")

        def state():
            return broker.get(f"/v1/tasks/{task_id}", "pipeline").json()["state"]

        assert state() == "active"
        with postgres_deployment.scheduler() as scheduler:
            until(lambda: state() == "expired", what="a sweep")
            assert broker.get(f"/v1/grants/{grant.id}", "ada").json()["state"] == "expired"
            scheduler.terminate()
            assert scheduler.wait(10) == 0
