"""The reference of the configuration, written from the keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from broker.config.keys import ARRAYS, OPTIONAL, REQUIRED, SECTIONS, TOP, Key
from broker.config.wording import quoted, shown

_INTRODUCTION = """# Configuration

One TOML file, read once and strictly: an unknown key, a wrong type, a missing file or an unsafe value is an error that
names file, key, value and remedy, and the broker does not start. Relative paths are relative to the file's directory.

`issuer` and every key of a section in single brackets can be overridden by the environment: `BROKER__ISSUER`,
`BROKER__STORE__URL`, `BROKER__SERVER__WORKERS=2`, `BROKER__VAULT__AUTH__METHOD`. A `BROKER__` variable that overrides
nothing is an error too.
"""


def config_reference() -> str:
    """Every key with its type, default and meaning, as Markdown; `docs/reference/configuration.md` is this text."""
    tables: list[tuple[str, tuple[Key, ...]]] = [("Top level", TOP)]
    for name, keys in SECTIONS.items():
        more = "" if name not in OPTIONAL else ", if there is one"
        tables += [(f"`[{name}]`{more}", keys), *_variants(f"[{name}]", keys)]
    for name, keys in ARRAYS.items():
        tables += [(f"`[[{name}]]`", keys), *_variants(f"[[{name}]]", keys)]
    return _INTRODUCTION + "".join(f"\n## {title}\n\n" + "".join(_reference_rows(keys)) for title, keys in tables)


def _variants(section: str, keys: Sequence[Key]) -> Iterator[tuple[str, tuple[Key, ...]]]:
    """The tables within a table: one for each value of the key that decides about the others."""
    for key in keys:
        for chosen, below in key.variants.items():
            yield f'`{key.name}` of `{section}` with `{key.selector} = "{chosen}"`', below


def _reference_rows(keys: Sequence[Key]) -> Iterator[str]:
    yield "| key | type | default | meaning |\n|---|---|---|---|\n"
    for key in keys:
        yield f"| `{key.name}` | {_reference_type(key)} | {_reference_default(key)} | {key.meaning} |\n"


def _reference_type(key: Key) -> str:
    if key.choices:
        return ", ".join(f"`{choice}`" for choice in key.choices)
    if key.kind == "integer":
        return f"integer, {key.low} to {key.high}"
    if key.kind == "table":
        return f"table by its `{key.selector}`: {', '.join(f'`{chosen}`' for chosen in key.variants)}"
    return {"array": "array of strings", "facts": "table of strings, integers, booleans"}.get(key.kind, key.kind)


def _reference_default(key: Key) -> str:
    if key.default is REQUIRED:
        return "required"
    if key.default is None:
        return "–"
    if isinstance(key.default, list):
        return f"`[{quoted(key.default)}]`"
    return f"`{shown(key.default)}`"
