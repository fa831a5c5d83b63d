"""A Hugging Face directory written as a GGUF file, the way that llama.cpp's converter does it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers.pre_tokenizers import ByteLevel

KINDS = gguf.GGMLQuantizationType
F32 = KINDS.F32
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot|>")


def write_gguf(
    model: Path,
    path: Path,
    kind: gguf.GGMLQuantizationType = F32,
    *,
    architecture: str | None = None,
    extra: Mapping[str, int | float | str] | None = None,
    more: Mapping[str, NDArray[Any]] | None = None,
    pre: str | None = None,
) -> Path:
    """Write the model as `path`; matrices whose rows fill blocks as `kind`, all else in float32.

    architecture: another one than the model's. extra: metadata by their full keys. more: further float32 tensors.
    pre: write a byte-level tokenizer whose pre-tokenizer has this name; the vocabulary must have 260 entries.
    """
    config = json.loads((model / "config.json").read_text())
    name = architecture or ARCHITECTURES.get(config["model_type"], config["model_type"])
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, name)
    _add_metadata(writer, config)
    if pre is not None:
        _add_tokenizer(writer, pre)
    for key, value in (extra or {}).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(key, value)
    for stored, values in {**stored_tensors(model), **(more or {})}.items():
        fits = values.ndim == 2 and values.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        used = kind if fits else F32
        writer.add_tensor(stored, gguf.quantize(values.astype(np.float32), used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored_tensors(model: Path) -> dict[str, NDArray[np.float32]]:
    """The tensors by their GGUF names, in GGUF's form."""
    config = json.loads((model / "config.json").read_text())
    name = ARCHITECTURES.get(config["model_type"], config["model_type"])
    kind = next(kind for kind, text in gguf.MODEL_ARCH_NAMES.items() if text == name)
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    found = {}
    for full, values in load_file(model / "model.safetensors").items():
        stem, suffix = full.rsplit(".", 1)
        module = stem.rsplit(".", 1)[-1]
        if name == "llama" and module in heads:
            values = _interleave(values, heads[module])
        if name.startswith("gemma") and module.endswith("norm"):
            values = values + 1
        found[f"{names.get_name(stem)}.{suffix}"] = np.ascontiguousarray(values, np.float32)
    return found


def _interleave(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """LlamaModel.permute of convert_hf_to_gguf.py."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _add_metadata(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if config["model_type"] in ("phi3", "gemma2", "gemma3_text"):
        writer.add_sliding_window(config["sliding_window"] or 0)
    if config["model_type"] == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def _add_tokenizer(writer: gguf.GGUFWriter, pre: str) -> None:
    """A token per byte and four special ones; no merges but one of spaces before digits, which "smollm" never makes."""
    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet())]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens[:-1], "12"])
    writer.add_token_types([gguf.TokenType.CONTROL] * 4 + [gguf.TokenType.NORMAL] * (len(tokens) - 4))
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(3)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
