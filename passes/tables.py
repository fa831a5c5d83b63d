"""Quantize the two ends: embedding and head, one table where they are tied."""

from __future__ import annotations

import onnx_ir as ir

from rqc.models.description import EMBEDDING, HEAD
from rqc.models.grid import Grid
from rqc.models.quantized import LazyQuantized
from rqc.passes.base import Pass, weight_of
from rqc.passes.quantize import dequantize_before_use, told
from rqc.passes.ties import is_tied


class QuantizeTables(Pass):
    """E ← (codes − z) s for the embedding, and the head; one table when they are tied. None leaves that end in
    float."""

    exact = False

    def __init__(self, embedding: Grid | None, head: Grid | None) -> None:
        super().__init__()
        self.grids = {EMBEDDING: embedding, HEAD: head}

    @property
    def detail(self) -> str:
        """The grids of both ends."""
        return "; ".join(f"{name.split('.')[-2]} {told(grid)}" for name, grid in self.grids.items())

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        tied = is_tied(model)
        for name, grid in self.grids.items():
            value = model.graph.initializers.get(name)
            weight = weight_of(value)
            if value is None or weight is None or grid is None or (tied and name == HEAD):
                continue
            dequantize_before_use(model, value, LazyQuantized((weight,), grid))
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def table_grid(bits: int, hidden_size: int, group_size: int, symmetric: bool, clip: str) -> Grid | None:
    """The grid of an embedding or head: the wanted group, or the largest one below that divides the hidden size.

    A gather reads whole rows, so its blocks cannot be padded (a padded row would come out wider). None if no block
    divides.
    """
    wanted = 256 if group_size == -1 else group_size
    for block in (256, 128, 64, 32, 16):
        if block <= wanted and hidden_size % block == 0:
            return Grid(bits, block, symmetric, "mse" if clip == "mse" else "none")
    return None
