"""The schemes of a compile: how many bits weights and activations keep."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from rqc.runtime.errors import SchemeError


@dataclass(frozen=True)
class Scheme:
    """`wXaY`: X-bit weights in blocks, Y-bit activations; `fp32` and `fp16` store plain floats; `fp8a16` and
    `nvfp4a16` weights as small floats under scales.

    weight_bits, activation_bits: 16 and 32 are floats. float_type: how a weight that is not quantized is stored.
    weights: what codes of a quantized weight are.
    """

    name: str
    weight_bits: int
    activation_bits: int
    float_type: Literal["float32", "float16"]
    weights: Literal["integer", "fp8", "nvfp4"] = "integer"

    @property
    def quantized(self) -> bool:
        """Whether weights lie on a grid, of integers or of small floats."""
        return self.weight_bits < 16

    @property
    def small_floats(self) -> bool:
        """Whether weights lie on a grid of small floats, which TensorRT alone computes with."""
        return self.weights != "integer"

    @property
    def quantizes_activations(self) -> bool:
        """Whether activations lie on an integer grid: such engines agree with PyTorch in perplexity, not in logits."""
        return self.activation_bits < 16

    @property
    def coarse_activations(self) -> bool:
        """Whether activations are rounded so coarsely that what is fitted to a text makes up for that too. At 6 bits it
        gained nothing (SmolLM2, w6a6 in groups of 64: perplexity 21.10 for 21.09)."""
        return self.activation_bits <= 4

    @staticmethod
    def parse(name: str) -> Scheme:
        """The scheme of that name. Raises SchemeError naming the known ones."""
        if name in SCHEMES:
            return SCHEMES[name]
        near = difflib.get_close_matches(name.lower(), SCHEMES, n=1)
        hint = f"did you mean {near[0]}? known: " if near else "known: "
        raise SchemeError(f"unknown scheme {name!r}", hint=hint + ", ".join(SCHEMES))

    def __str__(self) -> str:
        return self.name


def _integer(weight_bits: int, activation_bits: int) -> Scheme:
    return Scheme(f"w{weight_bits}a{activation_bits}", weight_bits, activation_bits, "float32")


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("fp32", 32, 32, "float32"),
        Scheme("fp16", 16, 32, "float16"),
        *(_integer(*bits) for bits in ((8, 16), (8, 8), (6, 6), (4, 16), (4, 8), (4, 4), (3, 16), (2, 16))),
        Scheme("fp8a16", 8, 16, "float32", "fp8"),
        Scheme("nvfp4a16", 4, 16, "float32", "nvfp4"),
    )
}
