"""The basis and the grid that adapters bring along: what they make of a recipe, and whether they fit together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rqc.compiler.instruments import Progress
from rqc.compiler.recipe import Recipe
from rqc.compiler.scheme import SCHEMES, Scheme
from rqc.models.adapter import Adapter
from rqc.models.adapter_basis import MERGED_POOLS, AdapterBasis
from rqc.models.grid import Grid
from rqc.models.rotation_file import RotationFile
from rqc.runtime.errors import BasisMismatchError, InputError, SchemeError


def bound(adapter: Adapter) -> str | None:
    """Why an adapter cannot leave its basis, if it cannot."""
    if adapter.basis is None:
        return None
    if adapter.basis.base_kind != "float":
        return "it corrects weights that were rounded in that basis"
    if adapter.kind in MERGED_POOLS:
        return "a pooled adapter cannot be carried through a rotation"
    return None


def leading(adapters: Sequence[Adapter]) -> Adapter | None:
    """The adapter whose basis counts: the first that cannot leave its own, else the first that has one."""
    having = [adapter for adapter in adapters if adapter.basis is not None]
    return next((adapter for adapter in having if bound(adapter) is not None), having[0] if having else None)


def check_together(adapters: Sequence[Adapter], *, switchable: bool) -> None:
    """Refuse adapters that no engine can hold at once, by the names of two that do not fit.

    Raises InputError for one that is given twice, SchemeError for grids that differ and for one that repairs the
    rounding of its own, BasisMismatchError for bases that cannot be left.
    """
    for place, adapter in enumerate(adapters):
        for other in adapters[:place]:
            _check_pair(other, adapter, switchable)
    repairs = [adapter for adapter in adapters if adapter.repaired]
    if repairs and (switchable or len(adapters) > 1):
        raise SchemeError(
            f"{repairs[0].directory} repairs the rounding of a base of its own (LoftQ, EoRA), which is not the base of "
            "any other adapter, nor of the model alone",
            hint="give it alone and without a name",
        )


def _check_pair(one: Adapter, other: Adapter, switchable: bool) -> None:
    if one.fingerprint == other.fingerprint and not switchable:
        raise InputError(
            f"{one.directory} and {other.directory} are the same adapter", hint="give each adapter once, or names"
        )
    if one.basis is None or other.basis is None:
        return
    grids = one.basis.grid, other.basis.grid
    if None not in grids and grids[0] != grids[1]:
        raise SchemeError(
            f"{one.directory} was trained on the grid {_grid_text(grids[0])}, "
            f"{other.directory} on {_grid_text(grids[1])}",
            hint="one engine has one grid: train them on the same, or compile an engine for each",
        )
    reasons = bound(one), bound(other)
    if None not in reasons and one.basis.basis != other.basis.basis:
        raise BasisMismatchError(
            f"{one.directory} was trained in basis {short(one.basis.basis)} ({one.basis.rotation}), {other.directory} "
            f"in {short(other.basis.basis)} ({other.basis.rotation}), and neither can leave its own: {reasons[1]}",
            hint="one engine has one basis: train them in the same, or compile an engine for each",
        )


def _grid_text(grid: Grid | None) -> str:
    assert grid is not None
    kind = "symmetric" if grid.symmetric else "asymmetric"
    return f"{grid.bits} bits in groups of {grid.group_size}, {kind}, clip {grid.clip}"


def in_basis(recipe: Recipe, basis: AdapterBasis) -> Recipe:
    """The recipe in the adapter's rotation, but for what of it was asked for by name."""
    if recipe.rotation_file is not None:
        return recipe
    rotation = basis.rotation
    sites = recipe.rotate if recipe.rotate != "auto" else rotation.sites
    made = recipe.stated("hadamard") or recipe.stated("rotation_seed")
    return replace(
        recipe,
        rotate=sites,
        hadamard=recipe.hadamard if recipe.stated("hadamard") else rotation.hadamard,
        rotation_seed=recipe.rotation_seed if recipe.stated("rotation_seed") else rotation.seed,
        rotation_file=None if made or rotation.learned is None else RotationFile(rotation, basis.base),
    )


def on_grid(recipe: Recipe, adapters: Sequence[Adapter], progress: Progress) -> Recipe:
    """The recipe on the grid that the adapters were trained on, if on one. Raises SchemeError where something else was
    asked for."""
    for adapter in adapters:
        if adapter.basis is not None and adapter.basis.base_kind == "nf4":
            raise SchemeError(
                f"{adapter.directory} was trained on an NF4 base, a grid that no engine has",
                hint="rqc finetune --base w4 trains it on a grid that engines have",
            )
    bases = [adapter.basis for adapter in adapters if adapter.basis is not None]
    grid = next((basis.grid for basis in bases if basis.grid is not None), None)
    scheme = _trained_scheme(recipe.scheme, grid, min((basis.activations for basis in bases), default=16))
    if not recipe.stated("scheme") and recipe.scheme != scheme:
        recipe = replace(recipe, scheme=scheme)
        progress.line(f"scheme {scheme}: the adapter was trained for it")
    if grid is None:
        return recipe
    if recipe.scheme.small_floats or recipe.scheme.weight_bits != grid.bits:
        whole = (scheme for scheme in SCHEMES.values() if not scheme.small_floats)
        fitting = ", ".join(scheme.name for scheme in whole if scheme.weight_bits == grid.bits)
        what = f"of {recipe.scheme.weight_bits} bits" if not recipe.scheme.small_floats else "of floats"
        raise SchemeError(
            f"--scheme {recipe.scheme} has weights {what}, the adapter was trained on a base of {grid.bits} bits",
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
    if recipe.layers or recipe.bits_budget is not None:
        asked = "layers" if recipe.layers else "--bits-budget"
        raise SchemeError(
            f"{asked} with an adapter that was trained on a base of {grid.bits} bits, all of it",
            hint="leave it out: the adapter brings its grid along",
        )
    return replace(recipe, **brought)


def _trained_scheme(default: Scheme, grid: Grid | None, activations: int) -> Scheme:
    """The scheme whose arithmetic the training saw: the default, unless weights or activations have other bits."""
    bits = grid.bits if grid is not None else 6 if activations == 6 else default.weight_bits
    if f"w{bits}a{activations}" in SCHEMES and activations < 16:
        return SCHEMES[f"w{bits}a{activations}"]
    return default if bits == default.weight_bits else SCHEMES[f"w{bits}a16"]


def _flag(name: str, value: Any) -> str:
    if name == "symmetric":
        return "--symmetric" if value else "--asymmetric"
    return f"--{name.replace('_', '-')} {value}"


def short(digest: str | None) -> str:
    """The start of a hash, as messages have it."""
    return "none" if digest is None else digest[:12]
