"""Which ways to merge are open to adapters, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from rqc.compiler.adapters.merge import BRANCH, FOLD, ZERO_POINT, AdapterPart, Merge
from rqc.compiler.recipe import Recipe
from rqc.compiler.widths import linear_grid
from rqc.models.adapter_frames import frame_folds
from rqc.models.algebra import RotateOut
from rqc.models.rotation import Rotation
from rqc.runtime.errors import SchemeError


def way(recipe: Recipe, merge: Merge) -> str:
    """The way to merge. Raises SchemeError, with the ways that work, for one that does not."""
    how = _automatic(recipe, merge) if merge.how == "auto" else merge.how
    reason = obstacle(how, recipe, merge)
    if reason is not None:
        raise SchemeError(f"--merge {how}: {reason}", hint=ways_text(recipe, replace(merge, how=how)))
    return how


def _automatic(recipe: Recipe, merge: Merge) -> str:
    """Folded on a float base, beside the grid that an adapter was trained on; beside it too where it is switched."""
    if merge.names:
        return BRANCH
    if all(part.adapter.basis is None or part.adapter.basis.grid is None for part in merge.parts):
        return FOLD
    return ZERO_POINT if obstacle(ZERO_POINT, recipe, merge) is None else BRANCH


def ways_text(recipe: Recipe, merge: Merge) -> str:
    """The other ways that are open to these adapters, as flags."""
    if merge.names:
        return "giving it alone and without a name"
    others = [how for how in (FOLD, ZERO_POINT, BRANCH) if how != merge.how]
    ways = [f"--merge {how}" for how in others if obstacle(how, recipe, merge) is None]
    if merge.how == FOLD:
        ways += [f"giving {part.adapter.directory} first" for part in merge.parts if _helps_first(part, merge)]
    return " or ".join(ways) or ("training it anew" if len(merge.parts) == 1 else "giving each alone")


def _helps_first(part: AdapterPart, merge: Merge) -> bool:
    """Whether adapters that cannot be folded in their order can with this one in front."""
    rest = [one for one in merge.parts if one is not part]
    return _out_of_order(merge) is not None and _out_of_order(replace(merge, parts=(part, *rest))) is None


def obstacle(how: str, recipe: Recipe, merge: Merge) -> str | None:
    """Why adapters cannot be merged that way, or None."""
    if how == FOLD:
        if any(part.adapter.repaired for part in merge.parts):
            return "the adapter repairs the rounding of its base (LoftQ, EoRA), which is not there in the float weights"
        return _out_of_order(merge)
    return (
        _switched(merge)
        or _summed_dora(merge)
        or next((found for part in merge.parts if (found := _beside(how, part, recipe, merge)) is not None), None)
    )


def _beside(how: str, part: AdapterPart, recipe: Recipe, merge: Merge) -> str | None:
    """Why one adapter cannot run beside a grid or in its zero points, or None."""
    turned = part.plain and (recipe.rotation is None or bool(recipe.rotation.sites))
    dora = _doras(part)
    if dora and not recipe.scheme.quantized:
        return f"a DoRA scales the rows of a grid, --scheme {recipe.scheme} has none"
    if dora and recipe.scheme.weights == "nvfp4":
        return "a DoRA scales the rows of a grid, and scales of NVFP4 are 8-bit floats, which do not hold any factor"
    if how == BRANCH:
        return _mixed(dora, recipe.rotation, merge) if turned else None
    if not recipe.scheme.quantized or recipe.scheme.small_floats:
        return f"--scheme {recipe.scheme} has no zero points"
    if turned:
        return "a pooled adapter cannot be carried into a rotated basis (--rotate none keeps its own)"
    grid = linear_grid(recipe)
    for name, delta in part.deltas.items():
        if merge.is_beside(name) and delta.pooled(block := grid.block(delta.a.shape[1])) is None:
            return f"the adapter of {name} is not constant in blocks of {block} inputs"
    return None


def _doras(part: AdapterPart) -> list[str]:
    return [name for name, delta in part.deltas.items() if delta.magnitude is not None]


def _switched(merge: Merge) -> str | None:
    """Why adapters cannot be switched at run time, or None."""
    for part in merge.parts if merge.names else ():
        who = f"{part.name} ({part.adapter.directory})"
        if dora := _doras(part):
            return f"{who} is a DoRA, whose magnitudes scale the rows of {dora[0]} that all share"
        for name in part.deltas:
            if not merge.is_beside(name):
                return f"{who} has a part for {name}, which can only be folded, for good"
    return None


def _summed_dora(merge: Merge) -> str | None:
    """Why a DoRA cannot run beside a grid together with others, or None."""
    for part in merge.parts:
        for name in _doras(part):
            if len(merge.weights[name]) > 1 and merge.is_beside(name):
                return (
                    f"{part.adapter.directory} is a DoRA, whose magnitudes belong to {name} and its own update alone, "
                    f"and {_other(merge, part, name)} updates that too"
                )
    return None


def _out_of_order(merge: Merge) -> str | None:
    """Why a DoRA cannot be folded together with others, or None: diag(m/n) (W + ΔA) + ΔB needs it first of all."""
    for part in merge.parts:
        for name in _doras(part):
            sharing = [one for one in merge.parts if name in one.deltas]
            applied = sorted(sharing, key=lambda one: not one.plain)
            if sharing[0] is not part or applied[0] is not part:
                return (
                    f"{part.adapter.directory} is a DoRA, whose magnitudes belong to {name} and its own update: it has "
                    f"to be the first adapter, and {_other(merge, part, name)} "
                    f"{'comes before it' if sharing[0] is not part else 'is of another basis'}"
                )
    return None


def _other(merge: Merge, part: AdapterPart, name: str) -> str:
    return str(next(one.adapter.directory for one in merge.parts if one is not part and name in one.deltas))


def _mixed(names: Iterable[str], rotation: Rotation | None, merge: Merge) -> str | None:
    """Why these DoRAs of an unrotated model cannot run in a rotated one, or None."""
    for name in names:
        if rotation is None:
            return (
                "the frame is chosen by measurement, and DoRA does not go into every one (--rotate none keeps its own)"
            )
        if any(isinstance(fold, RotateOut) for fold in frame_folds(name, merge.description, rotation)):
            return f"the outputs of {name} are rotated, and DoRA's magnitudes belong to single outputs (--rotate none)"
    return None
