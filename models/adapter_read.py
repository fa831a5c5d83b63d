"""The tensors of an adapter as updates of the graph's linears, each tool's convention converted on the way.

Pooled adapters are held as the plain LoRA that they are. With x pooled by sums over g inputs, ΔW = c B A with the
columns of a compact A [r, G] repeated g times; the tools' own pooling differs by a factor (reference/adapters.md, 3.3):
the QA-LoRA repository takes means, c/g; peft's use_qalora takes means times G, c·G/g.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rqc.models.adapter_config import CONFIG_FILE, AdapterConfig
from rqc.models.adapter_names import expected_shape, graph_index, module_path, unknown_module
from rqc.models.adapter_tensors import read_tensors
from rqc.models.algebra import Read
from rqc.models.delta import Array, Delta
from rqc.models.description import EMBEDDING, HEAD, Description
from rqc.models.grid import BLOCK_SIZES
from rqc.runtime.errors import CheckpointError, InputError, UnsupportedModelError

_KEY = re.compile(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.[^.]+)?(?:\.weight)?")
"""module.lora_A.weight; an adapter's name may stand before "weight", and DoRA's vector may come without it."""
_MERGE = "merge it with peft (merge_and_unload) and compile the merged model"
_TABLE = re.compile(r"(?:.*\.)?(lm_head|embed_tokens)(?:\.base_layer)?\.weight")
"""Tables of the base model, which peft saves along where lm_head or the embedding is a target."""
_FOREIGN = (
    (re.compile(r"lora_embedding_[AB]"), "an update of an embedding", _MERGE),
    (re.compile(r"modules_to_save"), "a whole module trained beside it (modules_to_save)", _MERGE),
    (re.compile(r"lora_B.*\.bias$"), "a bias in a B factor (lora_bias)", _MERGE),
    (re.compile(r"\.bias$"), "a bias trained beside it", _MERGE),
    (re.compile(r"base_layer|token_adapter|trainable_tokens"), "weights of the base model", _MERGE),
    (re.compile(r"\.lora_[ab]$"), "MLX's factors", "convert it to a PEFT directory: A and B transposed"),
)
"""Keys that are no factors of a linear's update: what they are, and the way out."""


@dataclass
class _Parts:
    """The tensors of one module, with the keys that they have in the file."""

    tensors: dict[str, Array] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)


def without_tables(tensors: Mapping[str, Array], description: Description, read: Read | None) -> dict[str, Array]:
    """The tensors but for tables of the base, each of which must be the base's own.

    `read` gives the base's weights; without it a table is refused. Raises UnsupportedModelError for another table: it
    was trained, or has rows for added tokens.
    """
    rest = {}
    for key, values in tensors.items():
        match = _TABLE.fullmatch(key)
        if match is None:
            rest[key] = values
        elif read is None or not _is_base(values, HEAD if match[1] == "lm_head" else EMBEDDING, description, read):
            raise UnsupportedModelError(
                f"the adapter brings a table of its own, {key!r}: trained, or with tokens added", hint=_MERGE
            )
    return rest


def _is_base(values: Array, name: str, description: Description, read: Read) -> bool:
    """Whether a saved table is that of the base, but for rounding to 16 bits (2⁻⁸ of every value)."""
    try:
        own = read(name)
    except CheckpointError:
        if name != HEAD:
            raise
        own = read(EMBEDDING)  # tied: stored once
    return own.shape == values.shape and bool((np.abs(values - own) <= np.abs(own) / 256 + 2.0**-24).all())


def read_deltas(
    tensors: Mapping[str, Array], config: AdapterConfig, description: Description
) -> tuple[dict[str, Delta], bool]:
    """Updates by the graph's weight names, and whether their A factors were compact (pooled).

    Raises InputError, naming tensor and shapes, for factors that do not fit the model or each other,
    UnsupportedModelError for tensors that are no low-rank updates of linears.
    """
    index = graph_index(description)
    deltas: dict[str, Delta] = {}
    groups: dict[str, int] = {}
    for path, parts in _modules(tensors, index, description).items():
        wanted = _shape(path, index, description)
        delta, group = _delta(path, parts, config, wanted)
        groups[path] = group
        for name, rows in index[path]:
            deltas[name] = delta if rows is None else delta.rows(rows)
    if not deltas:
        raise InputError("the adapter holds no updates", hint="save it again after training")
    if len(set(groups.values())) > 1 and config.qalora_group is None:
        told = ", ".join(f"{path} {group}" for path, group in list(groups.items())[:3])
        raise InputError(
            f"the adapter's A factors pool different numbers of inputs: {told}",
            hint="it is of another model: give the model that it was trained on",
        )
    return deltas, max(groups.values()) > 1


def read_repaired(path: Path, description: Description) -> dict[str, Delta]:
    """What of an adapter's base rounding took, by its residual or start (`Adapter`). Raises as `read_deltas` does."""
    if not path.is_file():
        raise InputError(f"{path} is missing: this adapter makes up for rounding by it", hint="copy it along")
    tensors, _ = read_tensors(path)
    index = graph_index(description)
    found = {}
    for module, parts in _modules(tensors, index, description).items():
        a, b = _factors(module, parts, _shape(module, index, description))
        for name, rows in index[module]:
            found[name] = Delta(a, b if rows is None else b[rows])
    return found


def _modules(tensors: Mapping[str, Array], index: Mapping[str, object], description: Description) -> dict[str, _Parts]:
    """The tensors by the path of their module."""
    modules: dict[str, _Parts] = {}
    for key in sorted(tensors):
        for pattern, what, hint in _FOREIGN:
            if pattern.search(key):
                raise UnsupportedModelError(f"the adapter holds {what}: {key!r}", hint=hint)
        match = _KEY.fullmatch(key)
        if match is None:
            raise UnsupportedModelError(f"the adapter holds {key!r}, which is no factor of a LoRA update", hint=_MERGE)
        path = module_path(match[1], index.__contains__)
        if path not in index:
            raise unknown_module(description, path)
        parts = modules.setdefault(path, _Parts())
        if match[2] in parts.keys:
            raise InputError(f"the adapter holds {match[2]} of {path} twice: {key!r}", hint="save one adapter alone")
        parts.tensors[match[2]], parts.keys[match[2]] = tensors[key], key
    return modules


def _shape(path: str, index: Mapping[str, list[tuple[str, slice | None]]], description: Description) -> tuple[int, int]:
    """[out, in] of the module. Raises UnsupportedModelError for a head that shares its table."""
    names = [name for name, _ in index[path]]
    if names == [HEAD] and description.architecture.tied:
        raise UnsupportedModelError(
            "the adapter changes lm_head, whose table is the embedding's as well",
            hint="compile with --tied untie: the head then has a table of its own",
        )
    shapes = [expected_shape(description, name) for name in names]
    return sum(rows for rows, _ in shapes), shapes[0][1]


def _delta(path: str, parts: _Parts, config: AdapterConfig, wanted: tuple[int, int]) -> tuple[Delta, int]:
    """The update of one module, and how many inputs share a column of its A in the file."""
    a, b = _factors(
        path, parts, wanted, config.rank_of(path), (config.qalora_group,) if config.qalora_group else BLOCK_SIZES
    )
    magnitude = parts.tensors.get("lora_magnitude_vector")
    if (magnitude is not None) != config.dora:
        has = "no lora_magnitude_vector" if config.dora else "a lora_magnitude_vector"
        raise InputError(
            f"{path} has {has}, {CONFIG_FILE} says use_dora={config.dora}",
            hint="tensors and configuration are of different adapters: save it again",
        )
    if magnitude is not None:
        magnitude = magnitude.reshape(-1)
        if magnitude.shape != (wanted[0],):
            raise _misfit(parts, "lora_magnitude_vector", [wanted[0]])
    scale = config.scale_of(path)
    if a.shape[1] == wanted[1]:
        return Delta(a, b, scale, magnitude), 1
    group = wanted[1] // a.shape[1]
    if config.dora:
        raise UnsupportedModelError(
            f"{path} has a pooled A of {a.shape[1]} columns and DoRA magnitudes", hint="train it with rqc finetune"
        )
    factor = 1 / group if config.qalora_group is None else a.shape[1] / group
    return Delta(np.repeat(a, group, axis=1), b, scale * factor), group


def _factors(
    path: str, parts: _Parts, wanted: tuple[int, int], rank: int | None = None, pools: tuple[int, ...] = ()
) -> tuple[Array, Array]:
    """A and B of a module, of any rank without `rank`. `pools`: how many inputs may share a column of a compact A."""
    for kind in ("lora_A", "lora_B"):
        if kind not in parts.tensors:
            raise InputError(f"the adapter lacks {kind} of {path}", hint="the file is incomplete: save it again")
    a, b = parts.tensors["lora_A"], parts.tensors["lora_B"]
    r = rank or (a.shape[0] if a.ndim else 0)
    columns = a.shape[1] if a.ndim == 2 else 0
    if a.shape != (r, columns) or columns not in (wanted[1], *(wanted[1] / group for group in pools)):
        raise _misfit(parts, "lora_A", [r, wanted[1]])
    if b.shape != (wanted[0], r):
        raise _misfit(parts, "lora_B", [wanted[0], r])
    return a, b


def _misfit(parts: _Parts, kind: str, wanted: list[int]) -> InputError:
    return InputError(
        f"tensor {parts.keys[kind]!r} has shape {list(parts.tensors[kind].shape)}, the model and {CONFIG_FILE} ask for "
        f"{wanted}",
        hint="the adapter is of another model: give the model that it was trained on",
    )
