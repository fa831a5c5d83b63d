"""Which options go with schemes whose weights are small floats, and which way out the others have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rqc.models.float_grid import FORMS
from rqc.runtime.errors import SchemeError

if TYPE_CHECKING:
    from rqc.compiler.recipe import Recipe


def check_floats(recipe: Recipe) -> None:
    """Raise SchemeError for options that have no meaning, or no implementation, for weights of small floats."""
    scheme = recipe.scheme
    if scheme.weights == "integer":
        return
    near = "w8a16" if scheme.weight_bits == 8 else "w4a16"
    if recipe.target == "onnx":
        raise SchemeError(
            f"--scheme {scheme} on onnx: ONNX Runtime has no fast kernel for weights of {scheme.weights} on a CPU",
            hint=f"--scheme {near}, or --target tensorrt-rtx",
        )
    group = FORMS[scheme.weights][1]
    if recipe.stated("group_size") and recipe.group_size != group:
        raise SchemeError(
            f"--group-size {recipe.group_size} with --scheme {scheme}, whose format has {_told(group)}",
            hint=f"--group-size {group}, or leave it out",
        )
    for asked, reason in _misfits(recipe):
        raise SchemeError(f"{asked} with --scheme {scheme}: {reason}", hint=f"--scheme {near}, or leave it out")


def _misfits(recipe: Recipe) -> list[tuple[str, str]]:
    """(option, why it does not go with weights of small floats)."""
    fitted = "codes are fitted to text on integer grids alone"
    every = (
        (not recipe.symmetric, "--asymmetric", "floats have no zero points"),
        (recipe.method == "gptq", "--method gptq", fitted),
        (recipe.compensate != "none", f"--compensate {recipe.compensate}", fitted),
        (recipe.sparsity != "none", f"--sparsity {recipe.sparsity}", fitted),
        (bool(recipe.layers), "layers", "all linears have one format"),
        (recipe.bits_budget is not None, "--bits-budget", "all linears have one format"),
        (recipe.merge == "zero-point", "--merge zero-point", "floats have no zero points"),
    )
    return [(asked, reason) for misfit, asked, reason in every if misfit]


def _told(group: int) -> str:
    return "one scale per output channel" if group == -1 else f"one scale per block of {group}"
