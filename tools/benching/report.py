"""The tables of tools/bench."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benching.rounds import Quartiles


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def quartiles(found: Quartiles, digits: int) -> str:
    """median [lower quartile, upper quartile]"""
    return f"{found.median:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def machine_lines(machine: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """What was measured on and with."""
    packages = ", ".join(f"{name} {version}" for name, version in sorted({**machine["packages"], **versions}.items()))
    return (
        f"{machine['date']}, {machine['cpu']}, {machine['cpus']} cores ({' '.join(machine['instructions'])}), "
        f"Python {machine['python']}; {packages}."
    )


def load_lines(loads: Sequence[float], others: Quartiles) -> str:
    """How busy the machine was."""
    return (
        f"Load average {min(loads):.1f} to {max(loads):.1f}; "
        f"other processes kept {quartiles(others, 2)} cores busy while a contender ran."
    )


def steadiness(spreads: Sequence[float], limit: float) -> str:
    """What the repetition of runs came to."""
    runs = f"{len(spreads)} run{'s' if len(spreads) > 1 else ''}"
    if min(spreads) <= limit:
        return f"{runs}; the widest quartiles of the one shown span {min(spreads):.0%} of their median."
    return (
        f"{runs}, none steady: the widest quartiles of the one shown still span {min(spreads):.0%} of their median, "
        f"above {limit:.0%}. Trust the ratios within rounds only, and those with their quartiles."
    )


def verdict(found: Quartiles, target: float) -> str:
    """Whether a target is met, by the median; open where the quartiles lie on both sides."""
    word = "met" if found.median >= target else "missed"
    return f"≥ {target:.2f}: {word}{'' if (found.low >= target) == (found.high >= target) else ', not established'}"
