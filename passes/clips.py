"""Clip ratios of activations that are rounded per token, as marks on the linears that read them."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from rqc.passes.base import CLIP, Pass, linears


class RecordClips(Pass):
    """Marks linears with the clip ratios of what they read, by weight name; nothing is computed otherwise.

    `QuantizeActivations` rounds by them: a dumped graph, and a block cut out of one, has them with it.
    """

    def __init__(self, ratios: Mapping[str, float]) -> None:
        super().__init__()
        self.ratios = dict(ratios)

    @property
    def detail(self) -> str:
        """How many linears, and their ratios."""
        found = sorted(self.ratios.values())
        return f"{len(found)} linears, {found[0]:g} to {found[-1]:g}" if found else "none"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for name, node in linears(model):
            if name in self.ratios and CLIP not in node.metadata_props:
                node.metadata_props[CLIP] = f"{self.ratios[name]:g}"
                modified = True
        return ir.passes.PassResult(model, modified=modified)
