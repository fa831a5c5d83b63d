"""The JSON files of a model directory, and what a config.json must hold before anything is built from it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rqc.runtime.errors import CheckpointError

SIZES = (
    *("hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "num_experts_per_tok"),
)
"""Keys of config.json that count something, at least one of it."""
RATIOS = ("rope_theta", "factor", "rope_local_base_freq", "query_pre_attn_scalar")
"""Keys whose powers and quotients make RoPE tables and scales: finite and above zero, or those are no numbers."""
_HINT = "download it again"


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError when it cannot be read or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}", hint=_HINT) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", hint="check its permissions") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object", hint=_HINT)
    return value


def check_config(config: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError, naming the key, for a size or ratio that no model has; keys that are absent have
    defaults."""
    for key in SIZES:
        value = config.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise _impossible(path, key, value, "a whole number from 1")
    heads, shared = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and shared and heads % shared:
        raise _impossible(path, "num_key_value_heads", shared, f"a divisor of num_attention_heads, {heads}")
    _check_ratios(config, path)


def _check_ratios(values: Mapping[str, Any], path: Path) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and (key in ("rope_parameters", "rope_scaling") or key.endswith("_attention")):
            _check_ratios(value, path)
        elif key in RATIOS and value is not None and not _is_positive(value):
            raise _impossible(path, key, value, "a finite number above 0")


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _impossible(path: Path, key: str, value: object, wanted: str) -> CheckpointError:
    return CheckpointError(f"{path}: {key} is {str(value)[:40]!r}", hint=f"{key} is {wanted}; {_HINT}")
