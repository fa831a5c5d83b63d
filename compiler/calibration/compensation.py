"""What branches that make up for rounding cost, how a budget spreads over them, and where they cannot be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rqc.compiler.adapters.merge import FOLD, Merge
from rqc.compiler.calibration.findings import Findings
from rqc.compiler.compensation_options import DEFAULT_RANK
from rqc.compiler.recipe import Recipe
from rqc.models.delta import Delta
from rqc.models.description import Description
from rqc.models.eora import ranks_by_budget
from rqc.runtime.errors import SchemeError

STEP = 16
"""Ranks of a budget are multiples of it: the smallest block of codes that kernels read."""
ENTRY_BITS = {"int8": 9.0, "planes": 10.0, "fp16": 16.0, "bf16": 16.0, "fp32": 32.0}
"""Bits of a factor's entry with its share of scales, by how it is stored."""

Shapes = Mapping[str, tuple[int, int]]


def check_beside(recipe: Recipe, merge: Merge | None) -> None:
    """Raise SchemeError for compensation or zeros together with adapters that stay beside the grid."""
    if merge is None or merge.how == FOLD or (recipe.compensate, recipe.sparsity) == ("none", "none"):
        return
    asked = f"--compensate {recipe.compensate}" if recipe.compensate != "none" else f"--sparsity {recipe.sparsity}"
    way = "an adapter without a name, --merge fold" if merge.names else "--merge fold, where the adapter allows it,"
    raise SchemeError(
        f"{asked} with --merge {merge.how}: an adapter beside the weights stands for itself, and is not made up for",
        hint=f"{way} or leave one of them out",
    )


def rank_of(recipe: Recipe, shape: tuple[int, ...], chosen: int | None = None) -> int:
    """The rank of the branch beside a weight [N, K]: `chosen` by a budget, or the recipe's, as far as it has it."""
    rank = chosen if chosen is not None else recipe.compensate_rank or DEFAULT_RANK
    return min(rank, *shape)


def budgeted_ranks(recipe: Recipe, spectra: Mapping[str, NDArray[np.float64]], shapes: Shapes) -> dict[str, int]:
    """The rank of every branch within the recipe's budget of bits for each weight of the linears. Raises SchemeError if
    it buys none."""
    assert recipe.compensate_budget is not None
    weights, bits = sum(n * k for n, k in shapes.values()), entry_bits(recipe)
    ranks = ranks_by_budget(spectra, shapes, int(recipe.compensate_budget * weights / bits), STEP)
    if not any(ranks.values()):
        least = min(min(STEP, n, k) * (n + k) for n, k in shapes.values()) * bits / weights
        raise SchemeError(
            f"--compensate-budget {recipe.compensate_budget:g} buys no branch: the smallest takes {least:.2g} bits for "
            "each weight of the model's linears",
            hint="raise it, or take --compensate-rank",
        )
    return ranks


def entry_bits(recipe: Recipe) -> float:
    """Bits of an entry of A or B in the engine: codes for ONNX Runtime's kernels, floats for TensorRT."""
    if recipe.target != "onnx":
        return ENTRY_BITS[recipe.dtype or "fp16"]
    return ENTRY_BITS["int8" if recipe.scheme.activation_bits == 8 else "planes"]


def expected(recipe: Recipe, description: Description) -> Findings:
    """Branches of the size that a compile will find, all zeros: what is told before anything is measured."""
    found = Findings(0)
    if recipe.compensate == "none":
        return found
    shapes = {claim.weight: description.shape(claim) for claim in description.claims if claim.quantized}
    even = None
    if recipe.compensate_budget is not None:
        bits = recipe.compensate_budget * sum(n * k for n, k in shapes.values())
        even = max(1, round(bits / (entry_bits(recipe) * sum(n + k for n, k in shapes.values()))))
    ranks = {name: rank_of(recipe, shape, even) for name, shape in shapes.items()}
    for name, rank in ranks.items():
        found.deltas[name] = Delta(np.zeros((rank, shapes[name][1])), np.zeros((shapes[name][0], rank)))
        found.coded.add(name)
    return found


def said_of(recipe: Recipe, findings: Findings | None) -> dict[str, Any]:
    """What the manifest says of zeros and branches, where there are some."""
    said: dict[str, Any] = {}
    if recipe.sparsity != "none":
        said["sparsity"] = {"pattern": recipe.sparsity, "prune": recipe.prune}
    if findings is not None and findings.deltas:
        ranks = sorted(delta.rank for delta in findings.deltas.values())
        budget = {} if recipe.compensate_budget is None else {"budget": recipe.compensate_budget}
        said["compensation"] = {
            "method": recipe.compensate,
            "rank": ranks[-1],
            "least_rank": ranks[0],
            "linears": len(ranks),
            **budget,
        }
    return said
