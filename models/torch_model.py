"""A model directory as a transformers model in float32, whatever its weights are stored as."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rqc.models.checkpoint import model_directory, read_config
from rqc.models.gguf_files import gguf_of
from rqc.runtime.errors import CheckpointError


def load_torch_model(model: str | Path) -> torch.nn.Module:
    """The transformers model of a directory (or GGUF file) in float32 on the CPU, in evaluation mode.

    A GGUF's weights come through transformers' own loader, not through ours: the two check each other. Its config is
    the one that rqc made, for transformers' own conversion passes over parts of it. Raises CheckpointError where
    transformers cannot load the model or finds parameters without weights.
    """
    directory = model_directory(model)
    gguf = gguf_of(directory)
    source: dict[str, Any] = {"pretrained_model_name_or_path": directory}
    attention = "eager" if read_config(directory).get("attn_logit_softcapping") else "sdpa"  # which has no such cap
    try:
        if gguf is not None:
            config = AutoConfig.from_pretrained(directory, local_files_only=True)
            source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "config": config}
        with redirect_stderr(io.StringIO()):  # progress bars; what goes wrong is raised
            loaded, report = AutoModelForCausalLM.from_pretrained(
                **source,
                dtype=torch.float32,
                attn_implementation=attention,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"transformers cannot load {model}: {error}", hint="download it again") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{model} lacks {missing[0]!r}, which its config.json asks for", hint="download both again"
        )
    if gguf is not None:  # a plain float32 model by now: let it be treated as one
        loaded.hf_quantizer.remove_quantization_config(loaded)
    evaluated: torch.nn.Module = loaded.eval()
    return evaluated
