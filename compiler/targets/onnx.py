"""The passes that lower a quantized graph to ONNX Runtime on a CPU."""

from __future__ import annotations

from rqc.compiler.recipe import Recipe
from rqc.compiler.targets.grids import token_grid
from rqc.compiler.widths import table_widths
from rqc.models.description import Description
from rqc.passes.accumulation import Int8Accumulation
from rqc.passes.activations import QuantizeActivations
from rqc.passes.attention import FuseGroupQueryAttention
from rqc.passes.base import Pass
from rqc.passes.branch_codes import CodeBranches
from rqc.passes.cache_ranges import RecordCacheRanges, RecordKeyMeans
from rqc.passes.cleanup import RemoveDeadParts
from rqc.passes.half import StoreHalf
from rqc.passes.int8_cache import Int8Cache
from rqc.passes.nibbles import SplitNibbles
from rqc.passes.opset import StampOpset
from rqc.passes.pack import PackBlocks
from rqc.passes.pack_projections import PackProjections
from rqc.passes.pack_side_paths import PackSidePaths
from rqc.passes.positions import SelectPositions
from rqc.passes.skip_norm import FuseSkipNorm
from rqc.passes.static_activations import Measure
from rqc.passes.token_cache import TokenCache
from rqc.passes.transpose import TransposeInKernel


def packing(recipe: Recipe, description: Description, measure: Measure | None = None) -> list[Pass]:
    """From DequantizeLinear to the kernels' own form, floats to the width asked for. Float accumulation reads 8-bit
    codes as nibble planes. Side paths are packed with the linears that they run beside; what makes up for rounding is
    stored as codes."""
    widths = table_widths(recipe, description.architecture)
    half = recipe.scheme.float_type == "float16"
    floats: list[Pass] = [StoreHalf(widths, rest=half)] if half or 16 in widths.values() else []
    beside = bool(recipe.adapter) or recipe.compensate != "none"
    sides: list[Pass] = [PackSidePaths(), CodeBranches()] if beside else []
    if not recipe.scheme.quantized:
        return [*sides, *floats]
    planes = [] if recipe.scheme.activation_bits == 8 else [SplitNibbles()]
    return [PackBlocks(), PackProjections(description), *sides, *planes, *floats]


def by_blocks() -> list[Pass]:
    """What of the lowering a graph needs to be run block by block, or one block of it by itself."""
    return [TransposeInKernel()]


def lowering(recipe: Recipe) -> list[Pass]:
    """Fusions for the runtime, each of them exact, and what they leave for the cache's grid."""
    return [
        TransposeInKernel(),
        *([] if recipe.kv_cache == "int4" else [FuseGroupQueryAttention()]),
        SelectPositions(),
        FuseSkipNorm(),
        *cache(recipe),
        RemoveDeadParts(),
        StampOpset(),
    ]


def ranges(recipe: Recipe, measure: Measure | None) -> list[Pass]:
    """What the cache's grid takes from the calibration text. In front of the packing: in the kernels' form a graph with
    8-bit codes runs slowly."""
    if measure is None or recipe.kv_cache == "float":
        return []
    return [RecordCacheRanges(measure) if recipe.kv_cache == "int8" else RecordKeyMeans(measure)]


def cache(recipe: Recipe) -> list[Pass]:
    """Keys and values onto their grid: by the attention's kernel where it can, in steps of the graph elsewhere."""
    if recipe.kv_cache == "int8":
        return [Int8Cache(), TokenCache(8)]
    return [TokenCache(4)] if recipe.kv_cache == "int4" else []


def activations(recipe: Recipe) -> list[Pass]:
    """Activations onto their grid. Last of all: behind it no pass could be measured, since rounding amplifies any last
    bit."""
    if recipe.scheme.activation_bits == 8:
        return [Int8Accumulation()]
    return [QuantizeActivations(token_grid(recipe))] if recipe.scheme.quantizes_activations else []
