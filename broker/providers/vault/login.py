"""The broker's own token at Vault: obtained, renewed in time, obtained anew when Vault forgot it.

It is asked for at each call and renewed by whoever asks after two thirds of its life; the reconciler asks every minute,
so that a broker nobody uses keeps its token too.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from hvac.api.auth_methods import JWT, AppRole, Kubernetes

from broker.domain.clock import Clock
from broker.domain.errors import BrokerError, ProviderRefused, ProviderUnavailable
from broker.domain.secret import Secret
from broker.providers.vault.connection import Answer, Connection
from broker.providers.vault.settings import VaultAuth

_log = logging.getLogger(__name__)

PAUSE = timedelta(seconds=2)  # after a login or a renewal that failed
LOOK_AGAIN = timedelta(seconds=60)  # at a token that has no end
MAX_FILE = 64 * 1024

_PRINTABLE = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True, kw_only=True)
class _Held:
    token: Secret = field(repr=False)
    obtained_at: datetime
    expires_at: datetime | None  # None: it has no end
    renew_at: datetime
    life: timedelta  # as it was when it was obtained
    renewable: bool
    file_state: tuple[int, ...] | None

    def usable(self, now: datetime) -> bool:
        return self.expires_at is None or now < self.expires_at


class Login:
    """Who the broker is at Vault. `forgotten` is told when Vault does not know a token of ours that should be good."""

    def __init__(
        self,
        connection: Connection,
        auth: VaultAuth,
        clock: Clock,
        *,
        forgotten: Callable[[], object] = lambda: None,
    ) -> None:
        self._connection = connection
        self._auth = auth
        self._clock = clock
        self._forgotten = forgotten
        self._guard = threading.Lock()
        self._held: _Held | None = None
        self._failure: tuple[datetime, BrokerError] | None = None

    def token(self) -> Secret:
        """A token that is good now. ProviderRefused if Vault does not let the broker in, else ProviderUnavailable."""
        now = self._clock()
        held = self._held
        if held is not None and held.usable(now) and now < held.renew_at and not self._file_changed(held):
            return held.token
        # Whoever has a good one goes on with it while another renews.
        if held is not None and held.usable(now) and self._guard.locked():
            return held.token
        with self._guard:
            return self._tended(self._clock())

    def speak(self, ask: Callable[[Secret], Answer]) -> Answer:
        """Ask with the broker's own token; once more with a new one if Vault does not know it any more."""
        token = self.token()
        answer = ask(token)
        # Refused before anything was done, so asking again does nothing twice.
        if answer.status == 403 and self.was_refused(token):
            return ask(self.token())
        return answer

    def was_refused(self, token: Secret) -> bool:
        """Whether it is worth asking again with a new token: Vault may have lost the old one, as after a restore."""
        held = self._held
        if held is None or held.token is not token:
            return True
        # A policy that is wrong refuses every token: it must not become a login for each call.
        if self._clock() - held.obtained_at < PAUSE or self._is_known(token):
            return False
        with self._guard:
            if self._held is None or self._held.token is not token:
                return True
            self._held = None
        self._forgotten()
        return True

    def _is_known(self, token: Secret) -> bool:
        """Whether Vault knows this token. Then it was a policy that refused, and Vault did not go back in time: taken
        for a loss, one role that is wrong would keep every other from being issued until all is looked at anew."""
        try:
            return self._connection.call("get", "auth/token/lookup-self", token=token).ok
        except ProviderUnavailable:
            return False

    def _tended(self, now: datetime) -> Secret:
        held = self._held
        if held is not None and held.usable(now) and now < held.renew_at and not self._file_changed(held):
            return held.token
        if self._failure is not None and abs(now - self._failure[0]) < PAUSE:
            # Those who waited meanwhile do not each wait for the same deadline again.
            if held is not None and held.usable(now):
                return held.token
            raise self._failure[1].with_traceback(None)
        try:
            self._held = self._renewed(held, now) or self._new(now)
            self._failure = None
        except (ProviderRefused, ProviderUnavailable) as problem:
            # When it failed and not when it began: between them may lie the whole deadline, and those who waited for it
            # would then wait for another, one after the other.
            self._failure = (self._clock(), problem)
            if held is None or not held.usable(now):
                raise
            _log.warning(
                "the broker's own token at Vault was not renewed", extra={"fields": {"reason": problem.reason}}
            )
            return held.token
        return self._held.token

    def _renewed(self, held: _Held | None, now: datetime) -> _Held | None:
        """The same token with a longer life; None where it must be obtained anew."""
        if held is None or not held.usable(now) or not held.renewable or self._file_changed(held):
            return None
        answer = self._connection.call("post", "auth/token/renew-self", token=held.token, body={})
        if not answer.ok:
            if answer.status == 403 and not self._is_known(held.token):
                self._forgotten()
            return None
        renewed = self._of(answer.table("auth"), now, held.token, held.file_state)
        # Near its maximum a renewal adds ever less. A token from a file has nobody to replace it but the file's owner.
        if held.file_state is None and renewed.life < held.life / 3:
            return None
        return replace(renewed, life=held.life)

    def _new(self, now: datetime) -> _Held:
        if self._auth.method == "token_file":
            return self._from_file(now)
        answer = self._log_in()
        if not answer.ok:
            answer.fail("let the broker in", f"auth/{self._auth.mount}")
        auth = answer.table("auth")
        token = auth.get("client_token")
        if not isinstance(token, str) or not _PRINTABLE.fullmatch(token):
            raise ProviderUnavailable("Vault let the broker in without a token")
        return self._of(auth, now, Secret(token), None)

    def _log_in(self) -> Answer:
        auth = self._auth
        adapter = self._connection.adapter(None)
        ask: Callable[[], Answer]
        if auth.method == "approle":
            proof = {"role_id": _text(auth.role_id_file), "secret_id": _text(auth.secret_id_file)}
            ask = partial(AppRole(adapter).login, **proof, use_token=False, mount_point=auth.mount)
        elif auth.method == "kubernetes":
            proof = {"role": auth.role, "jwt": _text(auth.token_file)}
            ask = partial(Kubernetes(adapter).login, **proof, use_token=False, mount_point=auth.mount)
        else:
            proof = {"role": auth.role, "jwt": _text(auth.token_file)}
            ask = partial(JWT(adapter).jwt_login, **proof, use_token=False, path=auth.mount)
        return self._connection.within(ask)

    def _from_file(self, now: datetime) -> _Held:
        state = _state(self._auth.token_file)
        token = Secret(_text(self._auth.token_file))
        answer = self._connection.call("get", "auth/token/lookup-self", token=token)
        if not answer.ok:
            answer.fail("let the broker in", f"the token in {self._auth.token_file}")
        data = answer.table("data")
        return self._of({**data, "lease_duration": data.get("ttl")}, now, token, state)

    def _of(self, auth: Mapping[str, Any], now: datetime, token: Secret, file_state: tuple[int, ...] | None) -> _Held:
        seconds = auth.get("lease_duration")
        if type(seconds) is not int or seconds < 0:
            raise ProviderUnavailable("Vault did not say how long the broker's token lives")
        life = timedelta(seconds=seconds)
        return _Held(
            token=token,
            obtained_at=now,
            expires_at=now + life if seconds else None,
            renew_at=now + (life * 2 / 3 if seconds else LOOK_AGAIN),
            life=life,
            renewable=auth.get("renewable") is True and seconds > 0,
            file_state=file_state,
        )

    def _file_changed(self, held: _Held) -> bool:
        return held.file_state is not None and _state(self._auth.token_file) not in (held.file_state, None)


def _state(path: str) -> tuple[int, ...] | None:
    """What changes when the file does; None where it is not there: what was read stays good."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_size, status.st_ino)


def _text(path: str) -> str:
    """The one word in a file; ProviderRefused if there is none. What it holds is never shown."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_FILE + 1)
    except OSError as problem:
        reason = f"{path} cannot be read: {problem.strerror}"
        raise ProviderRefused("the broker has nothing to log in to Vault with", reason=reason) from None
    text = raw.decode("ascii", "replace").strip()
    if len(raw) > MAX_FILE or not _PRINTABLE.fullmatch(text):
        reason = f"{path} does not hold one word of printable ASCII"
        raise ProviderRefused("the broker has nothing to log in to Vault with", reason=reason)
    return text
