"""What enters the key-value cache, from the calibration text: ranges for one of 8 bits, means of keys for one of 4."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rqc.passes.base import Pass
from rqc.passes.static_activations import Measure

KEY_MEAN = "rqc.cache.key_mean"
"""Mark on an attention: the mean key, channel by channel."""
KEY_RANGE, VALUE_RANGE = "rqc.cache.key_range", "rqc.cache.value_range"
"""Marks on an attention: for each channel of each kv head the exponents e of the ranges 2^(e / STEPS)."""
STEPS = 8
"""Ranges per octave."""
HEADROOM = 1.1
"""Range over the largest magnitude on the calibration text: what is cut off costs more than the coarser step."""
MEAN_STEPS = 16
"""Steps of a mean up to the largest one of its layer: as coarse, last bits hardly ever move one."""
LEAST = 2.0**-16
"""The smallest range: that of a channel of zeros."""


class RecordCacheRanges(Pass):
    """Marks every attention with the ranges of what enters its cache, keys behind RoPE and R3, values under R2, channel
    by channel; nothing is computed otherwise."""

    def __init__(self, measure: Measure) -> None:
        super().__init__()
        self.measure = measure

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = [node for node in model.graph if node.op_type == "Attention" and KEY_RANGE not in node.metadata_props]
        if not nodes:
            return ir.passes.PassResult(model, modified=False)
        found = self.measure(model, sorted({_name(node, index) for node in nodes for index in (1, 2)}))
        for node in nodes:
            for index, mark in ((1, KEY_RANGE), (2, VALUE_RANGE)):
                node.metadata_props[mark] = _written(found[_name(node, index)])
        return ir.passes.PassResult(model, modified=True)


class RecordKeyMeans(Pass):
    """Marks every attention with the mean of its keys behind RoPE and R3, channel by channel; nothing is computed
    otherwise."""

    def __init__(self, measure: Measure) -> None:
        super().__init__()
        self.measure = measure

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = [node for node in model.graph if node.op_type == "Attention" and KEY_MEAN not in node.metadata_props]
        if not nodes:
            return ir.passes.PassResult(model, modified=False)
        found = self.measure(model, sorted({_name(node, 1) for node in nodes}), "mean")
        for node in nodes:
            mean = np.asarray(found[_name(node, 1)], np.float64)
            step = np.exp2(np.rint(np.log2(np.maximum(np.abs(mean).max(), LEAST)))) / MEAN_STEPS
            node.metadata_props[KEY_MEAN] = " ".join(f"{round(m / step) * step:g}" for m in mean)
        return ir.passes.PassResult(model, modified=True)


def means(mark: str) -> npt.NDArray[np.float64]:
    """The mean behind a mark, one per channel."""
    return np.asarray(mark.split(), np.float64)


def ranges(mark: str) -> npt.NDArray[np.float64]:
    """The ranges behind a mark, one per channel."""
    return np.exp2(np.asarray(mark.split(), np.float64) / STEPS)


def _written(largest: npt.NDArray[np.float32]) -> str:
    """Ranges, with headroom, as exponents. Steps of 9 %: a machine's own last bits hardly ever move one."""
    wide = np.maximum(np.asarray(largest, np.float64) * HEADROOM, LEAST)
    return " ".join(str(exponent) for exponent in np.rint(STEPS * np.log2(wide)).astype(int))


def _name(node: ir.Node, index: int) -> str:
    value = node.inputs[index]
    assert value is not None
    return value.name or ""
