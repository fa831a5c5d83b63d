"""What a compile will take, read off the lowered graph before any weight is: size of the engine, peak memory of the
compiler."""

from __future__ import annotations

import resource
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

import onnx_ir as ir

from rqc.compiler.adapters.survival import measuring_bytes
from rqc.compiler.importer import Imported
from rqc.compiler.recipe import Recipe
from rqc.models.description import Architecture, Claim
from rqc.models.quantized import LazyQuantized
from rqc.models.weights import Weight
from rqc.passes.base import QUANTIZED, STORAGE, WEIGHT
from rqc.runtime.errors import ResourceError

WRITER_BYTES = 64 << 20
"""Buffers of the writer, the graph and the interpreter's growth while weights stream by."""
BUILDER_BYTES, BUILDER_FACTOR = 256 << 20, 4.9
"""Memory of the process that builds a plan: its libraries, and how often it holds the weights. TensorRT-RTX 1.7.1."""
PLAN_BYTES = 5 << 20
"""What a plan holds beside the weights, at least."""


@dataclass(frozen=True)
class Estimate:
    """Bytes of the engine and of the compiler's peak, weights and working copies included."""

    size_bytes: int
    peak_rss_bytes: int
    parameters: int = 0
    builder_bytes: int = 0
    """Of the peak, what the builder of a plan takes."""

    def to_json(self) -> dict[str, int]:
        """The estimate as it stands in reports."""
        return asdict(self)


def estimate(
    model: ir.Model, parameters: int = 0, companions: int = 0, *, builds: bool = False, calibrating: int = 0
) -> Estimate:
    """Size of the engine and peak of making it: what the process holds now (an adapter's factors too), and the largest
    weight with its working copies while it is written, or measured with and without its adapter.

    builds: a plan is built as well, which holds the weights once more, by a process beside this one. calibrating: bytes
    of a calibration that is still to come.
    """
    sizes: dict[object, int] = {}
    working = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        key = tensor.meta.get(STORAGE)
        sizes[id(tensor) if key is None else key] = tensor.nbytes
        working = max(working, _working_bytes(tensor))
    peak = max(highest_bytes(), resident_bytes() + max(working + WRITER_BYTES, calibrating))
    weights = sum(sizes.values())
    if not builds:
        return Estimate(weights + companions, peak, parameters)
    builder = int(BUILDER_BYTES + BUILDER_FACTOR * weights)
    size = 2 * weights + PLAN_BYTES + companions
    return Estimate(size, max(peak, resident_bytes() + builder), parameters, builder)


def highest_bytes() -> int:
    """The most that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """What this process holds now; the most it ever held where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return highest_bytes()
    return pages * resource.getpagesize()


def _working_bytes(tensor: ir.TensorProtocol) -> int:
    quantized = tensor.meta.get(QUANTIZED)
    if isinstance(quantized, LazyQuantized):
        elements = quantized.shape[0] * quantized.shape[1]
        scales = quantized.shape[0] * quantized.groups * 4
        writing = max(part.resident_bytes() for part in quantized.parts) + 2 * elements + 2 * scales + tensor.nbytes
        return max(writing, *(part.resident_bytes() + measuring_bytes(part) for part in quantized.parts))
    weight = tensor.meta.get(WEIGHT)
    if not isinstance(weight, Weight):
        return tensor.nbytes
    return weight.resident_bytes() + max(tensor.nbytes, measuring_bytes(weight))


def attention_bytes(architecture: Architecture, tokens: int, length: int) -> int:
    """What a layer's attention takes while that many tokens, in windows of `length`, are in memory: scores, their sum
    with the mask, its softmax."""
    return 3 * 4 * architecture.heads * tokens * length


def block_bytes(imported: Imported, recipe: Recipe, tokens: int, length: int) -> int:
    """What it takes to run the model block by block on so many tokens in windows of `length`: the largest part's
    weights three times (made, stored, packed), and activations."""
    a = imported.description.architecture
    widest = max((recipe.scheme.weight_bits, *recipe.widths.values()))
    per_layer = 1.25 * widest / 8 * sum(prod(imported.description.shape(c)) for c in _first_layer(imported))
    table = 1.25 * max(recipe.table_bits(tied=a.tied)) / 8 * a.vocab_size * a.hidden_size
    folding = 8 * 3 * max(prod(imported.description.shape(claim)) for claim in imported.description.claims)
    activations = 4 * tokens * (4 * a.hidden_size + 4 * a.intermediate_size) + 12 * 512 * a.vocab_size
    return int(3 * max(per_layer, table) + folding + activations + attention_bytes(a, tokens, length))


def _first_layer(imported: Imported) -> list[Claim]:
    return [claim for claim in imported.description.claims if claim.layer == 0]


def check_memory(estimated: Estimate, limit: int | None, way: str) -> None:
    """Raise ResourceError, before a weight is read, when the estimate does not fit under `limit` bytes. way: what takes
    less."""
    if limit is not None and estimated.peak_rss_bytes > limit:
        builder = estimated.builder_bytes
        told = f", {builder / 2**30:.2f} of them to build the plan" if builder else ""
        raise ResourceError(
            f"this compile needs about {estimated.peak_rss_bytes / 2**30:.2f} GiB{told}, "
            f"--max-memory is {limit / 2**30:.2f} GiB",
            hint=f"raise --max-memory, or {way}",
        )
