"""Which methods of rounding a model and its adapters leave open."""

from __future__ import annotations

from dataclasses import replace

from rqc.compiler.adapters.merge import FOLD, Merge
from rqc.compiler.instruments import Progress
from rqc.compiler.recipe import Recipe
from rqc.runtime.errors import SchemeError


def with_method(recipe: Recipe, merge: Merge | None, progress: Progress) -> Recipe:
    """The recipe with a method that fits: rounding to nearest for `auto` where there is no choice, which is said.

    Raises SchemeError where another is asked for and nothing is rounded, an adapter was trained on given codes, or one
    beside them has magnitudes.
    """
    obstacle = _obstacle(recipe, merge)
    if recipe.method == "auto" and (obstacle or recipe.scheme.small_floats or recipe.compensate == "loftq"):
        progress.line("method auto: rtn, there is no other here")
        return replace(recipe, method="rtn")
    if recipe.method != "rtn" and obstacle is not None:
        why, hint = obstacle
        raise SchemeError(f"--method {recipe.method} {why}", hint=hint)
    return recipe


def _obstacle(recipe: Recipe, merge: Merge | None) -> tuple[str, str] | None:
    """Why codes must be those of rounding to nearest, and the way out; None where they need not."""
    if not recipe.scheme.quantized:
        return (
            f"with --scheme {recipe.scheme}, which rounds no weights",
            "leave --method out, or take --scheme w4a16",
        )
    for part in () if merge is None else merge.parts:
        directory, basis = part.adapter.directory, part.adapter.basis
        if basis is not None and basis.grid is not None:
            return (
                f"gives the base other codes than those that {directory} was trained on",
                "--method rtn, by which it was trained",
            )
        if merge is not None and merge.how != FOLD and any(one.magnitude is not None for one in part.deltas.values()):
            return (
                f"with --merge {merge.how}: {directory} is a DoRA, which divides by the norms of the codes, and verify "
                "finds these again where they are rounded to nearest alone",
                "--method rtn, or --merge fold",
            )
    return None
