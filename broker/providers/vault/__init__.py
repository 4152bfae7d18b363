"""OpenBao and HashiCorp Vault: dynamic secrets under a token made for one grant, whose accessor can undo them.

What was measured on OpenBao 2.7 and shaped this room: `revoke-accessor` only queues the leases; a `sync` revocation may
answer 204 while the queue still works on the same lease; revoking what does not exist is 204 as well. So only a look-up
tells death. A token's leases die with it, whatever their own life, and so the child token bounds every one of them.
"""

from broker.providers.vault.provider import VaultProvider
from broker.providers.vault.settings import VaultAuth, VaultSettings
from broker.providers.vault.sources import SecretSource

__all__ = ["SecretSource", "VaultAuth", "VaultProvider", "VaultSettings"]
