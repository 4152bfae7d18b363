"""A document against the keys there are: it collects every problem, with file, key, value and remedy."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from broker.config.files import read_file
from broker.config.keys import NOT_HERE, OPTIONAL, REQUIRED, SECTIONS, TOP, Key
from broker.config.values import ATTRIBUTE, PARAMETER, plain_text
from broker.config.wording import INT64, UNSHOWN, Wrong, a_type, bare, nearest, shown, without_password
from broker.domain.errors import ConfigurationError

_MAX_FILE_BYTES = 4 * 1024 * 1024
_PREFIX = "BROKER__"
Row = tuple[str, Mapping[str, Any], dict[str, Any]]  # where it stands, as written, as read


class Reader:
    """Collects problems while it reads; a value that is wrong is left out of what it returns."""

    def __init__(self, path: Path) -> None:
        self.source = path.absolute()
        self.problems: list[str] = []
        self.unreadable: set[str] = set()  # arrays of tables with a row that cannot be named
        self._variables: dict[str, str] = {}  # key path -> the environment variable that set it

    def path(self, value: str) -> Path:
        return self.source.parent / value

    def refuse(self, at: str, why: str, value: object = UNSHOWN) -> None:
        variable = self._variables.get(at)
        where = f"environment: {variable}" if variable else f"{self.source}: {at}"
        self.problems.append(f"{where}: {why}" if value is UNSHOWN else f"{where} = {shown(value)}: {why}")

    def document(self) -> dict[str, Any]:
        """The TOML as it is written. Nothing more can be said of a file that cannot be parsed."""
        try:
            return tomllib.loads(read_file(self.source, _MAX_FILE_BYTES).decode())
        except Wrong as wrong:
            why = str(wrong)
        except UnicodeDecodeError as error:
            why = f"is not UTF-8 at byte {error.start}; save it as UTF-8"
        except RecursionError:
            why = "is nested too deeply; the deepest key of this file is a table in an array of tables"
        except ValueError as error:
            # tomllib's message tells a line and a column, and at most the name of a key.
            why = f"is not TOML: {error}; correct it there"
        raise ConfigurationError([f"{self.source}: {why}"])

    def overridden(self, document: dict[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
        """The document with every `BROKER__…` variable in its place; one that overrides nothing is refused."""
        keys = {_variable(at): (at, key) for at, key in _overridable()}
        document = dict(document)
        for variable in sorted(name for name in environ if name.startswith(_PREFIX)):
            if variable not in keys:
                near = nearest(variable, keys) or f"what can be set is {', '.join(sorted(keys))}"
                self.problems.append(f"environment: {bare(variable)} overrides no key of this version; {near}")
                continue
            (*above, last), key = keys[variable]
            table: Any = document
            for name in above:
                below = table.get(name, {})
                if not isinstance(below, dict):
                    break  # what it is instead is refused where it stands
                table[name] = dict(below)
                table = table[name]
            else:
                table[last] = from_text(key, environ[variable])
                self._variables[".".join((*above, last))] = variable
        return document

    def section(self, document: Mapping[str, Any], name: str, keys: Sequence[Key]) -> dict[str, Any]:
        """Its values; none at all for an optional section that is not there."""
        if name in OPTIONAL and name not in document:
            return {}
        raw = document.get(name, {})
        if not isinstance(raw, dict):
            # Not its value: it may be a store URL with a password, one level too high.
            self.refuse(name, f"is {a_type(raw)} and must be a table; write [{name}] and its keys below")
            return {}
        return self.table(raw, keys, name)

    def rows(self, document: Mapping[str, Any], name: str, keys: Sequence[Key]) -> list[Row]:
        raw = document.get(name, [])
        if not isinstance(raw, list):
            self.unreadable.add(name)
            self.refuse(name, f"is {a_type(raw)} and must be an array of tables; write [[{name}]] above each")
            return []
        if not all(isinstance(item, dict) and isinstance(item.get(keys[0].name), str) for item in raw):
            self.unreadable.add(name)
        rows: list[Row] = []
        for index, item in enumerate(raw):
            at = f"{name}[{index}]"
            if isinstance(item, dict):
                rows.append((at, item, self.table(item, keys, at)))
            else:
                self.refuse(at, f"is {a_type(item)} and must be a table; write [[{name}]] above each")
        return rows

    def refuse_unknown(self, raw: Mapping[str, Any], known: Sequence[str], at: str, where_known: str = "here") -> None:
        for name in raw:
            if name in known:
                continue
            where = f"{at}.{bare(name)}" if at else bare(name)
            why = NOT_HERE.get(re.sub(r"\[\d+\]", "", where))
            near = nearest(name, known) or f"the keys {where_known} are {', '.join(known)}"
            # Without its value: it may be a secret under a name we do not know.
            self.refuse(where, why or f"is not a key of this version; {near}")

    def table(
        self, raw: Mapping[str, Any], keys: Sequence[Key], at: str, *, where_known: str = "here"
    ) -> dict[str, Any]:
        """Every key that is right, and the default of every key that is absent."""
        if at:
            self.refuse_unknown(raw, [key.name for key in keys], at, where_known)
        values: dict[str, Any] = {}
        for key in keys:
            where = f"{at}.{key.name}" if at else key.name
            if key.name in raw:
                before = len(self.problems)
                found = self._checked(key, raw[key.name], where)
                if len(self.problems) == before:
                    values[key.name] = found
            elif key.default is not REQUIRED:
                values[key.name] = key.default
            else:
                self.refuse(where, f"is missing; write {key.expected} ({key.meaning.rstrip('.')})")
        return values

    def _checked(self, key: Key, value: Any, at: str) -> Any:
        """The value; of a table, with the defaults of what it leaves out."""
        if key.kind == "table" and isinstance(value, dict):
            return self._variant(key, value, at)
        self._check(key, value, at)
        return value

    def _variant(self, key: Key, raw: Mapping[str, Any], at: str) -> dict[str, Any]:
        """A table whose selector says which keys it has. Without one that is known, nothing can be said of the rest."""
        selecting = key.selecting
        chosen = raw.get(selecting.name)
        if not isinstance(chosen, str) or chosen not in key.variants:
            self.table({name: value for name, value in raw.items() if name == selecting.name}, (selecting,), at)
            return {}
        keys = (selecting, *key.variants[chosen])
        return self.table(raw, keys, at, where_known=f"with {selecting.name} {shown(chosen)}")

    def _check(self, key: Key, value: Any, at: str) -> None:
        match key.kind, value:
            case "boolean", bool():
                pass
            # type() and not isinstance: true is an int to Python.
            case "integer", _ if type(value) is int:
                if not key.low <= value <= key.high:  # INV-09
                    self.refuse(at, f"is out of bounds; write {key.expected}", value)
            case "string", str():
                self._check_text(key, value, at)
            case "array", list():
                self._check_array(key, value, at)
            case "facts", dict():
                self._check_facts(key, value, at)
            case _:
                self.refuse(at, f"is {a_type(value)}; write {key.expected}", UNSHOWN if key.secret else value)

    def _check_text(self, key: Key, value: str, at: str) -> None:
        if key.may_be_empty and not value:
            return
        try:
            plain_text(value)
            if key.choices and value not in key.choices:
                raise Wrong(f"is not known here; write {key.expected}")
            if key.check:
                key.check(value)
        except Wrong as wrong:
            self.refuse(at, str(wrong), without_password(value) if key.secret else value)

    def _check_array(self, key: Key, value: list[Any], at: str) -> None:
        seen: set[str] = set()
        for index, item in enumerate(value):
            if not isinstance(item, str):
                self.refuse(f"{at}[{index}]", f"is {a_type(item)}; write {key.expected}", item)
                continue
            self._check_text(key, item, f"{at}[{index}]")
            if item in seen:
                self.refuse(f"{at}[{index}]", "is there twice; take one out", item)
            seen.add(item)

    def _check_facts(self, key: Key, value: dict[str, Any], at: str) -> None:
        for name, fact in value.items():
            where = f"{at}.{bare(name)}"
            if key.names == "attribute" and not ATTRIBUTE.fullmatch(name):
                self.refuse(where, 'is not the name of an attribute; use letters, digits and "_"')
            elif name in key.reserved:
                self.refuse(where, "is a fact the broker itself states, and may not be restated; rename it", fact)
            elif key.names in ("parameter", "setting") and not PARAMETER.fullmatch(name):
                self.refuse(where, f'is not the name of a {key.names}; use letters, digits and "_ . -"')
            elif key.names == "claim" and (not name.isprintable() or not all(name.split("."))):
                self.refuse(where, 'is not the path of a claim; write names joined by "."')
            elif isinstance(fact, dict) and key.names == "claim":
                self.refuse(where, f'is a table; a path is one quoted key: "{bare(name)}.…" = value')
            elif isinstance(fact, str):
                self._check_text(Key(name=name, kind="string", meaning=""), fact, where)
            elif type(fact) is int:
                if fact not in INT64:
                    self.refuse(
                        where, "is not a 64-bit integer, which is all a policy can hold; write it as a string", fact
                    )
            elif not isinstance(fact, bool):
                self.refuse(where, f"is {a_type(fact)}; write a string, an integer or a boolean", fact)


def _overridable() -> Iterator[tuple[tuple[str, ...], Key]]:
    """Every key that has one place only, and its path."""
    for key in TOP:
        yield (key.name,), key
    for section, members in SECTIONS.items():
        for key in members:
            if key.kind == "table":
                yield (section, key.name, key.selector), key.selecting
                for below in (below for keys in key.variants.values() for below in keys):
                    yield (section, key.name, below.name), below
            else:
                yield (section, key.name), key


def _variable(path: Sequence[str]) -> str:
    return _PREFIX + "__".join(name.upper() for name in path)


def from_text(key: Key, text: str) -> Any:
    """The text as the key's type; text that is none stays text, and is refused where types are."""
    if key.kind == "integer" and re.fullmatch(r"-?[0-9]{1,18}", text):
        return int(text)
    if key.kind == "boolean":
        return {"true": True, "false": False}.get(text, text)
    return text
