"""The rows of tools/schemes, as data: an engine by the options of `rqc compile` that make it."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import product
from pathlib import Path

PER_CHANNEL = -1
CALIBRATION = ("--calibration-samples", "32", "--calibration-length", "512")
"""The text that GPTQ, clips, caches and compensation are fitted to: 32 windows of 512 tokens."""
A4 = "--activation-asymmetric --activation-clip auto"
"""The grid of 4-bit activations that is recommended; `w4a4-reference` has RoLoRA's, symmetric and unclipped, as w6a6
has: at 6 bits there is nothing to gain."""
KINDS = {
    "w4a4": f"--scheme w4a4 {A4}",
    "w4a4-kv4": f"--scheme w4a4 --kv-cache int4 {A4}",
    "w6a6": "--scheme w6a6",
    "w4a4-reference": "--scheme w4a4",
    "w4a16": "--scheme w4a16",
    "w4a8": "--scheme w4a8",
    "w8a8": "--scheme w8a8",
    "w3a16": "--scheme w3a16",
    "w2.5a16": "--scheme w4a16 --bits-budget 2.5",
    "w2a16": "--scheme w2a16",
    "w4a8-kv8": "--scheme w4a8 --kv-cache int8",
    "w4a8-kv4": "--scheme w4a8 --kv-cache int4",
    "w4a4-eora": f"--scheme w4a4 --compensate eora {A4}",
    "w3a16-eora": "--scheme w3a16 --compensate eora",
    "w2a16-eora": "--scheme w2a16 --compensate eora",
    "w4a16-2of4": "--scheme w4a16 --sparsity 2:4",
    "w4a16-2of4-eora": "--scheme w4a16 --sparsity 2:4 --compensate eora",
}
ROTATIONS = {"none": "none", "r1r4": "r1,r4", "all": "r1,r2,r4"}
CACHED = {**ROTATIONS, "all": "r1,r2,r3,r4"}
"""Where the cache is of codes, R3 turns the keys before they are rounded."""
LEARNED = "learned"
"""R1 and R2 of a file, at the sites of `all`."""


@dataclass(frozen=True)
class Row:
    """One engine: a kind of KINDS in a rotation, its weights by a method in blocks of a size."""

    kind: str
    rotation: str
    method: str
    group: int

    @property
    def name(self) -> str:
        """What --only is matched with, and what files of the row are called."""
        return f"{self.kind}.{self.rotation}.{self.method}.{'channel' if self.group == PER_CHANNEL else self.group}"

    @property
    def caches(self) -> bool:
        """Whether keys and values are kept as codes."""
        return "--kv-cache" in KINDS[self.kind]

    def options(self, learned: Path | None = None) -> list[str]:
        """The options of `rqc compile`, but for what the rows share. learned: the file of a learned rotation."""
        sites = CACHED if self.caches else ROTATIONS
        turned = ["--rotate", sites["all" if self.rotation == LEARNED else self.rotation]]
        turned += ["--rotation", str(learned)] if self.rotation == LEARNED else []
        return [*KINDS[self.kind].split(), *turned, "--method", self.method, "--group-size", str(self.group)]


def _rows(kinds: str, rotations: str, methods: str, groups: tuple[int, ...]) -> list[Row]:
    return [Row(*one) for one in product(kinds.split(), rotations.split(), methods.split(), groups)]


ROWS = (
    *_rows("w6a6 w4a4 w4a4-kv4", "all r1r4 none learned", "gptq rtn", (64, PER_CHANNEL)),
    *_rows("w4a4-reference", "all none", "gptq rtn", (64,)),
    *_rows("w4a16 w4a8 w3a16 w2.5a16", "none all", "gptq rtn", (64,)),
    *_rows("w2a16-eora", "none all", "gptq rtn", (32,)),
    *_rows("w2a16", "none", "gptq rtn", (32,)),
    *_rows("w4a4-eora", "all", "gptq", (64,)),
    *_rows("w3a16-eora w4a16-2of4 w4a16-2of4-eora", "none", "gptq", (64,)),
    *_rows("w4a8-kv8 w4a8-kv4", "all", "rtn", (64,)),
)
"""The table, the rows first that decide most."""
FAITHFUL = (
    *_rows("w8a8 w6a6 w4a8 w4a4 w4a4-kv4", "all", "rtn", (64,)),
    *_rows("w4a4 w4a4-kv4", "all", "gptq", (64,)),
)
"""Each scheme that rounds activations, compared with PyTorch's fake quantization; at 4 bits also by GPTQ, which is what
one would ship."""
BY_NAME = {row.name: row for row in (*ROWS, *FAITHFUL)}


def chosen(rows: tuple[Row, ...], patterns: list[str], learned: Path | None) -> list[Row]:
    """The rows that match a pattern (all, without patterns); those of a learned rotation if there is one."""
    there = [row for row in rows if learned is not None or row.rotation != LEARNED]
    return [row for row in there if not patterns or any(fnmatch(row.name, pattern) for pattern in patterns)]
