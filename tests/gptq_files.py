"""GPTQ checkpoints read back by the layout's own definition, and what transformers computes with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file

HALF = 2e-3
"""What scales and tables in float16 may move."""
IDS = np.arange(5, 45) % 96
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}


def read(directory: Path) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors, linears dequantized by the layout's own definition."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    stored = {name: value for file in set(index.values()) for name, value in load_file(directory / file).items()}
    assert set(stored) == set(index)
    found = {name: value.float() for name, value in stored.items() if name.endswith((".weight", ".bias"))}
    for name, words in stored.items():
        if not name.endswith(".qweight"):
            continue
        stem = name.removesuffix(".qweight")
        scales, groups = stored[f"{stem}.scales"].float(), stored[f"{stem}.g_idx"].long()
        codes = torch.stack([(words >> 4 * place) & 15 for place in range(8)], 1).reshape(-1, words.shape[1])
        zeros = torch.stack([(stored[f"{stem}.qzeros"] >> 4 * place) & 15 for place in range(8)], 2).flatten(1) + 1
        found[f"{stem}.weight"] = ((codes - zeros[groups]).float() * scales[groups]).T.contiguous()
    return found


def logits(directory: Path) -> NDArray[np.float32]:
    """transformers' own model of this config, with the checkpoint's weights, in float32."""
    config = transformers.AutoConfig.from_pretrained(directory)
    del config.quantization_config
    net = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    missing, unexpected = net.load_state_dict(read(directory), strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    net.tie_weights()
    with torch.inference_mode():
        found: NDArray[np.float32] = net(torch.from_numpy(IDS)[None]).logits[0].numpy()
    return found
