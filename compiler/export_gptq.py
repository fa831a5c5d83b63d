"""`rqc export --format gptq`: a 4-bit Hugging Face checkpoint in GPTQ's layout, which other runtimes read.

Per linear W [N, K], Ŵ = (q − 8) s: qweight int32 [K/8, N], eight codes of consecutive inputs to a word, the first in
the lowest bits; qzeros int32 [G, N/8], every nibble 7 (the format stores z − 1); scales float16 [G, N]; g_idx int32
[K], the group of each input. Only what folds into weights without a trace can be in it: R1, R2 and adapters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from safetensors.numpy import save

from rqc.compiler.adapters.reading import open_adapter
from rqc.compiler.adapters.survival import check_survival, fold_survival
from rqc.compiler.importer import Imported, import_model
from rqc.compiler.instruments import Instruments, Progress, Silent
from rqc.compiler.passlist import frame
from rqc.compiler.recipe import Recipe
from rqc.compiler.tokenizer_files import TOKENIZER_FILES
from rqc.models.algebra import folded_norms
from rqc.models.checkpoint import read_config
from rqc.models.grid import Grid, Quantized
from rqc.models.quantized import LazyQuantized, forget
from rqc.models.weights import Weight
from rqc.passes.base import WEIGHT
from rqc.passes.quantize import QuantizeLinears, quantized_of
from rqc.runtime.directories import Part, new_directory, write_directory
from rqc.runtime.errors import CheckpointError, InputError, ResourceError, SchemeError, UnsupportedModelError

BITS, CENTER = 4, 8
FOLDING = ("r1", "r2")
"""Rotations that leave nothing to be computed online."""
SHARD_BYTES = 1 << 30
Array = NDArray[np.generic]


@dataclass(frozen=True)
class ExportReport:
    """A checkpoint that was written: linears in 4 bits, bytes of all tensors, what rounding left of an adapter."""

    directory: str
    format: str
    linears: int
    size_bytes: int
    survival: dict[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """The report with the keys of `rqc export --json`."""
        return {
            "directory": self.directory,
            "format": self.format,
            "linears": self.linears,
            "size_bytes": self.size_bytes,
            "survival": self.survival,
        }


def export_gptq(
    model_dir: str | Path,
    output: str | Path,
    *,
    group_size: int = 128,
    rotate: str = "none",
    rotation_seed: int = 0,
    clip: str = "mse",
    adapter: Any = None,
    min_survival: float | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Round a model directory to 4 bits in symmetric groups and write it as a GPTQ checkpoint in `output`.

    rotate: none, or a list of r1 and r2; R1 unties embedding and head. adapter: PEFT directories, whose sum is folded
    in first. Raises SchemeError (a rotation that has to be computed online, groups that do not divide), InputError,
    UnsupportedModelError (a family whose checkpoint packs its linears otherwise), ParityError (rounding leaves less
    than min_survival, 0.5 if None, of an adapter in a linear), ResourceError (no space).
    """
    target, told = new_directory(output), progress or Silent()
    if (Path(model_dir)).is_file():
        raise InputError(
            f"{model_dir} is a file", hint="export reads the model directory that an engine was compiled from"
        )
    imported = import_model(model_dir)
    values: dict[str, Any] = {
        "scheme": "w4a16",
        "group_size": group_size,
        "rotate": rotate,
        "rotation_seed": rotation_seed,
        "clip": clip,
    }
    values |= {"adapter": adapter, "min_survival": min_survival}
    asked = Recipe.from_values(values)
    if asked.switchable:
        raise InputError("adapters with names, which a checkpoint cannot switch", hint="--adapter DIR without a name")
    recipe, merge = open_adapter(asked, imported, told)
    recipe = _checked(recipe, imported)
    if merge is not None and merge.how != "fold":
        raise SchemeError(
            f"the adapter is merged by {merge.how}, which needs more than weights", hint="an adapter of a float base"
        )
    rotation = recipe.rotation
    assert rotation is not None
    grid = Grid(BITS, recipe.group_size, True, recipe.clip, positive=True)
    passes = [*frame(recipe, imported.description, rotation, merge), QuantizeLinears(imported.description, grid)]
    Instruments(False, None, told).run(imported.model, passes)
    survival = None if merge is None else fold_survival(imported.model, merge.folded, told)
    check_survival(survival or {}, recipe.min_survival, "an engine with --merge branch")
    tensors = [*_tensors(imported.model), *_neutral_norms(imported, recipe)]
    parts, shards = _shards(tensors)
    settings = _config(imported, recipe)
    files = {name: partial(_file, imported.checkpoint.directory / name) for name in _companions(imported)}
    size = sum(one.nbytes for one in tensors)
    index = {"metadata": {"total_size": size}, "weight_map": shards}
    texts = {"config.json": settings, "model.safetensors.index.json": index}
    parts |= {**files, **{name: partial(_json, value) for name, value in texts.items()}}
    try:
        write_directory(parts, target)
    except OSError as error:
        raise ResourceError(
            f"{target} cannot be written: {error.strerror}", hint="free space, or another place"
        ) from error
    finally:
        forget()
    linears = sum(one.name.endswith(".qweight") for one in tensors)
    return ExportReport(str(target), "gptq", linears, size, survival)


def _checked(recipe: Recipe, imported: Imported) -> Recipe:
    """The recipe with the head untied where R1 turns both ends apart. Raises for what the format cannot hold."""
    family, a = imported.description.family, imported.description.architecture
    rotation = recipe.rotation
    if rotation is None or (online := sorted(rotation.sites - set(FOLDING))):
        raise SchemeError(
            f"rotation {'auto' if rotation is None else ', '.join(online)} leaves Hadamards to be computed online",
            hint="--rotate none, or a list of r1 and r2",
        )
    if family.sources or a.experts:
        raise UnsupportedModelError(
            f"a {a.model_type} checkpoint packs its linears otherwise than the graph", hint="compile an engine instead"
        )
    _check_groups(imported, recipe.group_size)
    return replace(recipe, tied="untie") if a.tied and "r1" in rotation.sites else recipe


def _check_groups(imported: Imported, group_size: int) -> None:
    """Raise SchemeError where a linear has no whole groups or words, with a group size that all of them have."""
    claims = [claim for claim in imported.description.claims if claim.quantized]
    shapes = {claim.weight: imported.description.shape(claim) for claim in claims}

    def unfit(size: int) -> list[str]:
        return [name for name, (n, k) in shapes.items() if k % (k if size == -1 else size) or n % 8 or k % 8]

    if names := unfit(group_size):
        n, k = shapes[names[0]]
        fit = [size for size in (256, 128, 64, 32, 16, -1) if not unfit(size)]
        raise SchemeError(
            f"{names[0]} [{n}, {k}] in groups of {k if group_size == -1 else group_size}: GPTQ has whole groups and "
            "eight codes to a word",
            hint=f"--group-size {fit[0]}" if fit else "compile an engine instead",
        )


@dataclass(frozen=True, eq=False)
class _Tensor:
    """A tensor of the checkpoint to be: its value is made when its shard is written."""

    name: str
    nbytes: int
    value: Any


def _tensors(model: ir.Model) -> list[_Tensor]:
    """Everything that came from the checkpoint, in graph order: floats in float16, linears in four parts."""
    found: list[_Tensor] = []
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        quantized = quantized_of(value)
        if quantized is not None:
            if name.endswith(".codes"):
                found += _linear(name.removesuffix(".weight.codes"), quantized)
        elif isinstance(weight := tensor.meta.get(WEIGHT), Weight):
            found.append(_Tensor(name, 2 * int(np.prod(weight.shape)), partial(_half, weight)))
    return found


def _neutral_norms(imported: Imported, recipe: Recipe) -> Iterator[_Tensor]:
    """The gains of norms that R1 has folded into the weights behind them: the graph has none any more."""
    if recipe.rotation is None or "r1" not in recipe.rotation.sites:
        return
    a, gain = imported.description.architecture, 0 if imported.description.family.offset_norms else 1
    for name in folded_norms(imported.description, head=True):
        yield _Tensor(name, 2 * a.hidden_size, partial(np.full, a.hidden_size, gain, np.float16))


def _linear(stem: str, quantized: LazyQuantized) -> Iterator[_Tensor]:
    n, k = quantized.shape
    groups = 1 if quantized.grid.group_size == -1 else quantized.groups
    per_group = k // groups

    def part(make: Any) -> Any:
        return lambda: make(quantized.get())

    yield _Tensor(f"{stem}.qweight", n * k // 2, part(packed_codes))
    yield _Tensor(f"{stem}.qzeros", groups * n // 2, lambda: np.full((groups, n // 8), 0x77777777, np.int32))
    yield _Tensor(
        f"{stem}.scales",
        2 * groups * n,
        part(lambda q: half_scales(stem, q.scales[:, :groups])),
    )
    yield _Tensor(f"{stem}.g_idx", 4 * k, lambda: (np.arange(k) // per_group).astype(np.int32))


def half_scales(stem: str, scales: NDArray[np.float32]) -> NDArray[np.float16]:
    """scales float16 [G, N]. Raises CheckpointError for one beyond float16."""
    with np.errstate(over="ignore"):  # told below
        half = np.ascontiguousarray(scales.T.astype(np.float16))
    if not np.isfinite(half).all():
        raise CheckpointError(f"{stem} has scales beyond float16, which the layout stores", hint="compile an engine")
    return half


def packed_codes(quantized: Quantized) -> NDArray[np.int32]:
    """qweight int32 [K/8, N]."""
    codes = quantized.codes.T.astype(np.uint32)
    words = np.zeros((codes.shape[0] // 8, codes.shape[1]), np.uint32)
    for place in range(8):
        words |= codes[place::8] << np.uint32(4 * place)
    return words.view(np.int32)


def _half(weight: Weight) -> Array:
    with np.errstate(over="ignore"):  # told by `finite`
        return weight.finite(weight.float32().astype(np.float16))


def _shards(tensors: list[_Tensor]) -> tuple[dict[str, Part], dict[str, str]]:
    """(safetensors files by name, the file of each tensor), none much over a gigabyte."""
    groups: list[list[_Tensor]] = [[]]
    for tensor in tensors:
        if groups[-1] and sum(one.nbytes for one in groups[-1]) + tensor.nbytes > SHARD_BYTES:
            groups.append([])
        groups[-1].append(tensor)
    names = [f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors" for index in range(len(groups))]
    parts: dict[str, Part] = {name: partial(_shard, group) for name, group in zip(names, groups, strict=True)}
    return parts, {one.name: name for name, group in zip(names, groups, strict=True) for one in group}


def _shard(tensors: list[_Tensor]) -> list[bytes]:
    return [save({one.name: np.ascontiguousarray(one.value()) for one in tensors}, metadata={"format": "pt"})]


def _config(imported: Imported, recipe: Recipe) -> dict[str, Any]:
    """config.json with what was done to the weights."""
    a = imported.description.architecture
    quantization = {
        "quant_method": "gptq",
        "bits": BITS,
        "group_size": recipe.group_size,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
    }
    raw = {key: value for key, value in read_config(imported.checkpoint.directory).items() if key != "dtype"}
    tied = a.tied and recipe.tied == "keep"
    return {**raw, "torch_dtype": "float16", "tie_word_embeddings": tied, "quantization_config": quantization}


def _companions(imported: Imported) -> list[str]:
    wanted = (*TOKENIZER_FILES, "tokenizer.model", "generation_config.json")
    return [name for name in wanted if (imported.checkpoint.directory / name).is_file()]


def _file(path: Path) -> list[bytes]:
    return [path.read_bytes()]


def _json(value: dict[str, Any]) -> list[bytes]:
    return [json.dumps(value, indent=1).encode() + b"\n"]
