"""How an adapter goes into an engine: its frame, its grid and the way it is merged, decided before a weight is read.

An adapter that was trained in a basis brings that basis, one that was trained on a quantized base brings that grid;
what is asked for beside them must fit. Ways to merge (reference/adapters.md, sections 8 to 10): fold, W ← W + ΔW before
the grid; zero-point, z′ = z − D/s for an adapter that is constant in every block; branch, a low-rank path beside the
linear.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import onnx_ir as ir

from rqc.compiler.importer import Imported
from rqc.compiler.instruments import Progress
from rqc.compiler.recipe import Recipe
from rqc.compiler.scheme import SCHEMES
from rqc.compiler.survival import beside_survival, check_survival, fold_survival
from rqc.models.adapter import Adapter
from rqc.models.adapter_basis import AdapterBasis
from rqc.models.adapter_frames import frame_folds, to_frame, to_plain
from rqc.models.algebra import Read, RotateOut, dimensions
from rqc.models.delta import Delta
from rqc.models.description import Description
from rqc.models.grid import Grid
from rqc.models.rotation import Rotation
from rqc.passes.adapters import FoldAdapter
from rqc.passes.base import Pass
from rqc.passes.branches import AddBranches
from rqc.passes.zero_points import MergeZeroPoints
from rqc.runtime.errors import BasisMismatchError, SchemeError

FOLD, ZERO_POINT, BRANCH = "fold", "zero-point", "branch"
Deltas = Mapping[str, Delta]


@dataclass(frozen=True, eq=False)
class Merge:
    """What a compile does with an adapter.

    how: fold, zero-point or branch. plain: `deltas` are in the model's own basis, otherwise in that of the engine's
    frame. Linears that no grid rounds (a router, the head under an adapter of its own) take their part by folding,
    whatever `how` is.
    """

    adapter: Adapter
    how: str
    plain: bool
    deltas: Deltas
    description: Description
    read: Read
    _frames: dict[Rotation, Deltas] = field(default_factory=dict)

    @cached_property
    def folded(self) -> Deltas:
        """The part that is added to float weights."""
        return {name: delta for name, delta in self.deltas.items() if self.how == FOLD or not self._beside(name)}

    @cached_property
    def beside(self) -> Deltas:
        """The part that goes into zero points or branches."""
        return {name: delta for name, delta in self.deltas.items() if name not in self.folded}

    def before_frame(self) -> list[Pass]:
        """Passes in the model's own basis."""
        return [FoldAdapter(self.folded)] if self.plain and self.folded else []

    def after_frame(self) -> list[Pass]:
        """Passes in the engine's basis, before the grid: LoftQ's base is the grid of W − E."""
        residual = self.adapter.residual
        subtract: list[Pass] = [FoldAdapter(residual, -1.0)] if residual else []
        return [*subtract, *([FoldAdapter(self.folded)] if not self.plain and self.folded else [])]

    def after_grid(self, rotation: Rotation) -> list[Pass]:
        """Passes behind the grid; `rotation` is the frame, into which a plain adapter's branches are carried."""
        if not self.beside:
            return []
        deltas = self.in_frame(rotation)
        return [MergeZeroPoints(deltas) if self.how == ZERO_POINT else AddBranches(deltas)]

    def in_frame(self, rotation: Rotation) -> Deltas:
        """`beside` in the engine's basis; the same values each time."""
        if not self.plain or not rotation.sites:
            return self.beside
        if rotation not in self._frames:
            self._frames[rotation] = {
                name: to_frame(name, delta, self.description, rotation, self.read)
                for name, delta in self.beside.items()
            }
        return self._frames[rotation]

    def record(self, survival: Mapping[str, float]) -> dict[str, Any]:
        """What the manifest says of the adapter; survival is that of the linear in which least is left."""
        basis = self.adapter.basis
        return {
            "kind": self.adapter.kind,
            "merge": self.how,
            "survival": min(survival.values(), default=None),
            "modules": sorted({name.split(".", 3)[-1].removesuffix(".weight") for name in self.deltas}),
            "linears": len(self.deltas),
            "rank": max((delta.rank for delta in self.deltas.values()), default=0),
            "fingerprint": self.adapter.fingerprint,
            "basis": None if basis is None else basis.basis,
        }

    def _beside(self, name: str) -> bool:
        claim = self.description.by_weight.get(name)
        return claim is not None and claim.quantized


def open_adapter(recipe: Recipe, imported: Imported, progress: Progress) -> tuple[Recipe, Merge | None]:
    """The adapter that a recipe names, checked against the model, and the recipe with what the adapter brings along.

    Raises InputError (a damaged adapter, one of another base), BasisMismatchError (a basis that it cannot be carried
    into), SchemeError (a grid or a way to merge that does not fit), UnsupportedModelError (a kind that is not known).
    """
    if recipe.adapter is None:
        return recipe, None
    architecture = imported.description.architecture
    tied = architecture.tied and recipe.tied == "keep"
    description = replace(imported.description, architecture=replace(architecture, tied=tied))
    adapter = Adapter.open(recipe.adapter, description)
    adapter.check(description, imported.checkpoint.fingerprint())
    if adapter.basis is not None:
        recipe = _on_grid(_in_basis(recipe, adapter.basis), adapter.basis, progress)
    read = imported.checkpoint.read
    deltas, plain = _carried(recipe, adapter, description, read)
    merge = Merge(adapter, recipe.merge, plain, deltas, description, read)
    merge = replace(merge, how=_way(recipe, merge))
    progress.line(f"adapter: {adapter.kind}, {len(deltas)} linears, merged by {merge.how}")
    trained = 16 if adapter.basis is None else adapter.basis.activations
    if trained not in (16, recipe.scheme.activation_bits):
        progress.line(f"the adapter was trained with {trained}-bit activations, --scheme {recipe.scheme} has others")
    return recipe, merge


def _in_basis(recipe: Recipe, basis: AdapterBasis) -> Recipe:
    """The recipe in the adapter's rotation, but for what of it was asked for by name."""
    rotation = basis.rotation
    sites = recipe.rotate if recipe.rotate != "auto" else rotation.sites
    return replace(
        recipe,
        rotate=sites,
        hadamard=recipe.hadamard if recipe.stated("hadamard") else rotation.hadamard,
        rotation_seed=recipe.rotation_seed if recipe.stated("rotation_seed") else rotation.seed,
    )


def _on_grid(recipe: Recipe, basis: AdapterBasis, progress: Progress) -> Recipe:
    """The recipe on the grid that the adapter was trained on. Raises SchemeError where something else was asked for."""
    if basis.base_kind == "nf4":
        raise SchemeError(
            "the adapter was trained on an NF4 base, a grid that no engine has",
            hint="rqc finetune --base w4 trains it on a grid that engines have",
        )
    grid = basis.grid
    if grid is None:
        return recipe
    if not recipe.stated("scheme") and recipe.scheme.weight_bits != grid.bits:
        recipe = replace(recipe, scheme=SCHEMES[f"w{grid.bits}a16"])
        progress.line(f"scheme {recipe.scheme}: the adapter was trained on a base of {grid.bits} bits")
    if recipe.scheme.weight_bits != grid.bits:
        fitting = ", ".join(name for name, scheme in SCHEMES.items() if scheme.weight_bits == grid.bits)
        raise SchemeError(
            f"--scheme {recipe.scheme} has weights of {recipe.scheme.weight_bits} bits, the adapter was trained on a "
            f"base of {grid.bits}",
            hint=f"--scheme {fitting.replace(', ', ' or ')}",
        )
    brought: dict[str, Any] = {"group_size": grid.group_size, "symmetric": grid.symmetric, "clip": grid.clip}
    for name, value in brought.items():
        if recipe.stated(name) and getattr(recipe, name) != value:
            raise SchemeError(
                f"{_flag(name, getattr(recipe, name))} was asked for, "
                f"the adapter was trained with {_flag(name, value)}",
                hint="leave the option out: the adapter brings its grid along",
            )
    return replace(recipe, **brought)


def _flag(name: str, value: Any) -> str:
    if name == "symmetric":
        return "--symmetric" if value else "--asymmetric"
    return f"--{name.replace('_', '-')} {value}"


def _carried(recipe: Recipe, adapter: Adapter, description: Description, read: Read) -> tuple[Deltas, bool]:
    """The adapter's deltas and whether they are in the model's own basis rather than in that of the frame.

    Raises BasisMismatchError for an adapter that has no counterpart in the basis asked for.
    """
    basis, rotation = adapter.basis, recipe.rotation
    if basis is None:
        return adapter.deltas, True
    assert rotation is not None  # `_in_basis` set it
    wanted = rotation.basis(dimensions(description)) if rotation.sites else None
    if wanted == basis.basis:
        return adapter.deltas, False
    if (obstacle := _bound(adapter)) is not None:
        raise BasisMismatchError(
            f"the adapter was trained in basis {_short(basis.basis)} ({basis.rotation}), "
            f"--rotate {rotation} asks for {_short(wanted)}: {obstacle}",
            hint="leave --rotate, --hadamard and --rotation-seed out: the adapter brings its basis along",
        )
    return {n: to_plain(n, d, description, basis.rotation, read) for n, d in adapter.deltas.items()}, True


def _bound(adapter: Adapter) -> str | None:
    """Why an adapter cannot leave its basis, if it cannot."""
    assert adapter.basis is not None
    if adapter.basis.base_kind != "float":
        return "it corrects weights that were rounded in that basis"
    if adapter.kind in ("qalora", "qahira"):
        return "a pooled adapter cannot be carried through a rotation"
    return None


def _way(recipe: Recipe, merge: Merge) -> str:
    """The way to merge. Raises SchemeError, with the ways that work, for one that does not."""
    grid = None if merge.adapter.basis is None else merge.adapter.basis.grid
    if merge.how == "auto":
        if grid is None:
            return FOLD
        return ZERO_POINT if obstacle(ZERO_POINT, recipe, merge) is None else BRANCH
    reason = obstacle(merge.how, recipe, merge)
    if reason is not None:
        raise SchemeError(f"--merge {merge.how}: {reason}", hint=ways_text(recipe, merge))
    return merge.how


def ways_text(recipe: Recipe, merge: Merge) -> str:
    """The other ways that are open to this adapter, as flags."""
    ways = [way for way in (FOLD, ZERO_POINT, BRANCH) if way != merge.how and obstacle(way, recipe, merge) is None]
    return " or ".join(f"--merge {way}" for way in ways) or "training it anew"


def obstacle(how: str, recipe: Recipe, merge: Merge) -> str | None:
    """Why an adapter cannot be merged that way, or None."""
    if how == FOLD:
        repaired = "the adapter repairs the rounding of its base (LoftQ), which is not there in the float weights"
        return repaired if merge.adapter.residual else None
    turned = merge.plain and (recipe.rotation is None or bool(recipe.rotation.sites))
    dora = [name for name, delta in merge.deltas.items() if delta.magnitude is not None]
    if dora and not recipe.scheme.quantized:
        return f"a DoRA scales the rows of a grid, --scheme {recipe.scheme} has none"
    if how == BRANCH:
        return _mixed(dora, recipe.rotation, merge) if turned else None
    if not recipe.scheme.quantized:
        return f"--scheme {recipe.scheme} has no zero points"
    if turned:
        return "a pooled adapter cannot be carried into a rotated basis (--rotate none keeps its own)"
    grid = Grid(recipe.scheme.weight_bits, recipe.group_size, recipe.symmetric, recipe.clip)
    for name, delta in merge.deltas.items():
        claim = merge.description.by_weight.get(name)
        if claim is not None and claim.quantized:
            block = grid.block(delta.a.shape[1])
            if delta.pooled(block) is None:
                return f"the adapter of {name} is not constant in blocks of {block} inputs"
    return None


def survival_of(
    model: ir.Model, merge: Merge, recipe: Recipe, rotation: Rotation, progress: Progress
) -> dict[str, float]:
    """What is left of the adapter in each linear of a lowered graph. Raises ParityError below the recipe's least."""
    found = fold_survival(model, merge.folded, progress) | beside_survival(model, merge.in_frame(rotation))
    survival = {name: found[name] for name in merge.deltas}
    check_survival(survival, recipe.min_survival, ways_text(recipe, merge))
    return survival


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


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]
