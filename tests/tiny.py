"""Tiny random models of every family, of awkward sizes: hidden 96, ffn 152, 6 heads over 2, head sizes 16 and 20."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

TinyModel = Callable[..., Path]
"""The fixture `tiny_model`."""

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 96,
    "intermediate_size": 152,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GRANITE = {"embedding_multiplier": 2.0, "logits_scaling": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"head_dim": 20}),
    "llama16": ("LlamaConfig", {"head_dim": 16}),
    "llama-bias": ("LlamaConfig", {"head_dim": 16, "attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("LlamaConfig", {"head_dim": 16, "tie_word_embeddings": True}),
    "llama3-rope": ("LlamaConfig", {"head_dim": 16, "rope_parameters": LLAMA3_ROPE}),
    "smollm3": ("SmolLM3Config", {"head_dim": 16, "num_hidden_layers": 4}),
    "mistral": ("MistralConfig", {"head_dim": 16, "sliding_window": 32}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 20}),
    "qwen3-16": ("Qwen3Config", {"head_dim": 16}),
    "phi3": ("Phi3Config", {}),
    "granite": ("GraniteConfig", GRANITE),
    "olmo2": ("Olmo2Config", {}),
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 32}),
    "gemma3": (
        "Gemma3TextConfig",
        {"head_dim": 16, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {"head_dim": 20, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40},
    ),
}


def save_tiny(name: str, directory: Path, **changes: Any) -> Path:
    """Write the tiny model of that name: seed 0, float32, norm gains and biases away from their neutral values."""
    config_class, special = MODELS[name]
    config = getattr(transformers, config_class)(**{**COMMON, **special, **changes})
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or parameter_name.endswith("bias"):
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(directory)
    return directory


def give_voice(directory: Path) -> Path:
    """A copy of a tiny model, made once, that has a tokenizer: the model itself, which tests share, stays without."""
    voiced = directory.with_name(directory.name + "-voiced")
    if not voiced.exists():
        add_tokenizer(shutil.copytree(directory, voiced))
    return voiced


def add_tokenizer(directory: Path) -> Path:
    """Put a tokenizer of single characters beside a tiny model."""
    vocabulary = {chr(32 + index): index for index in range(95)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory
