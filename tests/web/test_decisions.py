"""`/v1/grants/{id}/decision`, as its caller sees it."""

import pytest

from tests.house import CRM


def test_a_denied_grant_is_explained_over_the_wire(web_on_both):
    web = web_on_both
    denied = web.grant(web.open_task(), ttl_s=900).json
    answer = web.get(f"/v1/grants/{denied['grant_id']}/decision", "summarizer")
    assert answer.status_code == 200
    found = answer.json
    assert found["outcome"] == denied["decision"]["outcome"] == "deny"
    assert found["would_be_allowed"] == ["it would be allowed with ttl_s = 600: ask for at most that"]
    assert set(found["ceilings_s"]) == {"resource", "broker", "task", "proof"}
    assert found["facts"]["agent"]["name"] == "summarizer"
    assert found["facts"]["resource"]["identifier"] == CRM
    assert found["missing"] == []


@pytest.mark.parametrize("grant_id", ["grt_" + "0" * 26, "nonsense", "grt_' OR 1=1 --"])
def test_a_grant_that_is_not_there_has_no_decision(web, grant_id):
    assert web.get(f"/v1/grants/{grant_id}/decision", "ada").status_code == 404


def test_somebody_else_s_grant_has_none_either(web):
    """INV-28."""
    issued = web.grant(web.open_task()).json["grant"]
    assert web.get(f"/v1/grants/{issued['id']}/decision", "other-pipeline").status_code == 404
    assert web.get(f"/v1/grants/{issued['id']}/decision").status_code == 401


def test_a_query_is_refused_by_name(web):
    issued = web.grant(web.open_task()).json["grant"]
    answer = web.get(f"/v1/grants/{issued['id']}/decision?verbose=1", "summarizer")
    assert (answer.status_code, answer.json["member"]) == (400, "verbose")
