"""The jobs: what one of them could not do is said, with what keeps it from being done."""

from broker import scheduler
from broker.domain.errors import ProviderUnavailable


def test_a_job_that_was_refused_says_what_the_outside_said(caplog):
    def look():
        raise ProviderUnavailable("Vault did not say whether it could list them", reason="database/creds/jit: 403")

    scheduler._reported("reconcile", look)()
    (record,) = caplog.records
    assert (record.fields["job"], record.fields["reason"]) == ("reconcile", "database/creds/jit: 403")
