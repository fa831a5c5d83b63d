"""Which adapters a compile or a verification is given: directories, each with a name if it is to be switched."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from rqc.runtime.errors import InputError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
RESERVED = ("base", "none")
"""Words for the model without an adapter."""
AdapterOption: TypeAlias = "str | Path | AdapterSource | list[Any] | tuple[Any, ...] | Mapping[str, Any] | None"
"""DIR, NAME=DIR, several of them in a list, or {NAME: DIR}."""


@dataclass(frozen=True)
class AdapterSource:
    """An adapter's directory. name: what it is chosen by at run time; None for one that is merged for good."""

    path: Path
    name: str | None = None

    def __str__(self) -> str:
        if self.name is not None:
            return f"{self.name}={self.path}"
        text = str(self.path)
        return f"./{text}" if "=" in text.partition("/")[0] else text

    def under(self, folder: Path) -> AdapterSource:
        """The same with a relative path that starts from this folder."""
        return AdapterSource(folder / self.path, self.name)


def parse_sources(value: Any) -> tuple[AdapterSource, ...]:
    """The adapters that an option names, in its order. Raises InputError for what is none, and for names that clash.

    What stands in front of the first = of a text is a name, unless it holds a slash.
    """
    if value is None:
        return ()
    if isinstance(value, Mapping):
        sources = tuple(AdapterSource(_path(path), _name(name)) for name, path in value.items())
    elif isinstance(value, (list, tuple)):
        sources = tuple(_source(item) for item in value)
    else:
        sources = (_source(value),)
    names = [source.name for source in sources if source.name is not None]
    if names and len(names) < len(sources):
        raise InputError(
            f"{len(names)} of {len(sources)} adapters have names",
            hint="NAME=DIR for every one (switched at run time), or for none (all of them merged)",
        )
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two adapters are called {name!r}", hint="give each a name of its own")
    return sources


def _source(value: Any) -> AdapterSource:
    if isinstance(value, AdapterSource):
        return value
    if isinstance(value, str):
        name, sign, path = value.partition("=")
        if sign and "/" not in name and "\\" not in name:
            return AdapterSource(_path(path), _name(name))
    return AdapterSource(_path(value))


def _path(value: Any) -> Path:
    if isinstance(value, (str, Path)) and str(value):
        return Path(value)
    raise InputError(f"adapter is {value!r}", hint="a directory, NAME=DIR, or a list of them")


def _name(value: Any) -> str:
    if isinstance(value, str) and NAME.fullmatch(value) and value not in RESERVED:
        return value
    raise InputError(
        f"an adapter cannot be called {value!r}",
        hint=f"letters, digits, '.', '_' and '-', and not {' or '.join(RESERVED)}; "
        "write ./A=B for a directory whose name holds a =",
    )
