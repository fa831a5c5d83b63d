"""adapter_config.json: which scale each linear's update has, and what is refused because it is no plain update.

Sources: peft's LoraConfig (0.21), LoRA (arXiv 2106.09685), rsLoRA (arXiv 2312.03732), DoRA (arXiv 2402.09353), QA-LoRA
(arXiv 2309.14717). fan_in_fan_out needs no care: it tells how a base weight is stored, A and B are the same.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rqc.runtime.errors import InputError, UnsupportedModelError

CONFIG_FILE = "adapter_config.json"
_MERGE = "merge it with peft (merge_and_unload) and compile the merged model"

_CONVERT = "convert it: peft.tuners.lora.conversion.convert_to_lora, then save_pretrained"
_PLAIN = "save it as plain LoRA: save_pretrained(DIR, path_initial_model_for_weight_conversion=INITIAL_ADAPTER)"

REFUSED = {
    "modules_to_save": ("whole modules trained beside it", _MERGE),
    "lora_bias": ("biases in its B factors", _MERGE),
    "layer_replication": ("layers used several times", "compile the model with its layers written out"),
    "alora_invocation_tokens": ("an update that starts at a token of the prompt", "train it as plain LoRA"),
    "target_parameters": ("updates of parameters outside of linears", _MERGE),
    "trainable_token_indices": ("rows of the embedding trained beside it", _MERGE),
    "use_bdlora": ("block-diagonal factors", _CONVERT),
    "arrow_config": ("a choice among adapters for every token", "give one of its adapters"),
    "kasa_config": ("a base with truncated singular values", _MERGE),
    "monteclora_config": ("factors drawn at random", _CONVERT),
    "megatron_config": ("Megatron's split linears", "save it from plain transformers"),
}
"""Keys of peft that change the function: what the adapter then holds, and the way out."""

HARMLESS = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying"),
    *("eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern"),
    *("layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core"),
    *("peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config"),
    *("target_modules", "task_type", "use_dora", "use_qalora", "use_rslora", "velora_config"),
}
"""Keys that are read here, or that concern training alone (VeLoRA changes a gradient)."""

NO_UPDATES = (
    *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT"),
    *("TRAINABLE_TOKENS", "CARTRIDGE"),
)
"""Types of peft that put something beside the linears instead of changing them."""

CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations that take a part out of the base weights: the update is one of another base."""


@dataclass(frozen=True)
class AdapterConfig:
    """The conventions of a PEFT LoRA directory. `qalora_group`: peft's use_qalora group size, None without."""

    rank: int
    alpha: float
    rslora: bool = False
    dora: bool = False
    qalora_group: int | None = None
    ranks: tuple[tuple[str, int], ...] = ()
    alphas: tuple[tuple[str, float], ...] = ()

    def rank_of(self, path: str) -> int:
        """The rank of the module at a path: that of the first pattern which fits, as in peft."""
        return next((rank for pattern, rank in self.ranks if _fits(pattern, path)), self.rank)

    def scale_of(self, path: str) -> float:
        """c of ΔW = c B A: alpha / r, with rsLoRA alpha / √r."""
        alpha = next((alpha for pattern, alpha in self.alphas if _fits(pattern, path)), self.alpha)
        rank = self.rank_of(path)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    @classmethod
    def read(cls, directory: Path) -> AdapterConfig:
        """The configuration of an adapter directory.

        Raises InputError for a missing or damaged one, UnsupportedModelError, naming the key, for what is no plain
        low-rank update of linears.
        """
        values = _load(directory)
        _check_supported(values)
        flags = {key: _value(values, key, bool, False) for key in ("use_rslora", "use_dora", "use_qalora")}
        ranks, alphas = _patterns(values, "rank_pattern"), _patterns(values, "alpha_pattern")
        return cls(
            rank=_positive(values, "r"),
            alpha=_number(values.get("lora_alpha", 8), "lora_alpha"),
            rslora=flags["use_rslora"],
            dora=flags["use_dora"],
            qalora_group=_positive(values, "qalora_group_size", 16) if flags["use_qalora"] else None,
            ranks=tuple((pattern, _positive(ranks, pattern)) for pattern in ranks),
            alphas=tuple((pattern, _number(alpha, pattern)) for pattern, alpha in alphas.items()),
        )


def _fits(pattern: str, path: str) -> bool:
    """peft's rule: the end of the path, after a dot or from the start."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def _load(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise InputError(f"{directory} has no {CONFIG_FILE}", hint=_where(directory))
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}", hint="save the adapter again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object", hint="save the adapter again")
    return value


def _where(directory: Path) -> str:
    """The hint for a directory that is no adapter."""
    if (directory / "config.json").is_file():
        return "it is a model: give it as MODEL_DIR, and as adapter a directory that peft's save_pretrained wrote"
    inside = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG_FILE}"))
    if inside:
        return f"give one of the adapters in it: {', '.join(inside[:5])}"
    return "give a directory that peft's save_pretrained or rqc finetune wrote"


def _check_supported(values: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError, naming the key and the reason, for an adapter that is no plain update."""
    kind = str(values.get("peft_type")).rsplit(".", 1)[-1].upper()
    if kind != "LORA":
        raise UnsupportedModelError(
            f"the adapter is of peft_type {values.get('peft_type')!r}, not LORA",
            hint="train a LoRA: it changes no linears" if kind in NO_UPDATES else _CONVERT,
        )
    if (bias := values.get("bias", "none")) != "none":
        raise UnsupportedModelError(f"the adapter has bias={bias!r}: biases trained beside it", hint=_MERGE)
    init = str(values.get("init_lora_weights", True)).lower()
    if init.startswith(CHANGES_BASE):
        raise UnsupportedModelError(
            f"the adapter has init_lora_weights={values['init_lora_weights']!r}: it belongs to base weights that peft "
            "changed when training began",
            hint=_PLAIN if init.startswith(CHANGES_BASE[:3]) else "rqc finetune --init loftq makes one that compiles",
        )
    for key, (what, hint) in REFUSED.items():
        if values.get(key) not in (None, False, [], {}):
            raise UnsupportedModelError(f"the adapter has {key}: {what}", hint=hint)
    for key in sorted(values.keys() - REFUSED.keys() - HARMLESS):
        if values[key] not in (None, False, [], {}, ""):
            raise UnsupportedModelError(
                f"{CONFIG_FILE} has {key!r}, which rqc does not know",
                hint=f"if it changes nothing at inference, remove it; otherwise {_CONVERT}",
            )


def _value(values: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    value = values.get(key, default)
    if not isinstance(value, kind):
        raise InputError(f"{CONFIG_FILE}: {key} is {value!r}", hint="save the adapter again")
    return value


def _positive(values: Mapping[str, Any], key: str, default: Any = None) -> int:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{CONFIG_FILE}: {key} is {value!r}", hint="a whole number from 1; save the adapter again")
    return value


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{CONFIG_FILE}: {key} is {value!r}", hint="a finite number; save the adapter again")
    return float(value)


def _patterns(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    patterns: dict[str, Any] = _value({key: values.get(key) or {}}, key, dict, {})
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise InputError(f"{CONFIG_FILE}: {key} {pattern!r} is no pattern: {error}", hint="correct it") from error
    return patterns
