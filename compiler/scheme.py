"""The schemes of a compile: how many bits weights and activations keep."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from rqc.runtime.errors import SchemeError


@dataclass(frozen=True)
class Scheme:
    """`wXaY`: X-bit weights in blocks, Y-bit activations; `fp32` and `fp16` store plain floats.

    weight_bits, activation_bits: 16 and 32 are floats. float_type: how a weight that is not quantized is stored.
    """

    name: str
    weight_bits: int
    activation_bits: int
    float_type: Literal["float32", "float16"]

    @property
    def quantized(self) -> bool:
        """Whether weights lie on an integer grid."""
        return self.weight_bits < 16

    @property
    def quantizes_activations(self) -> bool:
        """Whether activations lie on an integer grid: such engines agree with PyTorch in perplexity, not in logits."""
        return self.activation_bits < 16

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
    )
}
