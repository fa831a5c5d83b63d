"""manifest.json of an engine: what it must hold and how untrusted bytes become it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from rqc.runtime.errors import EngineFormatError

FORMAT = "rqc-engine"
FORMAT_VERSION = 1
MAX_MANIFEST = 16 << 20  # bytes
_HINT = "copy or compile the engine again"

# what a key that the runtime relies on holds, if it is there; nested keys behind a dot
_TYPES: dict[str, type | tuple[type, ...]] = {
    "target": str,
    "dtype": str,
    "weights": str,
    "plans": list,
    "profile": dict,
    "sms": list,
    "context_length": int,
    "graph": dict,
    "graph.cache": str,
    "graph.layers": int,
    "graph.kv_heads": (int, list),
    "graph.head_dim": (int, list),
    "graph.cache_dtype": str,
    "graph.cache_bytes": int,
    "graph.vocab_size": int,
    "generation": dict,
    "generation.eos_token_ids": list,
    "generation.bos_token_id": (int, type(None)),
    "generation.pad_token_id": (int, type(None)),
    "generation.add_bos": bool,
    "architecture": dict,
    "rotation": (dict, type(None)),
    "provenance": dict,
    "layers": list,
    "adapter": (dict, type(None)),
    "compensation": dict,
    "sparsity": dict,
    "adapter.names": list,
}
_POSITIVE = (
    "context_length",
    "graph.layers",
    "graph.kv_heads",
    "graph.head_dim",
    "graph.vocab_size",
    "graph.cache_bytes",
)
_WORDS = {"graph.cache": ("shared", "concat")}
# what a record of "plans" holds; what begins with "?" may be absent
_PLAN: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "entry": str,
    "flavour": str,
    "version": str,
    "sms": list,
    "profile": dict,
    "?verified": bool,
    "?reason": (str, type(None)),
}
_FLAVOURS = ("tensorrt-rtx", "tensorrt")


def _damaged(what: str) -> EngineFormatError:
    return EngineFormatError(f"manifest.json: {what}", hint=_HINT)


def parse_manifest(data: bytes) -> dict[str, Any]:
    """The manifest in `data`, checked. Raises EngineFormatError; for a newer format the hint says to update rqc."""
    try:
        manifest = json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise _damaged(f"not valid JSON ({str(error)[:80]})") from error
    if not isinstance(manifest, dict):
        raise _damaged("not a JSON object")
    check_manifest(manifest)
    return manifest


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise ValueError("a key occurs twice")
    return keys


def _constant(word: str) -> Any:
    raise ValueError(f"{word} is no number")


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Raise EngineFormatError if the manifest is not one of this format or a key holds what it cannot."""
    if manifest.get("format") != FORMAT:
        raise _damaged(f"format is {str(manifest.get('format'))[:40]!r} instead of {FORMAT!r}: not an rqc engine")
    version: Any = manifest.get("format_version")
    if not _is(version, int) or version < 1:
        raise _damaged(f"format_version is {str(version)[:40]!r}")
    if version > FORMAT_VERSION:
        raise EngineFormatError(
            f"the engine has format {str(version)[:20]}; this rqc reads formats up to {FORMAT_VERSION}",
            hint="update rqc",
        )
    for key, kind in _TYPES.items():
        holder, _, inner = key.partition(".")
        value: Any = manifest.get(holder, ...)
        if inner:
            value = value.get(inner, ...) if isinstance(value, Mapping) else ...
        if value is not ...:
            _check_value(key, value, kind)
    _check_entries(manifest.get("entries"))
    _check_plans(manifest.get("plans", []), manifest["entries"])
    if "profile" in manifest:
        _check_profile(manifest["profile"], "profile")
    if not _all_positive(manifest.get("sms", [])):
        raise _damaged(f"sms is {str(manifest['sms'])[:40]!r}")


def _is(value: object, kind: type | tuple[type, ...]) -> bool:
    """isinstance, but True and False are no integers."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)


def _check_value(key: str, value: Any, kind: type | tuple[type, ...]) -> None:
    if not _is(value, kind):
        raise _damaged(f"{key} is {str(value)[:40]!r}")
    items = value if isinstance(value, list) else [value]
    if key in _POSITIVE and not all(_is(item, int) and item > 0 for item in items):
        raise _damaged(f"{key} is {str(value)[:40]!r}, not positive")
    if key in _WORDS and value not in _WORDS[key]:
        raise _damaged(f"{key} is {value[:40]!r} instead of one of {', '.join(_WORDS[key])}")
    if key == "adapter.names" and not (items and all(_is(item, str) and item for item in items)):
        raise _damaged(f"{key} is {str(value)[:40]!r}")
    if key == "adapter.names" and len(set(items)) < len(items):
        raise _damaged(f"{key} has a name twice")
    if key == "generation.eos_token_ids" and not all(_is(item, int) for item in items):
        raise _damaged(f"{key} is {str(value)[:40]!r}")


def _check_entries(entries: object) -> None:
    if not isinstance(entries, Mapping):
        raise _damaged("entries is missing or no object")
    for name, entry in entries.items():
        if not isinstance(entry, Mapping) or set(entry) != {"offset", "size", "sha256"}:
            raise _damaged(f"entries: {str(name)[:80]!r} has no offset, size and sha256")
        places = (entry["offset"], entry["size"])
        if not all(_is(value, int) and value >= 0 for value in places):
            raise _damaged(f"entries: {str(name)[:80]!r} has offset and size {str(places)[:60]}")
        if not isinstance(entry["sha256"], str) or not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
            raise _damaged(f"entries: {str(name)[:80]!r} has no valid sha256")


def _check_plans(plans: list[Any], entries: Mapping[str, Any]) -> None:
    for plan in plans:
        if not isinstance(plan, Mapping):
            raise _damaged(f"plans has {str(plan)[:40]!r}")
        for key, kind in _PLAN.items():
            name = key.removeprefix("?")
            if not (_is(plan.get(name), kind) or (key != name and name not in plan)):
                raise _damaged(f"plans: {name} is {str(plan.get(name))[:40]!r}")
        if not plan["name"] or not plan["version"]:
            raise _damaged("plans: a plan has no name or no version")
        if plan["flavour"] not in _FLAVOURS:
            raise _damaged(f"plans: flavour is {plan['flavour'][:40]!r} instead of one of {', '.join(_FLAVOURS)}")
        if plan["entry"] != f"device/{plan['name']}.plan" or "/" in plan["name"]:
            raise _damaged(f"plans: the plan {plan['name'][:40]!r} is in {plan['entry'][:80]!r}")
        if plan["entry"] not in entries:
            raise _damaged(f"plans: {plan['name'][:40]!r} is in {plan['entry'][:80]!r}, which is no entry")
        # standard TensorRT builds for the GPU that it finds, and checks itself that it is back on one like it
        if not _all_positive(plan["sms"]) or not (plan["sms"] or plan["flavour"] == "tensorrt"):
            raise _damaged(f"plans: sms is {str(plan['sms'])[:40]!r}")
        _check_profile(plan["profile"], "plans")
    if len({plan["name"] for plan in plans}) < len(plans):
        raise _damaged("plans has a name twice")


def _check_profile(profile: Mapping[str, Any], where: str) -> None:
    for name in ("batch", "prompt"):
        sizes = profile.get(name)
        if not (isinstance(sizes, list) and len(sizes) == 3 and _all_positive(sizes) and sizes == sorted(sizes)):
            raise _damaged(f"{where}: {name} of a profile is {str(sizes)[:40]!r}, not min, opt and max")
    if not _all_positive([profile.get("context")]):
        raise _damaged(f"{where}: context of a profile is {str(profile.get('context'))[:40]!r}")


def _all_positive(values: list[Any]) -> bool:
    return all(_is(value, int) and value > 0 for value in values)
