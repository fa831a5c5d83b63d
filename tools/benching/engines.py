"""rqc's own contenders: the checkpoint compiled by the command line, unrotated, rotated, and with an adapter beside."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from benching.contenders import Contender
from rqc.models.checkpoint import Checkpoint
from rqc.runtime.errors import ResourceError

TOOLS = Path(__file__).parents[1]
SHAPES = ("llama-1b", "tinyllama-1.1b")


@dataclass(frozen=True)
class Scheme:
    """What is the same in all contenders that can have it."""

    group: int
    table_bits: int

    @property
    def flags(self) -> list[str]:
        bits = str(self.table_bits)
        sizes = ["--group-size", str(self.group), "--embedding-bits", bits, "--head-bits", bits]
        return ["--scheme", "w4a8", "--symmetric", "--clip", "none", *sizes]


def checkpoint(name: str, work: Path) -> Path:
    """The directory of a model: one that exists, SmolLM2, or random weights of a shape with SmolLM2's vocabulary.

    Shapes are tied, so that R1 has its online halves at embedding and head: the dearest case.
    """
    if Path(name).is_dir():
        return Path(name)
    target = work / name
    if name == "smollm2":
        _run([sys.executable, TOOLS / "fetch_model", name, target, "--off-grid"])
    elif name not in SHAPES:
        raise ResourceError(f"there is no model {name!r}", hint=f"a directory, smollm2, {' or '.join(SHAPES)}")
    elif not (target / "model.safetensors.index.json").is_file():
        tokenizer = checkpoint("smollm2", work)
        _run([sys.executable, TOOLS / "random_model", name, target, "--tied", "--tokenizer", tokenizer])
    return target


def config(model: Path) -> dict[str, Any]:
    """The checkpoint's config.json."""
    found: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return found


def engine(
    model: Path, work: Path, scheme: Scheme, rotate: str, *, reuse: bool, branch: int | None = None
) -> Contender:
    """The engine with these rotations, compiled anew unless an earlier one is to be used again.

    branch: the rank of a random adapter that runs beside every linear of the blocks.
    """
    name = "rqc" if rotate == "none" else f"rqc {rotate}"
    target = work / f"{model.name}-{scheme.group}-{scheme.table_bits}-{rotate.replace(',', '')}.plan"
    note = f"rqc's loop; w4a8, symmetric groups of {scheme.group}, {scheme.table_bits}-bit embedding and head"
    flags = ["--rotate", rotate, *scheme.flags]
    if branch is not None:
        name, target = f"{name} branch", target.with_name(f"{target.stem}-branch{branch}.plan")
        flags += ["--adapter", str(adapter(model, work, branch)), "--merge", "branch"]
        note += f", branches of rank {branch} in float32"
    if not (reuse and target.is_file()):
        rqc = [sys.executable, "-c", "from rqc.compiler.cli import main; raise SystemExit(main())"]
        _run([*rqc, "compile", model, "-o", target, *flags])
    return Contender(name, "rqc", target, Path(sys.executable), f"{note}, rotation {rotate}")


def adapter(model: Path, work: Path, rank: int) -> Path:
    """A PEFT directory with random factors for every linear of the model's blocks."""
    target = work / f"{model.name}-lora{rank}"
    tensors: dict[str, np.ndarray] = {}
    generator = np.random.default_rng(0)
    for name, info in sorted(Checkpoint.open(model).tensors.items()):
        if name.endswith("_proj.weight"):
            rows, width = info.shape
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            a, b = generator.standard_normal((rank, width)), generator.standard_normal((rows, rank))
            tensors[f"{stem}.lora_A.weight"] = (a / np.sqrt(width)).astype(np.float32)
            tensors[f"{stem}.lora_B.weight"] = (0.01 * b).astype(np.float32)
    modules = sorted({name.split(".")[-3] for name in tensors})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules, "bias": "none"}
    target.mkdir(exist_ok=True)
    save_file(tensors, target / "adapter_model.safetensors")
    (target / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return target


def _run(command: Sequence[str | Path]) -> None:
    """Run one of the project's own tools, its progress on stderr."""
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise ResourceError(f"{' '.join(map(str, command))} failed", hint="its message is above")
