"""What tests of fine-tuning share: records to train on, and the loss of a saved adapter."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rqc.compiler.finetune.data import Examples, load_examples, read_training_tokenizer, split
from rqc.models.adapter import Adapter
from rqc.models.fake_quant import quantize_inputs, training_grids
from rqc.models.grid import quantize
from rqc.models.nf4 import NormalFloat, quantize_levels
from rqc.models.reference import Reference


def write_records(path: Path, count: int) -> Path:
    """Sums as text, of different lengths."""
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(count):
            a, b = draw.randrange(100), draw.randrange(100)
            file.write(json.dumps({"text": f"{a} + {b} = {a + b}" + "!" * draw.randrange(30)}) + "\n")
    return path


def held_out(model: Path, data: Path, count: int, seq_len: int = 64, seed: int = 0) -> Examples:
    """The records that a fine-tune with eval_split=count evaluates on."""
    examples = load_examples(data, read_training_tokenizer(model), seq_len=seq_len, vocab_size=96)
    found = split(examples, count, seed)[1]
    assert found is not None
    return found


def merged(model: Path, directory: Path) -> Reference:
    """The model that an adapter directory describes, made without peft: merged into what the engine would hold, or
    beside 8-bit kernels, which round their input for themselves."""
    reference = Reference.load(model)
    adapter = Adapter.open(directory, reference.description)
    basis = adapter.basis
    assert basis is not None
    tied = reference.description.architecture.tied
    branched = basis.activations == 8 and basis.grid is not None and adapter.kind not in ("qalora", "qahira")
    beside: dict[str, Any] = {}
    reference.fold(basis.rotation, tied=tied)
    for claim in reference.description.claims:
        if not claim.quantized:
            continue
        w = reference.parts[claim.weight].weight.double().numpy()
        if (residual := adapter.residual.get(claim.weight)) is not None:
            w = w - residual.dense()
        if basis.grid is not None:
            w = quantize(w, basis.grid).dequantize().astype(np.float64)
        elif basis.base_kind == "nf4":
            w = quantize_levels(w, NormalFloat()).dequantize().astype(np.float64)
        if (delta := adapter.deltas.get(claim.weight)) is not None:
            merged = delta.merged(w)
            if branched:
                assert delta.magnitude is None
                beside[claim.weight] = torch.from_numpy(merged - w).float()
            else:
                w = merged
        reference.set_weight(claim.weight, w.astype(np.float32))
    reference.rotate_online(basis.rotation, tied=tied)
    for name, matrix in beside.items():
        _add(reference.parts[name].module, matrix)
    if basis.activations < 16:
        group = basis.grid.group_size if basis.grid is not None else 32
        quantize_inputs(reference, training_grids(reference.description, basis.activations, group))
    return reference


def _add(linear: Any, matrix: torch.Tensor) -> None:
    """y ← y + x Eᵀ for x as it is before hooks that are registered later change it."""
    seen: list[torch.Tensor] = []
    linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    linear.register_forward_hook(lambda _, args, y: y + torch.nn.functional.linear(seen.pop(), matrix))


@torch.inference_mode()
def loss(model: Any, examples: Examples) -> float:
    """Mean over the predicted tokens, one example at a time."""
    total = tokens = 0.0
    for place in range(len(examples)):
        example = examples[place]
        ids, labels = example["input_ids"][None], example["labels"][None]
        count = int((labels[:, 1:] != -100).sum())
        total += float(model(input_ids=ids, labels=labels, use_cache=False).loss) * count
        tokens += count
    return total / tokens
