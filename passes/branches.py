"""Keep a dense adapter beside the linear: y ← y + (x Aᵀ)(c B)ᵀ in float32."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from rqc.models.delta import Delta
from rqc.models.quantized import LazyQuantized, Update
from rqc.passes.base import ADAPTER, BRANCH_A, BRANCH_B, AdapterPass
from rqc.passes.quantize import quantize_again
from rqc.passes.side_paths import F32, addressed, dequantize_of, join, lazy_of, product, side_tensor, updated
from rqc.runtime.errors import InputError, SchemeError


@dataclass(frozen=True, eq=False)
class Branch:
    """A linear's low-rank path: its delta, and the quantized weight whose rows (from `first_row` on) it runs beside,
    if that has DoRA factors. coded: its factors may be stored as codes."""

    delta: Delta
    base: LazyQuantized | None = None
    first_row: int = 0
    coded: bool = False

    @property
    def rows(self) -> int:
        """Outputs."""
        return self.delta.shape[0]

    def a(self) -> F32:
        """Aᵀ [in, r]."""
        return _cast(self.delta.a.T)

    def b(self) -> F32:
        """(c B)ᵀ [r, out], each column times its m / n if it is a DoRA."""
        b = self.delta.scale * self.delta.b
        if self.base is not None:
            b = b * self.base.adapted().factors[self.first_row : self.first_row + self.rows, None]
        return _cast(b.T)


def _cast(factor: NDArray[np.float64]) -> F32:
    with np.errstate(over="ignore"):  # told below
        cast = factor.astype(np.float32)
    if not np.isfinite(cast).all():
        raise InputError("the update is not finite (NaN, infinity or beyond float32)", hint="train the adapter anew")
    return cast


def branches_of(node: ir.Node) -> tuple[Branch, ...]:
    """The branches whose factors a product of a branch (x Aᵀ or t Bᵀ) holds."""
    factor = node.inputs[1]
    assert factor is not None
    assert factor.const_value is not None
    found: tuple[Branch, ...] = factor.const_value.meta[ADAPTER]
    return found


class AddBranches(AdapterPass):
    """y ← y + (x Aᵀ)(c B)ᵀ beside every linear in `deltas`; x is what the linear reads, rotated online or not.

    DoRA on a quantized base: with n = ‖Ŵ + c B A‖_row, s ← s m/n and B ← diag(m/n) B, which is exact. The function
    changes by the adapter, on purpose. Sources: LoRA (arXiv 2106.09685), DoRA (arXiv 2402.09353).

    What makes up for the error of a quantized weight is such a branch too, of no adapter but the engine's own. coded:
    the weights whose factors may be stored as codes.
    """

    def __init__(self, deltas: Mapping[str, Delta], coded: Collection[str] = ()) -> None:
        super().__init__(deltas)
        self.coded = coded

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        present = {node.metadata_props[BRANCH_A]: node for node in model.graph if BRANCH_A in node.metadata_props}
        modified = False
        for name, node, delta in addressed(model, self.deltas):
            if name not in present:
                _add(model, node, name, Branch(delta, _scaled(model, node, name, delta), coded=name in self.coded))
                modified = True
            elif branches_of(present[name])[0].delta is not delta:
                raise SchemeError(f"{name} has a branch of another adapter", hint="add the factors of both in one pass")
        return ir.passes.PassResult(model, modified=modified)


def _scaled(model: ir.Model, node: ir.Node, name: str, delta: Delta) -> LazyQuantized | None:
    """The quantized weight with its rows scaled, for a DoRA; None for any other delta."""
    if delta.magnitude is None:
        return None
    dequantize = dequantize_of(node)
    if dequantize is None:
        raise SchemeError(f"a DoRA beside {name}, which is stored as floats", hint="--merge fold")
    scaled = updated(name, lazy_of(dequantize), Update(delta, pooled=False))
    quantize_again(model, dequantize, scaled)
    return scaled


def _add(model: ir.Model, node: ir.Node, name: str, branch: Branch) -> None:
    x = node.inputs[0]
    assert x is not None
    scope = f"{name.removesuffix('.weight')}/branch"
    rows, width = branch.delta.shape
    a = side_tensor(model, f"{name}.branch_a", (width, branch.delta.rank), branch.a, (branch,), None)
    b = side_tensor(model, f"{name}.branch_b", (branch.delta.rank, rows), branch.b, (branch,), branch.base)
    down = product(x, a, f"{scope}/a", BRANCH_A, name)
    up = product(down.outputs[0], b, f"{scope}/b", BRANCH_B, name)
    join(node, [down, up], up.outputs[0], scope)
