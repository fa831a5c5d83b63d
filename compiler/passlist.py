"""THE list: every pass of a compile, in order, per target."""

from __future__ import annotations

from rqc.compiler.adapters.merge import Merge
from rqc.compiler.calibration.findings import Findings
from rqc.compiler.recipe import Recipe
from rqc.compiler.targets import onnx, tensorrt
from rqc.compiler.widths import linear_grid, table_grid_of, table_widths
from rqc.models.description import Description
from rqc.models.rotation import Rotation
from rqc.passes.base import Pass
from rqc.passes.branches import AddBranches
from rqc.passes.clips import RecordClips
from rqc.passes.norms import FuseNormGains
from rqc.passes.quantize import QuantizeLinears
from rqc.passes.rotate import Rotate
from rqc.passes.static_activations import Measure
from rqc.passes.tables import QuantizeTables
from rqc.passes.ties import Untie


def passes_of(
    recipe: Recipe,
    description: Description,
    rotation: Rotation,
    merge: Merge | None = None,
    measure: Measure | None = None,
    findings: Findings | None = None,
) -> list[Pass]:
    """THE list: exact folds with their online halves, the lossy grid, the adapter where it belongs, the kernels' form,
    the target's fusions, activations. measure: how ranges are found, of activations where a scheme has static ones, and
    of a cache in codes."""
    target = onnx if recipe.target == "onnx" else tensorrt
    return [
        *frame(recipe, description, rotation, merge),
        *grids(recipe, description, findings),
        *([] if merge is None else merge.after_grid(rotation)),
        *target.ranges(recipe, measure),
        *target.packing(recipe, description, measure),
        *([] if merge is None else merge.after_packing()),
        *target.lowering(recipe),
        *target.activations(recipe),
    ]


def frame(recipe: Recipe, description: Description, rotation: Rotation, merge: Merge | None = None) -> list[Pass]:
    """The basis in which the model is quantized. Norm gains are folded only where R1 needs them out of its way.

    An adapter is folded in its own basis: before the rotation, or behind it. Clip ratios that were searched in it are
    marked.
    """
    before, after = ([], []) if merge is None else (merge.before_frame(), merge.after_frame())
    untie: list[Pass] = [Untie()] if recipe.tied == "untie" and description.architecture.tied else []
    norms: list[Pass] = [FuseNormGains(description)] if "r1" in rotation.sites else []
    rotate: list[Pass] = [Rotate(description, rotation)] if rotation.sites else []
    clips: list[Pass] = [RecordClips(recipe.clips)] if recipe.clips else []
    return [*untie, *before, *norms, *rotate, *after, *clips]


def grids(recipe: Recipe, description: Description, findings: Findings | None = None) -> list[Pass]:
    """Weights onto their block grids, with what calibration has found; embedding and head onto theirs."""
    if not recipe.scheme.quantized:
        return []
    a = description.architecture
    embedding, head = (
        table_grid_of(recipe, bits, a.hidden_size) if bits < 16 else None for bits in table_widths(recipe, a).values()
    )
    found = None if findings is None else findings.found
    beside: list[Pass] = []
    if findings is not None and findings.deltas:
        beside = [AddBranches(findings.deltas, findings.coded)]
    return [
        QuantizeLinears(description, linear_grid(recipe), recipe.widths, found),
        *beside,
        QuantizeTables(embedding, head),
    ]
