"""The passes that lower a quantized graph to what TensorRT parses: standard operators, one float type, INT4 and INT8
codes behind DequantizeLinear."""

from __future__ import annotations

from rqc.compiler.recipe import Recipe
from rqc.compiler.targets.grids import token_grid
from rqc.models.description import Description
from rqc.passes.activations import QuantizeActivations
from rqc.passes.base import Pass
from rqc.passes.cleanup import RemoveDeadParts
from rqc.passes.float4 import StoreFloat4
from rqc.passes.float_type import CastFloats
from rqc.passes.pack_side_paths import PackSidePaths
from rqc.passes.positions import SelectPositions
from rqc.passes.scatter_cache import ScatterCache
from rqc.passes.static_activations import Measure, RecordRanges, StaticActivations
from rqc.passes.store_columns import StoreColumns
from rqc.passes.symmetric_codes import SymmetricCodes


def has_static_activations(recipe: Recipe) -> bool:
    """Whether activations have one scale per tensor, from the calibration text, as TensorRT's int8 product wants it."""
    return recipe.scheme.name == "w8a8"


def packing(recipe: Recipe, description: Description, measure: Measure | None = None) -> list[Pass]:
    """Codes as the builder reads them, and an adapter's side paths stacked; static ranges of activations first."""
    ranges: list[Pass] = [RecordRanges(measure)] if has_static_activations(recipe) and measure is not None else []
    codes: list[Pass] = [SymmetricCodes(), StoreColumns()] if recipe.scheme.quantized else []
    sides: list[Pass] = [PackSidePaths()] if recipe.adapter or recipe.compensate != "none" else []
    return [*ranges, *codes, *sides]


def by_blocks() -> list[Pass]:
    """What of the lowering a graph needs to be run block by block, or one block of it by itself."""
    return []


def lowering(recipe: Recipe) -> list[Pass]:
    """Caches of fixed size, logits where they are asked for, 4-bit floats, one float type."""
    floats: list[Pass] = [] if recipe.dtype in (None, "fp32") else [CastFloats(recipe.dtype)]
    float4: list[Pass] = [StoreFloat4()] if recipe.scheme.weights == "nvfp4" else []
    return [ScatterCache(), SelectPositions(), RemoveDeadParts(), *float4, *floats]


def ranges(recipe: Recipe, measure: Measure | None) -> list[Pass]:
    """Caches are floats."""
    return []


def activations(recipe: Recipe) -> list[Pass]:
    """One scale per tensor where integer products want it, per token elsewhere."""
    if has_static_activations(recipe):
        return [StaticActivations()]
    return [QuantizeActivations(token_grid(recipe))] if recipe.scheme.quantizes_activations else []
