"""Adapters made by plain peft on a model directory, with random weights, and the logits of the peft model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


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


def peft_logits(model_dir: Path, adapter: Path, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits [n, vocab] of the model with its adapter, in float32 PyTorch."""
    model = PeftModel.from_pretrained(_plain(model_dir), str(adapter)).eval()
    with torch.inference_mode():
        logits: NDArray[np.float32] = model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()
    return logits


def mean_kl(reference: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Mean KL(reference ‖ found) per position, in nats."""
    p, q = (x.astype(np.float64) - x.astype(np.float64).max(-1, keepdims=True) for x in (reference, found))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _plain(model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, local_files_only=True)
