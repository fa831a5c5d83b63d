"""Fold an adapter into the float weights: W ← W + c B A; with DoRA, W ← diag(m / ‖W + c B A‖_row) (W + c B A)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from rqc.models.delta import Delta
from rqc.models.merges import AddDelta
from rqc.passes.base import AdapterPass, set_weight, weight_of
from rqc.runtime.errors import UnsupportedModelError

DONE = "rqc.fold"
"""Start of the metadata keys that tell which adapters a graph holds."""


class FoldAdapter(AdapterPass):
    """W ← W + sign · c B A for every weight in `deltas`, in float64, in the basis that the graph has at this point.

    Biases stay: neither LoRA nor DoRA touches them. sign −1 takes away what a base was quantized without (LoftQ
    quantizes W − E). The function changes on purpose. Source: LoRA (arXiv 2106.09685), DoRA (arXiv 2402.09353).
    """

    def __init__(self, deltas: Mapping[str, Delta], sign: float = 1.0) -> None:
        super().__init__(deltas)
        self.sign = sign

    @property
    def detail(self) -> str:
        """Added or taken away, how many linears, and the largest rank."""
        return f"{'+' if self.sign > 0 else '−'} {super().detail}"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        mark = f"{DONE}.{digest(self.deltas, self.sign)}"
        if mark in model.metadata_props or not self.deltas:
            return ir.passes.PassResult(model, modified=False)
        for name, delta in self.deltas.items():
            value = model.graph.initializers.get(name)
            weight = weight_of(value)
            if value is None or weight is None:
                raise UnsupportedModelError(
                    f"the adapter has a part for {name!r}, which the graph does not hold as floats",
                    hint="fold adapters before the weights are quantized",
                )
            set_weight(value, weight.folded(AddDelta(delta, self.sign)))
        model.metadata_props[mark] = "folded"
        return ir.passes.PassResult(model, modified=True)


def digest(deltas: Mapping[str, Delta], sign: float) -> str:
    """The identity of what is added, 16 hex digits of sha256 over names, factors and sign."""
    found = hashlib.sha256(f"{sign:+g}".encode())
    for name in sorted(deltas):
        delta = deltas[name]
        found.update(f"{name} {delta.scale!r}".encode())
        for part in (delta.a, delta.b, delta.magnitude):
            found.update(b"" if part is None else np.ascontiguousarray(part).tobytes())
    return found.hexdigest()[:16]
