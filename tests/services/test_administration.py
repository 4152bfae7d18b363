from broker.domain.catalogue import Catalogue, PrincipalRule, Resource
from broker.domain.policy import PolicySet
from broker.services.administration import WhatIf, evaluate
from tests.conftest import NOW
from tests.house import CRM, POLICIES


def test_a_request_nobody_made_is_told_what_would_be_allowed():
    catalogue = Catalogue(
        version=1,
        principals=tuple(
            PrincipalRule(name=name, kind="agent", issuer="https://issuer.example", subject=name)
            for name in ("summarizer", "scribe")
        ),
        resources=(Resource(identifier=CRM, scopes=("contacts:read", "contacts:write")),),
        policies=POLICIES,
    )
    asked = WhatIf(
        agent="summarizer",
        resource=CRM,
        scopes=frozenset({"contacts:read"}),
        ttl_s=3600,
        purpose="evaluation",
        labels={},
        intent=None,
        sender_bound=False,
        claimed={},
    )
    decision = evaluate(catalogue, PolicySet.compile(catalogue), asked, now=NOW)
    assert decision.reasons == (
        f"policy 'crm-read' allows contacts:read on {CRM} only when {{ context.ttl_s <= 600 }}",
        "it would be allowed with ttl_s = 600: ask for at most that",
    )
