"""The files that a GGUF lacks, made from its metadata: config.json, generation_config.json and the tokenizer's.

The conversion is transformers'. It passes over some of what a GGUF says; that is either put right here or refused, for
the model would be another one. A config.json or tokenizer.json that lies beside the GGUF is taken instead.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from rqc.models.families import family_of
from rqc.models.gguf_source import WAY_OUT, GgufFile, read_gguf
from rqc.models.json_files import read_object
from rqc.runtime.errors import CheckpointError, UnsupportedModelError

MODEL_TYPES = {
    **{name: name for name in ("llama", "qwen2", "qwen3", "phi3", "gemma2")},
    "gemma3": "gemma3_text",
}
"""Hugging Face's model_type by GGUF's architecture, for those that transformers, gguf and rqc all know."""
CONVERTED = {
    *("vocab_size", "context_length", "block_count", "embedding_length", "feed_forward_length"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count"),
    "rope.scaling.original_context_length",  # is the context length unless another key scales
}
WINDOW, SCORE_CAP, LOGIT_CAP = "attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"
CONVERTED_ALSO = {"phi3": {WINDOW}, "gemma2": {WINDOW, SCORE_CAP, LOGIT_CAP}, "gemma3": {WINDOW}}
SCALED_ROPE = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Factors of the rotary frequencies: they follow from a full config.json, and only from that."""
LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}
"""Layers of the Gemma models of 27B, whose scores are scaled by the width per head; llama.cpp tells them so too."""
SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
BYTE_LEVEL = (None, "default", "gpt-2")
"""Names of GPT-2's pre-tokenizer, which transformers also takes where it does not know a name."""

_made: dict[Path, tuple[tuple[int, int], TemporaryDirectory[str]]] = {}


def directory_of(gguf: Path) -> Path:
    """A Hugging Face directory without weights for a GGUF file; made once, removed when the process ends.

    Raises CheckpointError for a file that is damaged, UnsupportedModelError for a model that cannot be converted.
    """
    state = gguf.stat()
    stamp = (state.st_mtime_ns, state.st_size)
    if gguf not in _made or _made[gguf][0] != stamp:
        made = TemporaryDirectory(prefix="rqc-gguf-")
        _convert(read_gguf(gguf), Path(made.name))
        _made[gguf] = stamp, made
    return Path(_made[gguf][1].name)


def gguf_of(directory: Path) -> Path | None:
    """The GGUF file that a directory was made for by `directory_of`."""
    return next((gguf for gguf, (_, made) in _made.items() if Path(made.name) == directory), None)


def _convert(file: GgufFile, target: Path) -> None:
    beside = file.path.parent
    config = _full_config(beside / "config.json")
    if config is None:
        config = _config(file)
    elif (beside / "generation_config.json").is_file():
        shutil.copyfile(beside / "generation_config.json", target / "generation_config.json")
    _write(target / "config.json", config)
    if not (target / "generation_config.json").exists():
        _write(target / "generation_config.json", _generation(file))
    if (beside / "tokenizer.json").is_file():
        for name in SIDE_FILES:
            if (beside / name).is_file():
                shutil.copyfile(beside / name, target / name)
    else:
        _tokenizer(file, target)


def _full_config(path: Path) -> dict[str, Any] | None:
    """A config.json beside the GGUF, if it is one: some hold nothing but the model_type."""
    if not path.is_file():
        return None
    config = read_object(path)
    return config if "num_hidden_layers" in config else None


def _config(file: GgufFile) -> dict[str, Any]:
    """config.json by transformers, put right where it passes over what the GGUF says."""
    from transformers import AutoConfig

    model_type = _model_type(file)
    _refuse_what_is_lost(file)
    try:
        converted = AutoConfig.from_pretrained(file.path.parent, gguf_file=file.path.name, local_files_only=True)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"transformers cannot convert the config of {file.path}: {error}", hint=_config_beside()
        ) from error
    told = converted.to_diff_dict()
    config = {key: value for key, value in told.items() if key != "transformers_version" and not key.startswith("_")}
    if "token_embd.weight" in file.tensors:
        config["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{name}_token_id"] = _token_id(file, key)  # None where the class has a default of its own
    config["head_dim"] = _head_dim(file)
    config["rms_norm_eps"] = float(str(np.float32(config["rms_norm_eps"])))  # 1e-05, not its float32 in full
    config |= _biases(file, model_type)
    if model_type == "phi3":
        config["sliding_window"] = file.get(WINDOW) or None
    if model_type == "gemma2":
        config[SCORE_CAP], config[LOGIT_CAP] = file.get(SCORE_CAP, 50.0), file.get(LOGIT_CAP, 30.0)
    if file.architecture in LARGEST_GEMMA:
        largest = file.get("block_count") == LARGEST_GEMMA[file.architecture]
        width = file.get("embedding_length") // file.get("attention.head_count")
        config["query_pre_attn_scalar"] = width if largest else config["head_dim"]
    return config


def _model_type(file: GgufFile) -> str:
    model_type = MODEL_TYPES.get(file.architecture)
    if model_type is None:
        known = ", ".join(sorted(MODEL_TYPES))
        raise UnsupportedModelError(
            f"{file.path}: a GGUF of architecture {file.architecture!r} is not supported",
            hint=f"supported: {known}; of another model, {WAY_OUT}",
        )
    family_of(model_type)
    return model_type


def _refuse_what_is_lost(file: GgufFile) -> None:
    """Raise UnsupportedModelError for metadata or tensors that the conversion would leave out of the function."""
    known = CONVERTED | CONVERTED_ALSO.get(file.architecture, set())
    stem = f"{file.architecture}."
    for key, value in file.metadata.items():
        if key.startswith(stem) and key.removeprefix(stem) not in known and value and value != "none":
            raise UnsupportedModelError(
                f"{file.path} says {key} = {value}, which has no place in a converted config", hint=_config_beside()
            )
    scaled = next((name for name in SCALED_ROPE if name in file.tensors), None)
    if scaled:
        raise UnsupportedModelError(
            f"{file.path} scales its rotary frequencies ({scaled}), which has no place in a converted config",
            hint=_config_beside(),
        )
    head = _head_dim(file)
    for key in ("attention.value_length", "rope.dimension_count"):
        if file.get(key, head) != head:
            raise UnsupportedModelError(
                f"{file.path} says {key} = {file.get(key)} with heads of {head}", hint=_config_beside()
            )


def _head_dim(file: GgufFile) -> int:
    heads, width = file.get("attention.head_count"), file.get("embedding_length")
    if not isinstance(heads, int) or not isinstance(width, int) or heads < 1:
        raise UnsupportedModelError(
            f"{file.path} says {heads} heads over a width of {width}", hint=f"rqc wants one number each; {WAY_OUT}"
        )
    return int(file.get("attention.key_length", width // heads))


def _biases(file: GgufFile, model_type: str) -> dict[str, bool]:
    """Whether a Llama or Qwen3 has biases: their tensors are there."""
    if model_type not in ("llama", "qwen3"):
        return {}
    found = {"attention_bias": "blk.0.attn_q.bias" in file.tensors}
    return found if model_type == "qwen3" else {**found, "mlp_bias": "blk.0.ffn_up.bias" in file.tensors}


def _generation(file: GgufFile) -> dict[str, Any]:
    """Token ids that begin, end and pad a text. The end of a turn (eot, eom) ends one too, as it does in llama.cpp."""
    ends = [end for name in ("eos", "eot", "eom") if (end := _token_id(file, name)) is not None]
    ids = {"bos_token_id": _token_id(file, "bos"), "pad_token_id": _token_id(file, "padding")}
    return {"eos_token_id": list(dict.fromkeys(ends)), **{name: id_ for name, id_ in ids.items() if id_ is not None}}


def _token_id(file: GgufFile, name: str) -> int | None:
    """A special token's id, if the GGUF names one that the embedding has (a padding token may lie outside of it)."""
    found = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
    table = file.tensors.get("token_embd.weight")
    return found if isinstance(found, int) and table is not None and 0 <= found < table.shape[0] else None


def _tokenizer(file: GgufFile, target: Path) -> None:
    """tokenizer.json and its companions by transformers; nothing if the GGUF has no vocabulary."""
    if file.metadata.get("tokenizer.ggml.model", "no_vocab") in ("no_vocab", "none"):
        return
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(
            file.path.parent, gguf_file=file.path.name, local_files_only=True
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OSError) as error:
        raise UnsupportedModelError(
            f"transformers cannot convert the tokenizer of {file.path}: {error}", hint=_tokenizer_beside()
        ) from error
    _split_as_named(file, tokenizer.backend_tokenizer)
    tokenizer.model_max_length = file.get("context_length", tokenizer.model_max_length)
    tokenizer.save_pretrained(target)
    path = target / "tokenizer_config.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    _write(path, {key: value for key, value in entries.items() if key not in ("is_local", "local_files_only")})


def _split_as_named(file: GgufFile, tokenizer: Any) -> None:
    """Put right a byte-level pre-tokenizer that transformers does not know and takes for GPT-2's.

    SmolLM's splits off single digits first (llama.cpp, llama-vocab.cpp: LLAMA_VOCAB_PRE_TYPE_SMOLLM).
    """
    from tokenizers import pre_tokenizers

    name = file.metadata.get("tokenizer.ggml.pre")
    if file.metadata["tokenizer.ggml.model"] != "gpt2" or name in BYTE_LEVEL:
        return
    if not isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):
        return
    if name != "smollm":
        raise UnsupportedModelError(
            f"{file.path}: its pre-tokenizer {name!r} is unknown to transformers", hint=_tokenizer_beside()
        )
    digits, rest = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])


def _config_beside() -> str:
    return f"put the model's own config.json beside the GGUF, or {WAY_OUT}"


def _tokenizer_beside() -> str:
    return f"put the model's own tokenizer.json beside the GGUF, or {WAY_OUT}"


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def scaled_rope(names: Iterable[str]) -> set[str]:
    """Those tensors of a GGUF that follow from the rotary scaling in its config.json."""
    return {name for name in names if name in SCALED_ROPE}


def rope_is_scaled(config: Mapping[str, Any]) -> bool:
    """Whether a config.json scales the rotary frequencies."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return bool(rope.get("rope_type", rope.get("type", "default")) != "default")
