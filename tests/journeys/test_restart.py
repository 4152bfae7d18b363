"""A broker that is stopped and started on the same database remembers what it must not forget."""

import http.client
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import sqlalchemy as sa

from broker.domain.clock import system_clock
from tests.house import CRM
from tests.processes import until
from tests.workloads import dpop_proof, issuer_key


@contextmanager
def nobody_may_write(store_url):
    """Whoever would commit waits until the block ends."""
    engine = sa.create_engine(store_url)
    if engine.dialect.name == "sqlite":
        with engine.connect() as db:
            db.connection.driver_connection.execute("BEGIN IMMEDIATE").close()
            yield
            db.connection.driver_connection.execute("ROLLBACK").close()
    else:
        with engine.begin() as db:
            db.execute(sa.text("LOCK TABLE events IN SHARE MODE"))
            yield
    engine.dispose()


def test_revocations_proofs_keys_and_lockdowns_survive_a_restart(deployment):
    """INV-20, INV-23: a restart forgets nothing that was ended or used up."""
    with deployment.broker() as broker:
        task_id, ended_task_id = broker.open_task("summarizer", "scribe"), broker.open_task()
        held, revoked = broker.grant(task_id), broker.grant(task_id)
        ended = broker.grant(ended_task_id)
        assert broker.post(f"/v1/grants/{revoked.id}/revoke", "summarizer").status_code == 200
        receipt = broker.complete(ended_task_id)
        once = {"Idempotency-Key": "once"}
        first = broker.ask(task_id, **once).json()
        proof = dpop_proof(issuer_key(), url=f"{deployment.issuer}/v1/grants", now=system_clock())
        assert broker.ask(task_id, DPoP=proof).status_code == 201
        single = {"Authorization": f"Bearer {deployment.single_use_token()}"}
        assert broker.client.get("/v1/tasks", headers=single).status_code == 200
        assert broker.post("/v1/lockdowns", "ada", {"agent": "scribe", "reason": "drill"}).status_code == 201
        before = broker.get("/oauth2/jwks").json()

        assert broker.stop() == 0
        broker.start()
        broker.until_ready()

        assert broker.is_active(held.token)
        assert not broker.is_active(revoked.token)
        assert not broker.is_active(ended.token)
        assert broker.status_of(revoked.token) == broker.status_of(ended.token) == 1
        assert broker.complete(ended_task_id)["ended_at"] == receipt["ended_at"]
        assert broker.ask(ended_task_id).json()["code"] == "task_not_active"
        assert broker.ask(task_id, **once).json()["grant"]["id"] == first["grant"]["id"]
        assert broker.ask(task_id, DPoP=proof).json()["code"] == "invalid_dpop_proof"
        assert broker.client.get("/v1/tasks", headers=single).status_code == 401
        assert broker.ask(task_id, "scribe").json()["code"] == "locked_down"
        assert broker.get("/oauth2/jwks").json() == before
        # What the stopped one had reserved of a status list is not handed out again.
        assert broker.status_of(broker.grant(task_id).token) == 0


def test_told_to_stop_it_answers_what_it_accepted_and_then_ends_with_zero(deployment):
    """Twenty requests are inside when it is told; each gets its answer, and none of them is half done."""
    with deployment.broker() as broker:
        body = json.dumps({"task_id": broker.open_task(), "resource": CRM, "scopes": ["contacts:read"]})
        headers = broker.as_("summarizer", **{"Content-Type": "application/json"})
        connections = [http.client.HTTPConnection("127.0.0.1", broker.port, timeout=30) for _ in range(20)]
        with nobody_may_write(deployment.store_url):
            for connection in connections:
                connection.request("GET", "/healthz")
                connection.getresponse().read()
                connection.request("POST", "/v1/grants", body=body, headers=headers)
            until(lambda: unread(broker) == 0, what="a broker that has read all of them")
            broker.ask_to_stop()
            with httpx.Client(base_url=broker.url) as late:
                until(lambda: not accepts(late), what="a broker that takes no more")
        answers = [connection.getresponse() for connection in connections]
        assert {answer.status for answer in answers} == {201}
        tokens = [json.load(answer)["credential"]["token"] for answer in answers]
        for connection in connections:
            connection.close()
        assert broker.wait() == 0
        broker.start()
        broker.until_ready()
        assert all(broker.is_active(token) for token in tokens)


def unread(broker):
    """Bytes that clients sent and the broker did not take yet, by the kernel's table."""
    address = f":{broker.port:04X}"
    with open("/proc/net/tcp") as table:
        rows = [line.split() for line in table.readlines()[1:]]
    return sum(int(queue.split(":")[1], 16) for _, local, _, _, queue, *_ in rows if local.endswith(address))


def accepts(client):
    try:
        return client.get("/healthz", headers={"Connection": "close"}).status_code == 200
    except httpx.TransportError:
        return False


class TestWhatItTellsThoseWhoRunIt:
    def test_metrics_are_on_a_port_of_their_own(self, brokers):
        broker, _ = brokers
        broker.grant(broker.open_task())
        metrics = httpx.get(f"http://127.0.0.1:{broker.metrics_port}/metrics").text
        assert 'broker_http_requests_total{method="POST",route="/v1/grants",status="201"}' in metrics
        assert "broker_last_sweep_timestamp_seconds" in metrics
        assert broker.client.get("/metrics").status_code == 401

    def test_each_request_is_one_line_of_json_with_its_trace_id_and_nothing_secret(self, brokers):
        """INV-30: no workload token, no credential, no proof."""
        broker, _ = brokers
        trace_id = f"{threading.get_ident() % 10**12:032d}"
        proof = dpop_proof(issuer_key(), url=f"{broker.deployment.issuer}/v1/grants", now=system_clock())
        workload_token = broker.deployment.token("summarizer")
        headers = {
            "Authorization": f"Bearer {workload_token}",
            "DPoP": proof,
            "traceparent": f"00-{trace_id}-00f067aa0ba902b7-01",
        }
        body = {"task_id": broker.open_task(), "resource": "https://crm.example/api", "scopes": ["contacts:read"]}
        answer = broker.client.post("/v1/grants", headers=headers, json=body)
        credential = answer.json()["credential"]["token"]
        broker.introspect(credential)
        broker.client.post("/v1/grants", headers={**headers, "Authorization": f"Bearer {workload_token}x"}, json=body)
        lines = until(
            lambda: [line for line in broker.log_lines() if line.get("trace_id") == trace_id], what="its log line"
        )
        assert {"event": "request", "route": "/v1/grants", "status": 201, "caller": "summarizer"}.items() <= lines[
            0
        ].items()
        text = broker.log.read_text()
        for secret in (workload_token, credential, proof):
            for part in secret.split("."):
                assert part not in text or len(part) < 60

    def test_the_same_trace_id_is_on_the_grant_the_event_and_the_token(self, solo):
        trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
        task_id = solo.open_task()
        answer = solo.ask(task_id, traceparent=f"00-{trace_id}-00f067aa0ba902b7-01").json()
        events = solo.get(f"/v1/audit?grant={answer['grant']['id']}", "audrey").json()["items"]
        assert [event["trace_id"] for event in events] == [trace_id]
        assert solo.introspect(answer["credential"]["token"]).json()["txn"] == trace_id


def is_listening(port):
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def test_several_workers_share_one_address_and_what_they_know(postgres_deployment):
    with postgres_deployment.broker(server__workers="2") as broker:
        # One that is there answers for both while the other one starts.
        until(lambda: all(is_listening(broker.metrics_port + worker) for worker in range(2)))
        task_id = broker.open_task()
        with ThreadPoolExecutor(16) as pool:
            grants = list(pool.map(lambda _: broker.grant(task_id), range(64)))
        assert len({grant.id for grant in grants}) == 64
        broker.complete(task_id)
        with ThreadPoolExecutor(16) as pool:
            assert not any(pool.map(lambda grant: broker.is_active(grant.token), grants))
        # Each worker counts for itself, on a port of its own; together they answered everything.
        count = 'broker_http_requests_total{method="POST",route="/v1/grants",status="201"}'
        pages = [httpx.get(f"http://127.0.0.1:{broker.metrics_port + worker}/metrics").text for worker in range(2)]
        counted = [float(line.split()[-1]) for page in pages for line in page.splitlines() if line.startswith(count)]
        assert sum(counted) == 64
        failed = [line for line in broker.log_lines() if line["level"] == "error"]
        assert failed == []
        assert broker.stop() == 0
