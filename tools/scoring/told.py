"""The tables of tools/schemes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from scoring.rows import LEARNED, PER_CHANNEL, ROTATIONS, Row

HEAD = (
    "scheme",
    "rotation",
    "method",
    "group",
    "perplexity",
    "× float",
    "compiled in",
    "engine",
    "bits per weight",
    "cache per token",
    "objective, median and worst",
)


def table(found: Mapping[Row, Mapping[str, Any]], failed: Mapping[Row, str], base: float) -> str:
    """All rows as markdown, PyTorch's floats on top; rows that failed say why."""
    lines = [HEAD, ["---"] * len(HEAD), ["float, PyTorch", "", "", "", f"{base:.2f}", "1", *[""] * 5]]
    lines += [[*_named(row), *_figures(one, base)] for row, one in found.items()]
    lines += [[*_named(row), f"failed: {why}", *[""] * 6] for row, why in failed.items()]
    return _markdown(lines)


def pivot(found: Mapping[Row, Mapping[str, Any]]) -> str:
    """Perplexities alone, a line for each scheme and group size, a column for each rotation and method."""
    rotations = [*ROTATIONS, LEARNED]
    there = {(row.rotation, row.method) for row in found}
    columns = sorted(there, key=lambda one: (rotations.index(one[0]), one[1] != "rtn"))
    lines = [["scheme", "group", *map(", ".join, columns)], ["---"] * (2 + len(columns))]
    for kind, group in dict.fromkeys((row.kind, row.group) for row in found):
        rows = [Row(kind, *column, group) for column in columns]
        scores = [f"{found[row]['perplexity']:,.2f}" if row in found else "" for row in rows]
        lines.append([kind, _size(group), *scores])
    return _markdown(lines)


def origin(found: Iterable[Mapping[str, Any]]) -> str:
    """At which commits the rows were measured: older ones may come out otherwise today."""
    count = Counter(one.get("commit") or "no commit known" for one in found)
    return "measured at " + ", ".join(f"{name} ({rows} rows)" for name, rows in count.most_common())


def _named(row: Row) -> list[str]:
    return [row.kind, row.rotation, row.method, _size(row.group)]


def _size(group: int) -> str:
    return "per channel" if group == PER_CHANNEL else str(group)


def _markdown(lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figures(one: Mapping[str, Any], base: float) -> list[str]:
    ratios: Sequence[float] = list(one["objective"].values())
    return [
        f"{one['perplexity']:,.2f}",
        f"{one['perplexity'] / base:,.3f}",
        f"{one['compile_seconds']:.0f} s",
        f"{one['size_bytes'] / 1e6:.1f} MB",
        f"{one['bits_per_weight']:.2f}",
        f"{one['cache_bytes_per_token']:,} B",
        f"{median(ratios):.2f}, {max(ratios):.2f}" if ratios else "",
    ]
