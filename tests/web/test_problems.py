"""Every refusal the broker can make has a page, a title and a remedy: none of them becomes a 500 on its way out."""

import sqlalchemy as sa

from broker.domain import errors
from broker.store import gate
from broker.web.problems import REMEDIES, TITLES


def codes_of(kind):
    return {kind.code}.union(*map(codes_of, kind.__subclasses__()))


def test_every_code_of_the_tree_has_a_title_and_a_remedy():
    wanted = codes_of(errors.BrokerError) - {errors.BrokerError.code}
    assert wanted <= set(TITLES)
    assert set(TITLES) == set(REMEDIES)


def test_a_key_that_cannot_be_opened_is_unavailable_and_no_defect(web):
    with web.house.broker.database.begin() as db:
        db.execute(sa.text("UPDATE signing_keys SET sealed_private_key = x'00', kid = 'broken-' || kid"))
        gate.turn(db)
    answer = web.get("/readyz")
    assert (answer.status_code, answer.json["code"]) == (503, "configuration")
    assert "Retry-After" in answer.headers
    assert web.form("/oauth2/token", grant_type="client_credentials", **web.assertion("scribe")).status_code == 503
