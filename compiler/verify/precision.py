"""What the float type of an engine allows: to which limits it must agree with a reference in float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Precision:
    """Limits for one float type.

    unit, least: relative and absolute error of storing a scale; least is also what scales are never below. kl: nats per
    token. linear: relative error of one linear on equal codes. codes: share of codes that must be equal, by activation
    bits. side: relative distance to which storing moves an adapter's branch or a correction.
    """

    unit: float
    least: float
    kl: float
    linear: float
    codes: Mapping[int, float]
    side: float

    def of_scales(self, scales: F64) -> F64:
        """The relative error of storing each scale; 0 for scales of 0."""
        small = np.divide(self.least, np.abs(scales), out=np.zeros_like(scales), where=scales != 0)
        return np.asarray(self.unit + small)


PRECISIONS = {
    "fp32": Precision(0.0, 0.0, 1e-6, 1e-5, {8: 0.999, 6: 0.999, 4: 0.999}, 2e-6),
    "fp16": Precision(2.0**-11, 2.0**-24, 1e-3, 2e-3, {8: 0.95, 6: 0.99, 4: 0.995}, 1e-3),
    "bf16": Precision(2.0**-8, 0.0, 5e-2, 1.6e-2, {8: 0.6, 6: 0.92, 4: 0.96}, 8e-3),
}
"""By the manifest's dtype.

fp16, ONNX parts run by ONNX Runtime against float32. KL: SmolLM2 (w4a16, rotated) 4.1e-6 on 512 tokens; tiny Llama,
Qwen3, Phi-3, Gemma 2 and 3 1.6e-7 to 4.3e-6; a tiny Mixtral 9e-7, but 2.3e-4 in another engine, by a router's choice as
it seems. PyTorch's own float16, of the float models, is 1.5e-5 from its float32 on SmolLM2, 9.5e-7 to 2.5e-6 on tiny
ones; a rotation of a tiny Llama without its online half is off by more than 1e-1. One linear: 3.5e-4 to 5.3e-4, where
activations are not rounded to 8 bits 6.5e-3. Equal codes at 8, 6 and 4 bits: 0.985 to 0.995, 0.997, 0.999 and more.
Side paths: 3.1e-4 to 4.7e-4.

bf16 was not measured, no CPU runs it here: PyTorch's is 1.0e-3 nats from float32 on SmolLM2, and the limits follow that
and the eight times coarser unit.
"""
