"""The passes that lower a quantized graph to ONNX Runtime on a CPU."""

from __future__ import annotations

from rqc.compiler.recipe import Recipe
from rqc.models.description import Description
from rqc.passes.activations import Int8Accumulation, QuantizeActivations
from rqc.passes.attention import FuseGroupQueryAttention
from rqc.passes.base import Pass
from rqc.passes.lower import FuseSkipNorm, RemoveDeadParts, SelectPositions, StoreHalf, TransposeInKernel
from rqc.passes.nibbles import SplitNibbles
from rqc.passes.pack import PackBlocks
from rqc.passes.pack_projections import PackProjections


def packing(recipe: Recipe, description: Description) -> list[Pass]:
    """From DequantizeLinear to the kernels' own form, then activations onto their grid: the last lossy step."""
    if not recipe.scheme.quantized:
        return [StoreHalf()] if recipe.scheme.float_type == "float16" else []
    passes: list[Pass] = [PackBlocks(), PackProjections(description)]
    if recipe.scheme.activation_bits == 8:
        return [*passes, Int8Accumulation()]
    passes.append(SplitNibbles())
    if recipe.scheme.quantizes_activations:
        passes.append(QuantizeActivations(recipe.scheme.activation_bits))
    return passes


def lowering() -> list[Pass]:
    """Fusions for the runtime; each is exact."""
    return [TransposeInKernel(), FuseGroupQueryAttention(), SelectPositions(), FuseSkipNorm(), RemoveDeadParts()]
