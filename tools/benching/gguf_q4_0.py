"""A Llama checkpoint as GGUF with every matrix in Q4_0: python gguf_q4_0.py MODEL_DIR FILE (the peers' Python).

llama.cpp's own converter would need the tokenizer to be one that it knows; a benchmark feeds token ids and needs none.
The norms stay float32. Rows of q and k are reordered, for llama.cpp rotates neighbouring pairs where Hugging Face
rotates halves.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tensors(model: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The checkpoint's tensors, one after the other."""
    safe_open: Any = importlib.import_module("safetensors").safe_open
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                yield name, opened.get_tensor(name).astype(np.float32)


def gguf_name(name: str) -> str:
    """blk.3.attn_q.weight for model.layers.3.self_attn.q_proj.weight"""
    stem = name.removesuffix(".weight")
    if stem in NAMES:
        return f"{NAMES[stem]}.weight"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[part]}.weight"


def reordered(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows [head, half, i] as [head, i, half]."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def main() -> None:
    model, target = Path(sys.argv[1]), Path(sys.argv[2])
    gguf: Any = importlib.import_module("gguf")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "llama":
        sys.exit(f"{model} is a {config['model_type']}, not a llama")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    rope = config.get("rope_parameters") or config
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    q4_0 = gguf.GGMLQuantizationType.Q4_0
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    for name, value in tensors(model):
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            value = reordered(value, heads if "q_proj" in name else kv_heads)
        if value.ndim == 2:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(value, q4_0), raw_dtype=q4_0)
        else:
            writer.add_tensor(gguf_name(name), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
