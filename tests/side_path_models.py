"""Random updates for tiny models, their passes, and the models that have the updates in float weights instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from rqc.compiler.importer import Imported, import_model
from rqc.compiler.instruments import Instruments, probe_tokens
from rqc.compiler.passlist import passes_of
from rqc.compiler.probe import run_stage
from rqc.compiler.recipe import Recipe
from rqc.models.delta import Delta, row_norms
from rqc.models.description import Description
from rqc.models.grid import Grid, quantize
from rqc.models.rotation import Rotation
from rqc.passes.base import LINEAR, Pass, weight_of
from rqc.passes.pack_projections import PackProjections
from rqc.passes.pack_side_paths import PackSidePaths
from rqc.passes.quantize import QuantizeLinears
from rqc.passes.rotate import Rotate
from rqc.passes.tables import QuantizeTables

Deltas = dict[str, Delta]


def quantized_model(directory: Path, grid: Grid, sites: str = "none") -> Imported:
    """A model whose linears are on the grid, rotated or not, before anything is packed."""
    imported = import_model(directory)
    if sites != "none":
        Rotate(imported.description, Rotation.parse(sites))(imported.model)
    QuantizeLinears(imported.description, grid)(imported.model)
    return imported


def dense_deltas(
    description: Description, only: Iterable[str] | None = None, rank: int = 4, size: float = 0.01
) -> Deltas:
    """A LoRA-like update of every claimed linear but the routers; only: of these modules (their last name)."""
    generator = np.random.default_rng(0)
    found = {}
    for claim in description.claims:
        rows, width = description.shape(claim)
        a, b = generator.standard_normal((rank, width)), generator.standard_normal((rows, rank))
        if claim.quantized and (only is None or claim.weight.split(".")[-2] in set(only)):
            found[claim.weight] = Delta(a, size * b, 0.7)
    return found


def pooled_deltas(description: Description, block: int, only: Iterable[str] | None = None) -> Deltas:
    """Updates that are constant inside blocks of inputs."""
    return {
        name: replace(delta, a=np.repeat(delta.a[:, ::block], block, axis=1)[:, : delta.shape[1]])
        for name, delta in dense_deltas(description, only).items()
    }


def with_magnitudes(imported: Imported, deltas: Mapping[str, Delta]) -> Deltas:
    """The same updates as DoRAs, magnitudes around the row norms of the model's weights."""
    generator = np.random.default_rng(3)
    found = {}
    for name, delta in deltas.items():
        weight = weight_of(imported.model.graph.initializers[name])
        assert weight is not None
        norms = row_norms(weight.read())
        found[name] = replace(delta, magnitude=norms * generator.uniform(0.7, 1.4, len(norms)))
    return found


def updated_logits(directory: Path, deltas: Mapping[str, Delta], grid: Grid | None) -> np.ndarray:
    """Logits with Ŵ + ΔW (or DoRA's) as float weights, Ŵ on the grid, computed by numpy: no side path at all."""
    imported = import_model(directory)
    for claim in imported.description.claims:
        value = imported.model.graph.initializers[claim.weight]
        weight = weight_of(value)
        assert weight is not None
        w = weight.read()
        if claim.quantized and grid is not None:
            w = quantize(w, grid).dequantize().astype(np.float64)
        if claim.weight in deltas:
            w = deltas[claim.weight].merged(w)
        value.const_value = ir.tensor(w.astype(np.float32), name=value.name)
    return logits(imported.model)


def logits(model: ir.Model) -> np.ndarray:
    """A stage's logits on the probe."""
    return run_stage(model, probe_tokens(model), threads=1)


def steps(imported: Imported, merge: Pass | None, sites: str = "none", **options: object) -> list[Pass]:
    """The list of a compile, with `merge` behind the grids and side paths packed behind the projections.

    Tables stay in float: what is measured is the linears.
    """
    recipe = Recipe.from_values({"embedding_bits": 32, "head_bits": 32, **options})
    found: list[Pass] = []
    for step in passes_of(recipe, imported.description, Rotation.parse(sites)):
        found.append(step)
        if isinstance(step, QuantizeTables) and merge is not None:
            found.append(merge)
        if isinstance(step, PackProjections):
            found.append(PackSidePaths())
    return found


def lowered(
    imported: Imported, merge: Pass, sites: str = "none", *, measured: bool = True, **options: object
) -> ir.Model:
    """The graph behind all passes; each that claims to be exact was held to it, if `measured`."""
    Instruments(verify_each=measured).run(imported.model, steps(imported, merge, sites, **options))
    return imported.model


def linear_inputs(model: ir.Model) -> dict[str, ir.Value | None]:
    """What every linear of a graph, packed or not, reads, by its name."""
    nodes = [node for node in model.graph if LINEAR in node.metadata_props]
    return {name: node.inputs[0] for node in nodes for name in node.metadata_props[LINEAR].split("+")}
