"""Engines with a rounded key-value cache, compared with PyTorch attention by attention.

What stands between the attentions (and linears) of an engine is fed with what the reference computes; the keys and
values that it makes of that must lie on the same codes of the cache. Then each attention runs alone, on the reference's
q and on keys and values that lie on the grid already: on equal codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rqc.compiler.verify.belonging import relative
from rqc.compiler.verify.stored import StoredGraph
from rqc.compiler.verify.stored_caches import StoredCache
from rqc.models.cache_grid import CacheErrors

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class CacheParity:
    """The attention of one layer.

    elements: of keys and values; equal: share of their codes in the cache that agree; distance: codes by which the
    furthest is off; error: ‖y − y_ref‖ / ‖y_ref‖ on equal codes, or the same of q if that is off further.
    """

    layer: int
    elements: int
    equal: float
    distance: int
    error: float


@dataclass(frozen=True, eq=False)
class SeenAttention:
    """What an attention of the reference read, q [heads, tokens, size], k and v [kv heads, tokens, size] on the grid of
    the cache, and wrote, y [tokens, heads · size]."""

    query: F32
    key: F32
    value: F32
    output: F32

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> SeenAttention:
        """Those of a batch of one sequence, as the reference's attention has them."""
        query, key, value, output = (tensor[0].numpy() for tensor in tensors)
        return cls(query, key, value, output.reshape(len(output), -1))


def as_entering(stored: StoredGraph, cache: StoredCache, seen: SeenAttention) -> dict[str, F32]:
    """What the engine's attention must read to see what the reference's saw, [1, tokens, width] by value name: turned
    back where the kernel turns q and k itself."""
    query, key = seen.query, seen.key
    if cache.tables:
        cos, sin = (stored.array(table)[: query.shape[1]].astype(np.float32) for table in cache.tables)
        query, key = _turned_back(query, cos, sin), _turned_back(key, cos, sin)
    parts = [_flat(part) for part in (query, key, seen.value)]
    names = cache.entering
    return dict(zip(names, parts if len(names) == 3 else [np.concatenate(parts, -1)], strict=True))


def _turned_back(x: F32, cos: F32, sin: F32) -> F32:
    """x [heads, tokens, size] before RoPE by halves; cos, sin [tokens, size / 2]: their squares may not add up to 1."""
    first, second = np.split(x, 2, axis=-1)
    square = cos * cos + sin * sin
    back: F32 = np.concatenate([(first * cos + second * sin) / square, (second * cos - first * sin) / square], -1)
    return back


def _flat(x: F32) -> F32:
    """[heads, tokens, size] as [1, tokens, heads · size]."""
    return np.ascontiguousarray(x.transpose(1, 0, 2)).reshape(1, x.shape[1], -1)


def judged(
    cache: StoredCache, seen: SeenAttention, query_error: float, kept: Sequence[NDArray[np.generic]], output: F32
) -> CacheParity:
    """kept: what the engine's cache holds of its own q, k and v; output: what it made of the reference's."""
    expected = [grid.codes(x) for grid, x in zip(cache.grids, (seen.key, seen.value), strict=True)]
    off = np.concatenate(
        [np.abs(mine - theirs).ravel() for mine, theirs in zip(cache.codes(kept), expected, strict=True)]
    )
    error = max(query_error, relative(output, seen.output))
    return CacheParity(cache.layer, off.size, float((off == 0).mean()), int(off.max()), error)


def worst_cache(checks: Sequence[CacheParity]) -> Iterator[str]:
    """One line for each measure: the layer that is furthest off."""
    if not checks:
        return
    coded, far = min(checks, key=lambda check: check.equal), max(checks, key=lambda check: check.error)
    distance = max(check.distance for check in checks)
    yield f"cache: fewest equal codes in layer {coded.layer}, {coded.equal:.5%}, furthest off by {distance}"
    yield f"attention: furthest off on equal codes is layer {far.layer}, {far.error:.1e}"


def cache_gates(checks: Sequence[CacheParity], errors: CacheErrors) -> Mapping[str, float]:
    """What the gates of a rounded cache hold to their limits."""
    elements = sum(check.elements for check in checks)
    return {
        "equal_cache_codes": sum(check.equal * check.elements for check in checks) / elements,
        "cache_code_distance": float(max(check.distance for check in checks)),
        "attention_error": max(check.error for check in checks),
        "cache_error": errors.largest,
    }
