"""The peers: their own environment, and the models that they make of the same checkpoint.

They are installed into a virtual environment of their own, never into the project's: onnxruntime-genai's builder wants
torch and transformers at versions that it was tried with, and ships native libraries of its own.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benching.contenders import Contender
from rqc.runtime.errors import ResourceError

PINS = (
    *("onnxruntime-genai==0.18.0", "onnxruntime==1.31.1", "onnx==1.23.2", "onnx-ir==1.1.0"),
    *("torch==2.13.0", "transformers==5.23.0", "numpy==2.4.6", "gguf==0.19.0"),
)
"""What the builder and genai's runtime were tried with; the same ONNX Runtime as tools/constraints.txt has."""
LLAMA_CPP = "llama-cpp-python==0.3.36"
"""Not installed by itself: it is built from source, half an hour on two cores."""


@dataclass(frozen=True)
class Peers:
    """The environment of the peers in `directory`; `install` makes it, once."""

    directory: Path

    @property
    def python(self) -> Path:
        return self.directory / "bin" / "python"

    def install(self) -> None:
        """Make the environment unless it was made with these pins. Raises ResourceError."""
        stamp = self.directory / "pins.txt"
        if stamp.is_file() and stamp.read_text() == "\n".join(PINS):
            return
        print(f"installing {PINS[0]} and what it needs into {self.directory}", file=sys.stderr)
        venv.create(self.directory, with_pip=True)
        command = [str(self.python), "-m", "pip", "install", "--quiet", *PINS]
        if subprocess.run(command, stdout=sys.stderr).returncode:
            raise ResourceError(
                f"pip could not install {PINS[0]}", hint="check pip's configuration, or measure with --contenders rqc"
            )
        stamp.write_text("\n".join(PINS))

    def has(self, module: str) -> bool:
        """Whether the environment has a module; it is not imported."""
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
        return subprocess.run([self.python, "-c", code]).returncode == 0


def genai(
    peers: Peers, model: Path, work: Path, *, group: int, head_bits: int, embedding_bits: int, tied: bool
) -> Contender:
    """genai's int4 build at the engine's bits, block and tables, with the head at the last position only.

    Its builder quantizes a Gather to 4 bits only. Of a tied model it can share one 4-bit table; asked to share an 8-bit
    one, version 0.18 writes a graph that does not load (it names an initializer lm_head.MatMul.weight_Q8G32 that is not
    there). So an 8-bit head stands beside a 4-bit embedding. A step reads one row of the embedding: that is in the size
    of the model, not in its speed.
    """
    options = [f"block_size={group}", "is_symmetric=true", "accuracy_level=4", "op_types_to_quantize=MatMul/Gather"]
    options += ["prune_lm_head=true", f"shared_embeddings={str(tied and head_bits == 4).lower()}"]
    options += ["matmul_mixed_precision=last_matmul:int8"] if head_bits == 8 else []
    tables = "one 4-bit table" if tied and head_bits == 4 else f"{head_bits}-bit head, 4-bit embedding"
    note = f"its own loop; 4-bit symmetric groups of {group}, accuracy level 4, {tables}"
    note += "" if embedding_bits == 4 else f" (its builder has no {embedding_bits}-bit one)"
    return Contender("genai", "genai", _built(peers, model, work, options), peers.python, note)


def genai_defaults(peers: Peers, model: Path, work: Path) -> Contender:
    """genai's int4 build as it comes: a second line, at other widths than the engine's."""
    note = "its own loop; the builder's defaults: groups of 32, float embedding, head at all positions"
    return Contender("genai defaults", "genai", _built(peers, model, work, []), peers.python, note)


def llama_cpp(peers: Peers, model: Path, work: Path) -> Contender:
    """The same weights as GGUF Q4_0, head and all, by gguf_q4_0.py."""
    target = work / f"{_digest(model, ['Q4_0'])}.gguf"
    if not target.is_file():
        script = Path(__file__).with_name("gguf_q4_0.py")
        staged = target.with_suffix(".part")
        _run([peers.python, "-P", script, model, staged], "the GGUF file")
        os.replace(staged, target)
    note = "groups of 32 with fp16 scales, head Q4_0 too, fp16 KV cache"
    return Contender("llama.cpp Q4_0", "llama.cpp", target, peers.python, note)


def _built(peers: Peers, model: Path, work: Path, options: Sequence[str]) -> Path:
    """The builder's output for these options, made once per checkpoint."""
    target = work / f"genai-{_digest(model, [*PINS, *options])}"
    if target.is_dir():
        return target
    staged = target.with_suffix(".part")
    shutil.rmtree(staged, ignore_errors=True)
    command: list[str | Path] = [
        peers.python,
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        model,
        "-o",
        staged,
        "-p",
        "int4",
    ]
    command += ["-e", "cpu", "-c", work / "cache", *(["--extra_options", *options] if options else [])]
    _run(command, f"genai's model of {model}")
    os.replace(staged, target)
    return target


def _run(command: Sequence[str | Path], what: str) -> None:
    """Run a peer's converter; its chatter is shown only if it fails."""
    print(f"building {what}", file=sys.stderr)
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise ResourceError(f"{what} could not be built: {lines[-1]}", hint=f"run {' '.join(map(str, command))}")


def _digest(model: Path, options: Sequence[str]) -> str:
    """Names the output of a converter: config, size and time of the weights, options."""
    files = sorted(file for file in model.iterdir() if file.suffix in (".safetensors", ".json"))
    facts = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return hashlib.sha256("\n".join([str(model.resolve()), *facts, *options]).encode()).hexdigest()[:12]
