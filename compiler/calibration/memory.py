"""What finding codes takes in memory, before a weight is read."""

from __future__ import annotations

from math import prod

from rqc.compiler.calibration.blockwise import ROWS_AT_ONCE
from rqc.compiler.importer import Imported
from rqc.compiler.sizes import attention_bytes

FACTOR_BYTES = 20
"""For each second moment: it and its factors while it is inverted."""
WEIGHT_BYTES = 48
"""For each weight while it is solved: itself, its codes, branch and errors, some in float64."""


def weights_bytes(imported: Imported) -> int:
    """Of finding codes from weights alone: the widest weight some times over, and moments of its inputs."""
    description = imported.description
    shapes = [description.shape(claim) for claim in description.claims if claim.quantized]
    return max(WEIGHT_BYTES * n * k + FACTOR_BYTES * k**2 for n, k in shapes)


def calibration_bytes(imported: Imported, count: int, length: int, *, crossed: bool = False) -> int:
    """Of calibrating on `count` windows of `length`: a float block three times (made, stored, packed) with its
    activations, the text in front of it and behind it, the moments of what it reads (twice, if crossed), and the
    factors of the widest."""
    a, description = imported.description.architecture, imported.description
    layer = [claim for claim in description.claims if claim.layer == 0 and claim.quantized]
    widths = {claim.linear.reads: description.shape(claim)[1] for claim in layer}
    block = 3 * 4 * sum(prod(description.shape(claim)) for claim in layer)
    tokens = min(count, ROWS_AT_ONCE) * length
    step = tokens * 4 * (6 * a.hidden_size + 6 * a.intermediate_size) + attention_bytes(a, tokens, length)
    text = 2 * 4 * count * length * a.hidden_size
    moments = (16 if crossed else 8) * sum(width**2 for width in widths.values())
    return block + step + text + moments + FACTOR_BYTES * max(widths.values()) ** 2
