"""Which widths a target runs beside each other, and which of them a budget of bits may choose from."""

from __future__ import annotations

from rqc.compiler.recipe import Recipe
from rqc.models.description import Description
from rqc.models.grid import STORAGE_BITS, Grid
from rqc.runtime.errors import SchemeError

FLOAT_BLOCKS = (16, 256)
"""Blocks of 2-bit codes for which MatMulNBits computes in floats, without a word, where it is told to round activations
to 8 bits. ONNX Runtime 1.31.1 on x86-64, by trial."""


def budget_widths(recipe: Recipe) -> tuple[int, ...]:
    """Widths whose codes take as many bits in the engine: TensorRT stores 2 bits in 4."""
    return (2, 4, 8) if recipe.target == "onnx" else (4, 8)


def check_layer_bits(recipe: Recipe, description: Description) -> None:
    """Raise SchemeError, naming a linear, where a recipe's widths are not what its target runs."""
    widths = {claim.weight: recipe.widths.get(claim.weight) for claim in description.claims if claim.quantized}
    for name, bits in widths.items():
        if bits is None:
            continue
        obstacle = _kernel(recipe, name, bits, description) if recipe.target == "onnx" else _tensorrt(recipe, bits)
        if obstacle is not None:
            raise SchemeError(f"{name} with {bits} bits: {obstacle[0]}", hint=obstacle[1])


def check_budget_range(recipe: Recipe) -> None:
    """Raise SchemeError where a recipe's budget, if it has one, is not what its target's widths can fill."""
    budget, widths = recipe.bits_budget, budget_widths(recipe)
    if budget is None:
        return
    if not widths[0] <= budget <= widths[-1]:
        raise SchemeError(
            f"--bits-budget {budget:g} on {recipe.target}, whose widths are {', '.join(map(str, widths))}",
            hint=f"an average from {widths[0]} to {widths[-1]}",
        )
    if recipe.target != "onnx" and recipe.group_size != -1:
        raise SchemeError(
            f"--bits-budget with --group-size {recipe.group_size} on {recipe.target}: TensorRT runs 8-bit codes with "
            "one scale per channel",
            hint="--group-size -1, or --target onnx",
        )


def _kernel(recipe: Recipe, name: str, bits: int, description: Description) -> tuple[str, str] | None:
    """Why MatMulNBits does not round activations in front of this width, and the way out."""
    may_be_2 = bits == 2 or recipe.bits_budget is not None
    if recipe.scheme.activation_bits != 8 or not may_be_2:
        return None
    width = description.shape(description.by_weight[name])[1]
    block = Grid(2, recipe.group_size).block(width)
    if block not in FLOAT_BLOCKS:
        return None
    why = f"2 bits in blocks of {block} leave activations in floats, --scheme {recipe.scheme} has them in 8 bits"
    return why, "--group-size 32, 64 or 128, or --scheme w4a16"


def _tensorrt(recipe: Recipe, bits: int) -> tuple[str, str] | None:
    """Why TensorRT does not run a width, and the way out."""
    if STORAGE_BITS[bits] == 8 and recipe.group_size != -1:
        return f"TensorRT runs 8-bit codes with one scale per channel, groups have {recipe.group_size}", (
            "--group-size -1, or at most 4 bits"
        )
    if recipe.scheme.name == "w8a8" and STORAGE_BITS[bits] == 4:
        return "activations with static scales and weights in blocks are built wrongly without a word", (
            "--scheme w8a16, or 8 bits"
        )
    return None
