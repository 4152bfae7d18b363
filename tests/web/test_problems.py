"""Every refusal the broker can make has a page, a title and a remedy: none of them becomes a 500 on its way out."""

import sqlalchemy as sa

from broker.domain import errors
from broker.store import gate
from broker.web.problems import REMEDIES, TITLES, status_of


def kinds_of(kind):
    return [kind, *(below for narrower in kind.__subclasses__() for below in kinds_of(narrower))]


def codes_of(kind):
    return {kind.code}.union(*map(codes_of, kind.__subclasses__()))


def test_every_code_of_the_tree_has_a_title_and_a_remedy():
    wanted = codes_of(errors.BrokerError) - {errors.BrokerError.code}
    assert wanted <= set(TITLES)
    assert set(TITLES) == set(REMEDIES)


def test_no_refusal_of_the_tree_is_an_internal_error():
    for kind in kinds_of(errors.BrokerError)[1:]:
        assert status_of(kind.__new__(kind)) in {400, 401, 403, 404, 409, 429, 503}, kind


def test_a_key_that_cannot_be_opened_is_unavailable_and_no_defect(web):
    with web.house.broker.database.begin() as db:
        db.execute(sa.text("UPDATE signing_keys SET sealed_private_key = x'00', kid = 'broken-' || kid"))
        gate.turn(db)
    answer = web.get("/readyz")
    assert (answer.status_code, answer.json["code"]) == (503, "configuration")
    assert "Retry-After" in answer.headers
    assert web.form("/oauth2/token", grant_type="client_credentials", **web.assertion("scribe")).status_code == 503
