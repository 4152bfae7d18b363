"""How a program gets a credential that it does not ask for: in a variable, in a file, or by a descriptor.

A variable holds it as it was at the start. A file is replaced as a whole each time there is a new one. A descriptor is
read once, and leaves nothing behind. A file is for its owner alone, in a directory of its own that goes with us, in
memory where the system has such a place; what one of us left behind when it was killed, the next one removes. No value
can change the form of what it is put into (INV-31).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from broker.sdk import Credential

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_PREFIX = "broker-exec-"
_LOCK = "lock"

Render = Callable[[Credential], str]


class Undeliverable(Exception):
    """Why a credential cannot be handed over in this way; never what it is."""


@dataclass(frozen=True, kw_only=True)
class Ways:
    """Under which variable each is found: in it, in the file that it names, or at the descriptor that it names."""

    variables: Mapping[str, Render] = field(default_factory=dict)
    files: Mapping[str, Render] = field(default_factory=dict)
    descriptors: Mapping[str, Render] = field(default_factory=dict)

    @property
    def are_renewed(self) -> bool:
        return bool(self.files)

    @classmethod
    def of(
        cls,
        variables: Sequence[tuple[str, Render]],
        files: Sequence[tuple[str, Render]],
        descriptors: Sequence[tuple[str, Render]],
        presets: Sequence[str],
    ) -> Ways:
        """All of them together; wrong usage where one variable would be two things, or there are none."""
        kinds: tuple[dict[str, Render], ...] = ({}, {}, {})
        given = [(0, variables), (1, files), (2, descriptors)]
        given += [(kind, tuple(PRESETS[preset][kind].items())) for preset in presets for kind in (0, 1)]
        for kind, pairs in given:
            for name, render in pairs:
                if any(name in named for named in kinds):
                    raise click.UsageError(f"{name} is given twice")
                kinds[kind][name] = render
        if not any(kinds):
            raise click.UsageError(
                "how does the program take it? Say --env NAME, --file NAME or --fd NAME, or --as postgres"
            )
        return cls(variables=kinds[0], files=kinds[1], descriptors=kinds[2])


class Way(click.ParamType[tuple[str, Render]]):
    """NAME, or NAME=MEMBER for one member of a secret that has several.

    >>> Way().convert("PGPASSWORD=password", None, None)[0]
    'PGPASSWORD'
    """

    name = "way"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Render]:
        if isinstance(value, tuple):
            return value
        name, equals, member = value.partition("=")
        if not _NAME.fullmatch(name) or (equals and not member):
            self.fail(f"{value!r} is not NAME or NAME=MEMBER, where NAME is the name of a variable")
        return name, member_of(member) if equals else whole

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "NAME[=MEMBER]"


def whole(credential: Credential) -> str:
    """The token; of a secret that has members all of them, as JSON."""
    return credential.reveal() if credential.token is not None else json.dumps(credential.reveal_data())


def member_of(name: str) -> Render:
    """One member of a secret, as text."""

    def render(credential: Credential) -> str:
        data = {"token": credential.reveal()} if credential.token is not None else credential.reveal_data()
        if name not in data:
            there = ", ".join(sorted(data))
            raise Undeliverable(f"the secret has no member {name!r}; it has: {there}")
        value = data[name]
        return value if isinstance(value, str) else json.dumps(value)

    return render


def _login(credential: Credential) -> tuple[str, str]:
    user, password = member_of("username")(credential), member_of("password")(credential)
    for value in (user, password):
        # A line of its own would be another setting, and blanks at the end are cut off.
        if _CONTROL.search(value) or value != value.strip():
            raise Undeliverable("the login has characters that PostgreSQL's files cannot hold")
    return user, password


def service_file(credential: Credential) -> str:
    """A connection service (libpq, `PGSERVICEFILE`): read at each connection, so a new login is taken with its name."""
    user, password = _login(credential)
    return f"[broker]\nuser={user}\npassword={password}\n"


def password_file(credential: Credential) -> str:
    """A password file (libpq, `PGPASSFILE`), for this user at any server."""
    user, password = (re.sub(r"([\\:])", r"\\\1", value) for value in _login(credential))
    return f"*:*:*:{user}:{password}\n"


def session_token(credential: Credential) -> str:
    """The session token of AWS, by either of the names that secret engines give it."""
    data = {} if credential.token is not None else credential.reveal_data()
    return member_of("session_token" if "session_token" in data else "security_token")(credential)


# What programs read without being told: (variables, files).
PRESETS: Mapping[str, tuple[Mapping[str, Render], Mapping[str, Render]]] = {
    "postgres": (
        {"PGSERVICE": lambda _: "broker", "PGUSER": member_of("username")},
        {"PGSERVICEFILE": service_file, "PGPASSFILE": password_file},
    ),
    "aws": (
        {
            "AWS_ACCESS_KEY_ID": member_of("access_key"),
            "AWS_SECRET_ACCESS_KEY": member_of("secret_key"),
            "AWS_SESSION_TOKEN": session_token,
        },
        {},
    ),
}


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """A credential where the program finds it: its variables, and the descriptors it inherits."""

    variables: Mapping[str, str] = field(repr=False)
    descriptors: tuple[int, ...]
    _ways: Ways
    _directory: Path | None

    def renew(self, credential: Credential) -> None:
        """Replace the files. Whoever reads one reads the old or the new, and never a part."""
        for name, render in self._ways.files.items():
            if self._directory is not None:
                _replace(self._directory / name, render(credential))


@contextlib.contextmanager
def delivered(ways: Ways, credential: Credential) -> Iterator[Delivered]:
    """The credential for the length of a block, in these ways; afterwards nothing is left of it."""
    with contextlib.ExitStack() as kept:
        variables = {name: _without_nul(name, render(credential)) for name, render in ways.variables.items()}
        directory = None
        if ways.files:
            directory = kept.enter_context(_private_directory(_places()))
            variables |= {name: str(directory / name) for name in ways.files}
        descriptors = []
        for name, render in ways.descriptors.items():
            reader = _readable(render(credential))
            kept.callback(os.close, reader)
            descriptors.append(reader)
            variables[name] = f"/dev/fd/{reader}"
        found = Delivered(variables=variables, descriptors=tuple(descriptors), _ways=ways, _directory=directory)
        found.renew(credential)
        yield found


def _without_nul(name: str, value: str) -> str:
    if "\0" in value:
        raise Undeliverable(f"the value for {name} has a character that no variable holds")
    return value


def _readable(value: str) -> int:
    """A descriptor from which the value can be read once."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        content = value.encode()
        # Nobody reads yet: what does not fit would never be written.
        if os.write(writer, content) != len(content):
            raise Undeliverable("the secret is too long for a descriptor: use --file")
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    return reader


def _replace(path: Path, content: str) -> None:
    draft = path.with_name(f".{path.name}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(content)
    draft.replace(path)


def _places() -> Iterator[Path]:
    """Where files may be, the best first: what a user has in memory, then any memory, then the disk."""
    yield Path(f"/run/user/{os.getuid()}")
    yield Path("/dev/shm")  # noqa: S108 - looked at below, and only for a directory of our own
    yield Path(tempfile.gettempdir())


@contextlib.contextmanager
def _private_directory(places: Iterator[Path]) -> Iterator[Path]:
    """A directory of ours alone, locked while we live, so that nobody takes it for one that was left behind."""
    place = next(place for place in places if _is_writable(place))
    _remove_abandoned(place)
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
    try:
        # Not inherited: a program that goes on after us must not keep it.
        lock = os.open(directory / f".{_LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # Locked before it has the name that others look for.
            fcntl.flock(lock, fcntl.LOCK_EX)
            (directory / f".{_LOCK}").rename(directory / _LOCK)
            yield directory
        finally:
            os.close(lock)
    finally:
        # The program may have removed it, which is its right.
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(directory)


def _is_writable(place: Path) -> bool:
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def _remove_abandoned(place: Path) -> None:
    """Remove what those of us left who were killed: nobody holds its lock. One that is just being made has none yet."""
    for directory in place.glob(f"{_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError, NotADirectoryError, PermissionError):
            found = directory.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                continue
            lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(directory)
            finally:
                os.close(lock)
