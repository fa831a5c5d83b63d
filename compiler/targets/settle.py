"""A recipe on its target: what the target wants by default, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

from rqc.compiler.adapters.merge import Merge
from rqc.compiler.recipe import Recipe
from rqc.compiler.widths import linear_grid
from rqc.models.description import Architecture
from rqc.models.grid import STORAGE_BITS
from rqc.runtime.capabilities import KINDS, STORED, checked_sms, default_sms
from rqc.runtime.errors import InputError, SchemeError

TYPES = {"fp32": ("fp32",), "fp16": ("fp16",)}
"""Float types of the schemes that are named by one."""


def settled(recipe: Recipe, architecture: Architecture, merge: Merge | None) -> Recipe:
    """The recipe with its target's defaults for what was left open.

    On TensorRT floats are fp16, scales positive (unless an adapter was trained on another grid), and 8-bit codes have
    one scale per channel. Raises TargetError, SchemeError or InputError for what the target does not run.
    """
    if recipe.target == "onnx":
        _refuse_tensorrt_options(recipe)
        return recipe
    _refuse_quantized_cache(recipe)
    profile = recipe.profile
    if profile is not None:
        profile.check(architecture.context_length)
    return replace(
        recipe,
        dtype=_dtype(recipe),
        group_size=_group_size(recipe),
        positive=merge is None or all(_floats(part.adapter.basis) for part in merge.parts),
        sm=checked_sms(recipe.target, recipe.sm, _kinds(recipe)),
    )


def narrowed(recipe: Recipe) -> str | None:
    """Why a settled recipe that named no compute capabilities has fewer than the usual ones; None where it has all."""
    kinds = _kinds(recipe)
    if recipe.target != "tensorrt-rtx" or default_sms(kinds) == default_sms(()):
        return None
    told = " and ".join(STORED[kind] for kind in sorted(kinds))
    return f"sm {','.join(map(str, recipe.sm))}: TensorRT-RTX has {told} on no older ones"


def _kinds(recipe: Recipe) -> frozenset[str]:
    """How the linears are stored, of what not every GPU computes with."""
    if recipe.scheme.small_floats:
        return frozenset({KINDS[recipe.scheme.weights]})
    widths = (recipe.scheme.weight_bits, *(rule.bits for rule in recipe.layers))
    return frozenset({"int4"} if min(widths) <= 4 else set())


def _refuse_tensorrt_options(recipe: Recipe) -> None:
    for name in ("dtype", "sm", "profile", "portable"):
        if recipe.stated(name):
            raise InputError(
                f"--{name} is for TensorRT, the target is onnx", hint="--target tensorrt-rtx, or leave it out"
            )


def _refuse_quantized_cache(recipe: Recipe) -> None:
    if recipe.kv_cache != "float":
        raise SchemeError(
            f"--kv-cache {recipe.kv_cache} on {recipe.target}: its attention and its in-place caches take floats alone",
            hint="--kv-cache float, or --target onnx",
        )


def _floats(basis: object) -> bool:
    """Whether an adapter was trained on float weights."""
    return getattr(basis, "grid", None) is None


def _dtype(recipe: Recipe) -> str:
    allowed = TYPES.get(recipe.scheme.name, ("fp16", "bf16", "fp32"))
    dtype = recipe.dtype or allowed[0]
    if dtype not in allowed:
        raise SchemeError(
            f"--scheme {recipe.scheme} computed in {dtype}", hint=f"leave --dtype out, it is {allowed[0]}"
        )
    return dtype


def _group_size(recipe: Recipe) -> int:
    bits = recipe.scheme.weight_bits
    if recipe.scheme.weights != "integer":
        return linear_grid(recipe).group_size
    if not recipe.scheme.quantized or STORAGE_BITS[bits] < 8:
        return recipe.group_size
    if recipe.stated("group_size") and recipe.group_size != -1:
        raise SchemeError(
            f"--group-size {recipe.group_size} with --scheme {recipe.scheme} on {recipe.target}: TensorRT runs 8-bit "
            "codes with one scale per channel",
            hint="--group-size -1, or leave it out",
        )
    return -1
