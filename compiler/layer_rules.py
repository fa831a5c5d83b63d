"""Bits per layer by recipe: `[[layers]]` tables, each a pattern over the names of linears and the bits of those that it
matches."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from rqc.compiler.option_values import near_miss, one_of, typed
from rqc.compiler.scheme import Scheme
from rqc.models.description import EMBEDDING, HEAD, Description
from rqc.models.grid import STORAGE_BITS
from rqc.runtime.errors import InputError, SchemeError

BITS = tuple(STORAGE_BITS)
BUDGETED = {16: "w4a16", 8: "w4a8", 6: "w4a4", 4: "w4a4"}
"""By activation bits: the scheme that a budget goes with, whose own 4 bits it replaces."""
PREFIX, SUFFIX = "model.", ".weight"


@dataclass(frozen=True)
class LayerRule:
    """Linears whose names match a glob (* ? [...], * passes dots) have `bits`. Names are those of weights
    (model.layers.0.mlp.down_proj.weight); `model.` in front and `.weight` behind may be left out.

    Raises InputError for an empty pattern, SchemeError for a width that there is no grid of.
    """

    match: str
    bits: int

    def __post_init__(self) -> None:
        if not self.match.strip():
            raise InputError("a rule of layers matches an empty name", hint='match = "layers.*.mlp.down_proj"')
        one_of("bits", self.bits, BITS, SchemeError)

    def matches(self, weight: str) -> bool:
        """Whether the pattern fits a weight's name, whole or short."""
        bare = weight.removeprefix(PREFIX)
        names = (weight, bare, weight.removesuffix(SUFFIX), bare.removesuffix(SUFFIX))
        return any(fnmatchcase(name, self.match) for name in names)

    def to_json(self) -> dict[str, Any]:
        """The rule as a recipe file has it."""
        return {"match": self.match, "bits": self.bits}


def parse_rules(value: Any) -> tuple[LayerRule, ...]:
    """Rules of a list of tables {"match", "bits"}, or of rules. Raises InputError or SchemeError naming the table."""
    if not isinstance(value, (list, tuple)):
        raise InputError(f"layers is {value!r}", hint='[[layers]] tables with match = "..." and bits = 2')
    return tuple(
        rule if isinstance(rule, LayerRule) else _parse(rule, place) for place, rule in enumerate(value, start=1)
    )


def _parse(value: Any, place: int) -> LayerRule:
    keys = ["match", "bits"]
    if not isinstance(value, Mapping):
        raise InputError(f"layers, table {place}: {value!r}", hint='[[layers]] match = "...", bits = 2')
    for key in value:
        if key not in keys:
            raise InputError(f"layers, table {place}: unknown key {key!r}", hint=near_miss(str(key), keys))
    for key in keys:
        if key not in value:
            raise InputError(f"layers, table {place}: no {key}", hint='match = "layers.*.mlp.down_proj" and bits = 2')
    return LayerRule(typed("match", value["match"], str), typed("bits", value["bits"], int))


def check_budget(scheme: Scheme, rules: Sequence[LayerRule], budget: float | None) -> None:
    """Raise SchemeError for rules or a budget of bits with a scheme that has no use for them."""
    asked = "layers" if rules else "--bits-budget"
    if (rules or budget is not None) and not scheme.quantized:
        raise SchemeError(f"{asked} with --scheme {scheme}, which rounds no weights", hint="--scheme w4a16")
    if budget is not None and scheme.name not in BUDGETED.values():
        raise SchemeError(
            f"--bits-budget with --scheme {scheme}: a budget says how many bits weights have, and the scheme another",
            hint=f"--scheme {BUDGETED[scheme.activation_bits]} with the budget, or {scheme} without",
        )


def widths_by_rule(rules: Sequence[LayerRule], description: Description) -> dict[str, int]:
    """Bits of the linears that rules name, by weight; the last rule that matches a linear counts.

    Raises InputError for a rule that matches none, with the nearest names or with what else gives its weight a width.
    """
    names = [claim.weight for claim in description.claims if claim.quantized]
    widths: dict[str, int] = {}
    for rule in rules:
        found = {name: rule.bits for name in names if rule.matches(name)}
        if not found:
            raise InputError(
                f"layers: {rule.match!r} matches no linear of the blocks", hint=_nearest(rule, description, names)
            )
        widths |= found
    return widths


def _nearest(rule: LayerRule, description: Description, names: Sequence[str]) -> str:
    if rule.matches(EMBEDDING) or rule.matches(HEAD):
        return "--embedding-bits and --head-bits give embedding and head their widths"
    if any(rule.matches(claim.weight) for claim in description.claims):
        return "routers stay in float"
    layers = description.architecture.layers
    short = [name.removeprefix(PREFIX).removesuffix(SUFFIX) for name in names]
    kinds = dict.fromkeys(re.sub(r"\d+", "*", name) for name in short)
    wanted = rule.match.removeprefix(PREFIX).removesuffix(SUFFIX)
    near = _close(wanted, kinds) or _close(re.sub(r"\d+", "*", wanted), kinds)
    told = f"did you mean {' or '.join(map(repr, near))}?" if near else f"linears: {', '.join(kinds)}"
    return f"{told} layers go from 0 to {layers - 1}" if re.search(r"\d", wanted) else told


def _close(wanted: str, names: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(wanted, list(names), n=2)
