"""What finding codes takes in memory, before a weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from rqc.compiler.calibration.blockwise import ROWS_AT_ONCE
from rqc.compiler.importer import Imported
from rqc.compiler.sizes import attention_bytes
from rqc.models.description import Claim, Description
from rqc.models.families import RESIDUAL

FLOAT_BYTES = 12
"""For each weight of a part that runs: made, stored, packed."""
STACKED = 1 << 25
"""Entries of weights that are solved as one: in larger ones nothing is gained by it, and a mixture has many experts."""
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
    """Of calibrating on `count` windows of `length`: the text in front of a block and behind it, and the embedding's
    table or the largest block with all that comes with it."""
    a, description = imported.description.architecture, imported.description
    tokens = min(count, ROWS_AT_ONCE) * length
    step = tokens * 4 * (6 * a.hidden_size + 6 * a.intermediate_size) + attention_bytes(a, tokens, length)
    text = 2 * 4 * count * length * a.hidden_size
    layers: dict[int, list[Claim]] = {}
    for claim in description.claims:
        if claim.quantized:
            layers.setdefault(claim.layer, []).append(claim)
    blocks = (_block_bytes(description, claims, step, crossed=crossed) for claims in layers.values())
    return text + max(FLOAT_BYTES * a.vocab_size * a.hidden_size, *blocks)


def _block_bytes(description: Description, claims: Sequence[Claim], step: int, *, crossed: bool) -> int:
    """The moments of what a block's linears read (three times, if crossed), and the most of what comes in turn: its
    weights in floats with the activations of a step, or the factors of the widest site with the weights of a stack."""
    sites: dict[str, list[tuple[int, int]]] = {}
    for claim in claims:
        shared = claim.linear.path.partition(".")[0] if claim.linear.reads == RESIDUAL else claim.weight
        sites.setdefault(shared, []).append(description.shape(claim))
    widths = [shapes[0][1] for shapes in sites.values()]
    sizes = [[prod(shape) for shape in shapes] for shapes in sites.values()]
    moments = (24 if crossed else 8) * sum(width**2 for width in widths)
    running = FLOAT_BYTES * sum(map(sum, sizes)) + step
    stacked = max(max(max(site), min(STACKED, sum(site))) for site in sizes)
    return moments + max(running, FACTOR_BYTES * max(widths) ** 2 + WEIGHT_BYTES * stacked)
