"""Adapters of tiny models with random weights, made by plain peft or as training in a basis writes them, the logits
that peft and an engine compute, and their parity."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import add_tokenizer
from transformers import AutoModelForCausalLM

from rqc.compiler.api import compile_engine
from rqc.compiler.importer import import_model
from rqc.compiler.verify.engine import ParityReport, verify_engine
from rqc.models.adapter_basis import AdapterBasis
from rqc.models.algebra import dimensions
from rqc.models.delta import Delta
from rqc.models.grid import Grid, quantize
from rqc.models.reference import Reference
from rqc.models.rotation import Rotation
from rqc.runtime.engine import Engine

IDS = np.random.default_rng(5).integers(0, 96, 40)
W4: dict[str, Any] = {"grid": Grid(4, 16, False, "mse"), "base_kind": "w4"}
"""What a basis says of a 4-bit base."""


def save_peft(model_dir: Path, directory: Path, *, size: float = 0.05, seed: int = 0, **config: Any) -> Path:
    """An adapter on all linears of the blocks whose B (and DoRA magnitudes) are random: B ~ size · N(0, 1)."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **config}
    torch.manual_seed(seed)
    model = get_peft_model(_plain(model_dir), LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = size * torch.randn(parameter.shape, generator=generator)
        elif "lora_magnitude_vector" in name:
            parameter.data *= 1 + 0.2 * torch.rand(parameter.shape, generator=generator)
    model.save_pretrained(directory)
    return directory


def save_merged(model_dir: Path, adapter: Path, target: Path) -> Path:
    """A copy of a model directory with the adapter merged by peft, in float32."""
    shutil.copytree(model_dir, target)
    PeftModel.from_pretrained(_plain(model_dir), str(adapter)).merge_and_unload().save_pretrained(target)
    return target


def peft_logits(model_dir: Path, adapter: Path, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits [n, vocab] of the model with its adapter, in float32 PyTorch."""
    model = PeftModel.from_pretrained(_plain(model_dir), str(adapter)).eval()
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()
    return logits


def talking(model_dir: Path, target: Path) -> Path:
    """A copy of a tiny model with a tokenizer of single characters."""
    return add_tokenizer(shutil.copytree(model_dir, target))


def mean_kl(reference: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Mean KL(reference ‖ found) per position, in nats."""
    p, q = (x.astype(np.float64) - x.astype(np.float64).max(-1, keepdims=True) for x in (reference, found))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


class Lines:
    """Progress as a list."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def advance(self, label: str, done: int, total: int) -> None:
        pass


def engine_logits(path: Path) -> np.ndarray:
    with Engine.load(path, threads=1) as engine:
        return engine.logits(IDS.tolist())


def checked(directory: Path, adapter: Any, folder: Path, **options: Any) -> ParityReport:
    """Compile with an adapter (or several), and verify."""
    compile_engine(directory, folder / "e.plan", adapter=adapter, min_survival=0.0, **options)
    return verified(folder / "e.plan", directory, adapter)


def verified(engine: Path, directory: Path, adapter: Any) -> ParityReport:
    """Verify on 120 tokens in two windows."""
    ids = np.random.Generator(np.random.PCG64(5)).integers(0, 96, 120).tolist()
    return verify_engine(engine, directory, adapter=adapter, token_ids=ids, tokens=120, window=60, threads=1)


def failed(report: ParityReport) -> set[str]:
    """The gates that fail it."""
    return {gate.name for gate in report.gates if gate.counts and not gate.passed}


def on_the_grid(
    directory: Path, sites: str, deltas: Mapping[str, Delta], residual: Mapping[str, Delta] | None = None
) -> np.ndarray:
    """Logits of PyTorch with Ŵ + ΔW in every linear, Ŵ the rounded weights of the rotated model (less a residual)."""
    reference = Reference.load(directory)
    tied = reference.description.architecture.tied
    reference.fold(Rotation.parse(sites), tied=tied)
    for claim in reference.description.claims:
        weight = reference.parts[claim.weight].weight.double().numpy()
        if residual:
            weight = weight - residual[claim.weight].dense()
        rounded = quantize(weight, W4["grid"]).dequantize().astype(np.float64) if claim.quantized else weight
        merged = deltas[claim.weight].merged(rounded) if claim.weight in deltas else rounded
        reference.parts[claim.weight].weight.copy_(torch.from_numpy(merged))
    reference.rotate_online(Rotation.parse(sites), tied=tied)
    return reference.logits(IDS)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def linears(directory: Path, routers: bool = False) -> dict[str, tuple[int, int]]:
    """Shapes of all linears of the blocks, by the graph's names."""
    description = import_model(directory).description
    return {claim.weight: description.shape(claim) for claim in description.claims if claim.quantized or routers}


def random_deltas(
    directory: Path, rank: int = 4, size: float = 0.05, pool: int = 1, routers: bool = False
) -> dict[str, Delta]:
    """Low-rank parts for every linear; A constant in blocks of `pool` inputs."""
    draw = np.random.default_rng(7)
    deltas = {}
    for name, (n, k) in linears(directory, routers).items():
        a = np.repeat(draw.normal(size=(rank, -(-k // pool))), pool, axis=1)[:, :k] / np.sqrt(k)
        deltas[name] = Delta(a, size * draw.normal(size=(n, rank)), 2.0)
    return deltas


def basis_of(directory: Path, sites: str, **fields: Any) -> AdapterBasis:
    imported = import_model(directory)
    rotation = Rotation.parse(sites)
    values: dict[str, Any] = {
        "rotation": rotation,
        "basis": rotation.basis(dimensions(imported.description)) if rotation.sites else None,
        "base": imported.checkpoint.fingerprint(),
        "model_type": imported.description.architecture.model_type,
        "grid": None,
        "base_kind": "float",
        "activations": 16,
        "adapter_type": "lora",
        "residual": False,
    }
    return AdapterBasis(**{**values, **fields})


def _plain(model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, local_files_only=True)
