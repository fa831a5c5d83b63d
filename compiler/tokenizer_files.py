"""What a model directory says of its tokens: special ids, chat template, and a tokenizer.json where it has none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from rqc.compiler.text import read_tokenizer
from rqc.models.json_files import read_object
from rqc.runtime.errors import CheckpointError

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
TOKENIZER_FILES = ("tokenizer.json", *SETTINGS)


def special_ids(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """eos_token_ids, bos_token_id, pad_token_id and add_bos, as an engine's manifest has them.

    From generation_config.json where it has them, else from `config`, a full Hugging Face config. Raises
    CheckpointError for a value that is no id.
    """
    known = {**config, **optional_object(directory / "generation_config.json")}
    eos = known.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    bos, pad = known.get("bos_token_id"), known.get("pad_token_id")
    for token in [*ids, *(token for token in (bos, pad) if token is not None)]:
        if isinstance(token, bool) or not isinstance(token, int):
            raise CheckpointError(
                f"{directory}: {str(token)[:40]!r} stands where a special token's id belongs",
                hint="correct eos_token_id, bos_token_id or pad_token_id in generation_config.json and config.json",
            )
    return {
        "eos_token_ids": ids,
        "bos_token_id": bos,
        "pad_token_id": pad,
        "add_bos": bool(optional_object(directory / "tokenizer_config.json").get("add_bos_token"))
        and not _adds_bos(directory, bos),
    }


def _adds_bos(directory: Path, bos: int | None) -> bool:
    """Whether tokenizer.json puts the beginning-of-text token in by itself."""
    tokenizer = read_tokenizer(directory)
    return tokenizer is not None and bool(tokenizer.encode("a").ids[:1] == [bos])


def check_template(directory: Path) -> None:
    """Raise CheckpointError for a chat template that is no text."""
    template = directory / "chat_template.jinja"
    try:
        if template.is_file():
            template.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{template} is not UTF-8: {error}", hint="download it again") from error


def converted_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a model that only has a sentencepiece or vocabulary file, as transformers converts it; None
    where there is no tokenizer at all, or none of that form. Raises CheckpointError if transformers cannot read it."""
    if not any((directory / name).is_file() for name in ("tokenizer.model", "vocab.json")):
        return None
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise CheckpointError(
            f"transformers cannot read the tokenizer of {directory}: {error}", hint="download the model again"
        ) from error
    converted: Tokenizer | None = getattr(loaded, "backend_tokenizer", None)
    return converted


def optional_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} where there is no file. Raises CheckpointError for anything else in it."""
    return read_object(path) if path.is_file() else {}
