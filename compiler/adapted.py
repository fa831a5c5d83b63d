"""The reference of an engine with an adapter: the PEFT model in PyTorch, as it was trained, and in the engine's frame.

As it was trained: plain peft on the plain model or, where the adapter has a basis, on the model folded into it, with
the base on the grid that the adapter was trained on. In the engine's frame: the same linears as the engine's, with the
adapter in peft's wrappers where the engine computes it beside, and in the weights elsewhere.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rqc.models.adapter import Adapter, write_adapter
from rqc.models.adapter_frames import to_frame, to_plain
from rqc.models.adapter_names import torch_names
from rqc.models.algebra import dimensions
from rqc.models.checkpoint import Checkpoint
from rqc.models.delta import Delta
from rqc.models.description import Description
from rqc.models.experts import peft_sees_linears
from rqc.models.grid import quantize
from rqc.models.reference import Part, Reference
from rqc.models.rotation import Rotation
from rqc.runtime.container import EngineFile
from rqc.runtime.errors import InputError

NAME = "default"
"""peft's name of an adapter that has none."""
UNROTATED = Rotation(frozenset())


def check_presence(file: EngineFile, directory: str | Path | None) -> None:
    """Raise InputError for an engine with an adapter but no directory to compare with, and the other way round."""
    recorded = file.manifest["adapter"]
    if recorded is not None and directory is None:
        raise InputError(
            f"{file.path} holds the adapter {recorded['fingerprint'][:12]}, none was given",
            hint="--adapter DIR: the one that it was compiled with",
        )
    if recorded is None and directory is not None:
        raise InputError(
            f"{file.path} holds no adapter, {directory} was given", hint="leave --adapter out, or compile with it"
        )


@dataclass(frozen=True, eq=False)
class Adapted:
    """A model directory with its adapter, from which references are made. `notes`: what a reader should know."""

    model_dir: Path
    adapter: Adapter
    description: Description
    notes: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, file: EngineFile, model_dir: str | Path, directory: Path, description: Description) -> Adapted:
        """The adapter of an engine. Raises InputError for another one, and what `Adapter.open` and `check` raise."""
        tied = description.architecture.tied and file.manifest["tied"] != "untie"
        description = replace(description, architecture=replace(description.architecture, tied=tied))
        checkpoint = Checkpoint.open(model_dir)
        adapter = Adapter.open(directory, description, checkpoint.read)
        recorded = str(file.manifest["adapter"]["fingerprint"])
        if adapter.fingerprint != recorded:
            raise InputError(
                f"{file.path} holds the adapter {recorded[:12]}, {directory} is {adapter.fingerprint[:12]}",
                hint="give the adapter that the engine was compiled with",
            )
        adapter.check(description, checkpoint.fingerprint())
        return cls(Path(model_dir), adapter, description)

    @property
    def own(self) -> Rotation:
        """The rotation in which the adapter was trained."""
        return UNROTATED if self.adapter.basis is None else self.adapter.basis.rotation

    @property
    def base_is_float(self) -> bool:
        """Whether the adapter was trained on float weights, so that it can be compared with them."""
        return self.adapter.basis is None or self.adapter.basis.grid is None

    def trained(self) -> Reference:
        """The PEFT model as it was trained."""

        def prepare(reference: Reference) -> None:
            reference.fold(self.own, tied=reference.description.architecture.tied)
            self._quantize_base(reference)

        reference = self._attached(prepare)
        reference.rotate_online(self.own, tied=reference.description.architecture.tied)
        return reference

    def framed(self, rotation: Rotation, *, tied: bool, beside: Collection[str]) -> Reference:
        """The same function in the engine's frame, on float weights, but for the online rotations.

        The adapter stays in wrappers around the linears named in `beside` and goes into the weights of all others. What
        LoftQ took out of the base before it was quantized is taken out here too.
        """
        if self._hash(rotation) == self._hash(self.own):
            reference = self._attached(lambda fresh: self._fold(fresh, rotation, tied))
            self._merge_all_but(reference, beside)
            return reference
        read = Checkpoint.open(self.model_dir).read
        reference = self._attached(lambda fresh: None if tied else fresh.untie())  # before a head takes an adapter up
        if self.own.sites:
            for name, delta in self.adapter.deltas.items():
                _install(reference.parts[name], to_plain(name, delta, self.description, self.own, read))
        self._merge_all_but(reference, beside)
        plain = {name: delta_of(reference.parts[name]) for name in self.adapter.deltas if name in beside}
        for name, delta in plain.items():
            _install(reference.parts[name], to_frame(name, delta, self.description, rotation, read))
        reference.fold(rotation, tied=tied)
        return reference

    def _hash(self, rotation: Rotation) -> str | None:
        return rotation.basis(dimensions(self.description)) if rotation.sites else None

    def _attached(self, prepare: Callable[[Reference], None]) -> Reference:
        """A fresh model, prepared, then wrapped by plain peft. What peft cannot open is converted first, and noted."""
        reference = Reference.load(self.model_dir)
        prepare(reference)
        reason = _attach(reference, self.adapter.directory) or self._left_out(reference)
        if reason is None:
            return reference
        self._note(f"peft cannot open {self.adapter.directory} ({reason}): compared with it written as plain LoRA")
        reference = Reference.load(self.model_dir)
        prepare(reference)
        with tempfile.TemporaryDirectory(prefix="rqc-adapter-") as folder:
            write_adapter(folder, self.adapter.deltas, None, torch_names=torch_names(self.description))
            reason = _attach(reference, Path(folder)) or self._left_out(reference)
        if reason is not None:
            raise InputError(f"peft cannot open {self.adapter.directory}: {reason}", hint="give a PEFT directory")
        return reference

    def _left_out(self, reference: Reference) -> str | None:
        """Peft passes over what it finds no module for."""
        bare = [name for name in self.adapter.deltas if not hasattr(reference.parts[name].module, "lora_A")]
        return f"it left {bare[0]} without an adapter" if bare else None

    def _note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)

    def _fold(self, reference: Reference, rotation: Rotation, tied: bool) -> None:
        reference.fold(rotation, tied=tied)
        self._subtract_residual(reference)

    def _subtract_residual(self, reference: Reference) -> None:
        for name, delta in self.adapter.residual.items():
            reference.set_weight(name, (reference.read(name) - delta.dense()).astype(np.float32))

    def _quantize_base(self, reference: Reference) -> None:
        grid = None if self.adapter.basis is None else self.adapter.basis.grid
        if grid is None:
            return
        self._subtract_residual(reference)
        for claim in reference.description.claims:
            if claim.quantized and claim.weight in reference.parts:
                reference.set_weight(claim.weight, quantize(reference.read(claim.weight), grid).dequantize())

    def _merge_all_but(self, reference: Reference, beside: Collection[str]) -> None:
        """W ← W + c B A (DoRA: diag(m / n) of it) in float64, B ← 0; wrappers with nothing left in them go."""
        names = [name for name in self.adapter.deltas if name not in beside]
        for name in names:
            part = reference.parts[name]
            merged = delta_of(part).merged(reference.read(name))
            reference.set_weight(name, merged.astype(np.float32))
            _factors(part)[1].weight.data[part.rows] = 0
        for path in {reference.parts[name].path for name in names}:
            layer: Any = reference.model.get_submodule(path)
            if not layer.lora_B[NAME].weight.any():
                reference.model.set_submodule(path, layer.get_base_layer())


def _attach(reference: Reference, directory: Path) -> str | None:
    """Wrap the model's linears by plain peft, with the adapter of a directory. The reason where peft cannot."""
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as told, peft_sees_linears(reference.model):
        warnings.simplefilter("always")
        try:
            PeftModel.from_pretrained(reference.model, str(directory), torch_device="cpu").eval()
        except (ValueError, KeyError, RuntimeError, OSError, TypeError) as error:
            return " ".join(str(error).split())[:200]
    missing = [str(warning.message) for warning in told if "missing adapter keys" in str(warning.message)]
    return missing[0][:200] if missing else None


def delta_of(part: Part) -> Delta:
    """What peft's wrapper adds to a part."""
    layer: Any = part.module
    a, b = _factors(part)
    magnitude = layer.lora_magnitude_vector[NAME].weight if NAME in layer.lora_magnitude_vector else None
    return Delta(
        _wide(a.weight),
        _wide(b.weight[part.rows]),
        float(layer.scaling[NAME]),
        None if magnitude is None else _wide(magnitude[part.rows]),
    )


@torch.no_grad()
def _install(part: Part, delta: Delta) -> None:
    """Let peft's wrapper add another delta to a part. Parts of one module share A, as they share their input."""
    layer: Any = part.module
    a, b = _factors(part)
    if delta.rank != a.weight.shape[0]:
        layer.lora_A[NAME] = nn.Linear(a.weight.shape[1], delta.rank, bias=False)
        layer.lora_B[NAME] = nn.Linear(delta.rank, b.weight.shape[0], bias=False)
        a, b = _factors(part)
    a.weight.copy_(torch.from_numpy(delta.a))
    b.weight[part.rows].copy_(torch.from_numpy(delta.b * (delta.scale / layer.scaling[NAME])))
    if delta.magnitude is not None:
        layer.lora_magnitude_vector[NAME].weight[part.rows].copy_(torch.from_numpy(delta.magnitude))


def _factors(part: Part) -> tuple[Any, Any]:
    layer: Any = part.module
    return layer.lora_A[NAME], layer.lora_B[NAME]


def _wide(tensor: torch.Tensor) -> np.ndarray:
    wide: np.ndarray = tensor.detach().double().numpy()
    return wide
