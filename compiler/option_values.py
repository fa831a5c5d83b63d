"""Values of options, as recipes and fine-tunes take them by name: what they may be, and what is told of others."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rqc.models.rotation import SITES
from rqc.runtime.errors import InputError, RqcError

PATH, NUMBER = (str, Path), (int, float)
NEGATED = {"asymmetric": "symmetric", "activation_asymmetric": "activation_symmetric"}
"""Names of flags for the opposite of a field."""
_WORDS = {str: "text", int: "a whole number", bool: "true or false", PATH: "a path", NUMBER: "a number"}


def near_miss(name: str, known: Sequence[str]) -> str:
    """A hint: the known name that is meant, or all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known options: {', '.join(known)}"


def one_of(name: str, value: object, allowed: tuple[object, ...], error: type[RqcError]) -> None:
    """Raise `error` for a value that is not allowed."""
    if value not in allowed:
        raise error(f"{name} {value!r} is not available here", hint=f"allowed: {', '.join(map(str, allowed))}")


def typed(name: str, value: Any, kind: type | tuple[type, ...]) -> Any:
    """`value`, if it is of that kind; True and False are no numbers. Raises InputError."""
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise InputError(f"{name} is {value!r}", hint=f"{name} is {_WORDS[kind]}")


def by_field(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by the fields that hold them, of options by name as in flags, files or keyword arguments.

    Raises InputError for one that is given twice, and for the opposite of an option that is not true or false.
    """
    found: dict[str, Any] = {}
    for option, value in values.items():
        name = option.replace("-", "_")
        field = "rotation_file" if name == "rotation" else NEGATED.get(name, name)
        if field in found:
            raise InputError(f"option {option!r} is given twice", hint="- and _ are the same in names")
        found[field] = not typed(option, value, bool) if name in NEGATED and value is not None else value
    return found


def parsed_values(
    values: Mapping[str, Any], known: Sequence[str], of: str, parse: Callable[[str, Any], Any]
) -> dict[str, Any]:
    """Values by field as `parse` makes them of options by name; those that are None, for the default, are left out.

    Raises InputError for an unknown name, with the nearest known one, and as `by_field`.
    """
    parsed: dict[str, Any] = {}
    for option, (name, value) in zip(values, by_field(values).items(), strict=True):
        if name not in known:
            raise InputError(f"unknown option {option!r} of {of}", hint=near_miss(name, known))
        if value is not None:
            parsed[name] = parse(name, value)
    return parsed


def rotation_values(parsed: Mapping[str, Any]) -> dict[str, Any]:
    """What a learned rotation brings along: sites, unless they are chosen, seed and kind.

    Raises InputError where the options say another seed or kind beside it, or leave out all that was learned, and for
    the seed or kind of a rotation that has no sites.
    """
    file = parsed.get("rotation_file")
    if file is None:
        _check_sites(parsed)
        return {}
    for name in ("rotation_seed", "hadamard"):
        if name in parsed:
            raise InputError(
                f"--{name.replace('_', '-')} beside --rotation {file.path}, which has its own", hint="leave one out"
            )
    rotation, sites = file.rotation, parsed.get("rotate", "auto")
    if sites != "auto" and not sites & rotation.learned.sites:
        raise InputError(
            f"--rotate {','.join(sorted(sites)) or 'none'} leaves out all that {file.path} has learned",
            hint=f"--rotate {rotation}, or no --rotation",
        )
    return {
        "rotate": rotation.sites if sites == "auto" else sites,
        "rotation_seed": rotation.seed,
        "hadamard": rotation.hadamard,
    }


def _check_sites(parsed: Mapping[str, Any]) -> None:
    """Raise InputError for the seed or kind of no rotation at all."""
    for name, default in (("rotation_seed", 0), ("hadamard", "full")):
        if parsed.get("rotate") == frozenset() and parsed.get(name, default) != default:
            raise InputError(
                f"--{name.replace('_', '-')} {parsed[name]} with --rotate none, which has no use for it",
                hint="leave it out, or name what is to be rotated: --rotate r1,r2",
            )


def site_names(value: Any, *words: str) -> list[str]:
    """The names in "r1,r4" or in a list of them. words: what may stand there besides. Raises InputError."""
    if isinstance(value, str):
        return [name.strip() for name in value.split(",")]
    if isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(name, str) for name in value):
        return list(value)
    raise InputError(f"rotate is {value!r}", hint=f"{', '.join(words)}, or a list of {', '.join(SITES)}")
