"""Which options of compensation and sparsity go together, and which way out the others have."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rqc.compiler.option_values import one_of
from rqc.runtime.errors import InputError, SchemeError

if TYPE_CHECKING:
    from rqc.compiler.recipe import Recipe

COMPENSATIONS = ("none", "loftq", "eora")
SPARSITIES = ("none", "2:4")
PRUNINGS = ("magnitude", "wanda")
DEFAULT_RANK = 32
"""Where neither a rank nor a budget is asked for."""


def check_compensation(recipe: Recipe) -> None:
    """Raise an RqcError for an unknown way to compensate or prune, and for options that have no use together."""
    one_of("compensate", recipe.compensate, COMPENSATIONS, SchemeError)
    one_of("sparsity", recipe.sparsity, SPARSITIES, SchemeError)
    one_of("prune", recipe.prune, PRUNINGS, SchemeError)
    _check_size(recipe)
    if recipe.sparsity == "none" and recipe.stated("prune"):
        raise SchemeError(f"--prune {recipe.prune} without --sparsity", hint="--sparsity 2:4, or leave it out")
    for name in ("compensate", "sparsity"):
        if getattr(recipe, name) != "none" and not recipe.scheme.quantized:
            raise SchemeError(
                f"--{name} {getattr(recipe, name)} with --scheme {recipe.scheme}, which rounds no weights",
                hint="--scheme w4a16, or leave it out",
            )
    if recipe.compensate == "loftq":
        _check_loftq(recipe)


def _check_size(recipe: Recipe) -> None:
    """Raise InputError for a rank or a budget that is none, for both, or for one without compensation."""
    rank, budget = recipe.compensate_rank, recipe.compensate_budget
    if rank is not None and rank < 1:
        raise InputError(f"compensate_rank is {rank}", hint="compensate_rank is 1 or more")
    if budget is not None and not (budget > 0 and math.isfinite(budget)):
        raise InputError(f"compensate_budget is {budget}", hint="bits per weight on top of the scheme's, such as 0.25")
    if rank is not None and budget is not None:
        raise InputError(
            "compensate_rank gives every linear one rank, compensate_budget each its own", hint="choose one of them"
        )
    if recipe.compensate == "none" and (rank is not None or budget is not None):
        name = "compensate_budget" if rank is None else "compensate_rank"
        raise InputError(f"{name} is for a compensation, and none is asked for", hint="--compensate eora")


def _check_loftq(recipe: Recipe) -> None:
    """LoftQ chooses codes and factors by turns, for all of a weight: nothing else can choose them too."""
    if recipe.method == "gptq":
        raise SchemeError(
            "--compensate loftq with --method gptq: LoftQ chooses the codes itself, by rounding to nearest",
            hint="--method rtn, or --compensate eora, which makes up for the error of any codes",
        )
    if recipe.sparsity != "none":
        raise SchemeError(
            f"--compensate loftq with --sparsity {recipe.sparsity}: LoftQ rounds weights of which it has taken a part "
            "away, zeros do not stay where they are",
            hint="--compensate eora, which makes up for both",
        )
