"""A draft of policies: other texts for the configuration that is in force, checked as that one was on load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from broker.domain.catalogue import Catalogue
from broker.domain.errors import ConfigurationError, Invalid
from broker.domain.policy import PolicySet


@dataclass(frozen=True, kw_only=True)
class Draft:
    """`policies` maps file names to Cedar text. Without a `schema` the one in force stays."""

    policies: Mapping[str, str]
    schema: str | None = None


def drafted(catalogue: Catalogue, draft: Draft) -> tuple[Catalogue, PolicySet]:
    """The configuration in force with the policies of a draft; Invalid says all that is wrong with them."""
    schema = catalogue.schema if draft.schema is None else draft.schema
    found = replace(catalogue, policies=dict(draft.policies), schema=schema)
    try:
        return found, fit(found)
    except ConfigurationError as problem:
        # Its author is the caller here, and not the operator.
        raise Invalid(f"policies: {problem.detail}", member="policies") from None


def fit(catalogue: Catalogue) -> PolicySet:
    """The policies of a configuration that may come into force; ConfigurationError with every problem otherwise."""
    policies = PolicySet.compile(catalogue)
    # A configuration without policies is one that is being set up; files without any were emptied by mistake.
    problems = policies.unfit() if catalogue.policies else []
    if problems:
        raise ConfigurationError(problems)
    return policies
