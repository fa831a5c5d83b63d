"""The reference of an engine with adapters: the PEFT model in PyTorch, as it was trained, and in the engine's frame.

As it was trained: plain peft, all adapters active, on the plain model or, where an adapter has a basis, on the model
folded into it, with the base on the grid that it was trained on. In the engine's frame: the same linears as the
engine's, with the adapters in peft's wrappers where the engine computes them beside, and in the weights elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rqc.compiler.adapters.bases import bound
from rqc.compiler.adapters.peft_wrappers import attach, delta_of, install, merge_in, one_delta, wraps
from rqc.compiler.adapters.sources import AdapterSource
from rqc.models.adapter import Adapter, write_adapter
from rqc.models.adapter_frames import to_frame, to_plain
from rqc.models.adapter_names import torch_names
from rqc.models.algebra import dimensions
from rqc.models.checkpoint import Checkpoint
from rqc.models.delta import Delta
from rqc.models.description import Description
from rqc.models.grid import Grid, quantize
from rqc.models.reference import Reference
from rqc.models.rotation import Rotation
from rqc.runtime.container import EngineFile
from rqc.runtime.errors import InputError
from rqc.runtime.replace_file import scratch_folder

UNROTATED = Rotation(frozenset())


def check_presence(file: EngineFile, sources: Sequence[AdapterSource]) -> None:
    """Raise InputError for an engine with adapters but no directories to compare with, and the other way round; for
    one whose adapters have names, unless these are given, each with its directory."""
    recorded = file.manifest["adapter"]
    if recorded is None:
        if sources:
            raise InputError(
                f"{file.path} holds no adapter, {sources[0].path} was given",
                hint="leave --adapter out, or compile with it",
            )
        return
    names = list(recorded.get("names", []))
    if not sources:
        held = " and ".join(names or [one["fingerprint"][:12] for one in _each(recorded)])
        raise InputError(
            f"{file.path} holds the adapter {held}, none was given",
            hint=f"{_options(names)}: {'each' if len(_each(recorded)) > 1 else 'the'} one that it was compiled with",
        )
    given = [source.name for source in sources if source.name is not None]
    if sorted(given) != sorted(names):
        raise InputError(
            f"{file.path} can switch {', '.join(names) or 'no adapter'}, given were {', '.join(given) or 'no names'}",
            hint=_options(names) if names else "--adapter DIR, without a name",
        )


def _options(names: Sequence[str]) -> str:
    """The options that name an engine's adapters."""
    return " ".join(f"--adapter {name}=DIR" for name in names) or "--adapter DIR"


def _each(recorded: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The records of an engine's adapters; that of a single one is the record itself."""
    each: list[Mapping[str, Any]] = recorded.get("adapters", [recorded])
    return each


@dataclass(frozen=True, eq=False)
class Adapted:
    """A model directory with its adapters, from which references are made. `notes`: what a reader should know."""

    model_dir: Path
    adapters: tuple[Adapter, ...]
    description: Description
    notes: list[str] = field(default_factory=list)

    @classmethod
    def open(
        cls, file: EngineFile, model_dir: str | Path, sources: Sequence[AdapterSource], description: Description
    ) -> Adapted:
        """Adapters of an engine: all of them, or by name. Raises InputError for others, and what `Adapter.open` and
        `check` raise."""
        tied = description.architecture.tied and file.manifest["tied"] != "untie"
        description = replace(description, architecture=replace(description.architecture, tied=tied))
        checkpoint = Checkpoint.open(model_dir)
        adapters = [Adapter.open(source.path, description, checkpoint.read) for source in sources]
        recorded = _each(file.manifest["adapter"])
        if sources[0].name is not None:
            recorded = [next(one for one in recorded if one.get("name") == source.name) for source in sources]
        wanted, found = (
            [str(one["fingerprint"]) for one in recorded],
            [adapter.fingerprint for adapter in adapters],
        )
        if sorted(wanted) != sorted(found):
            name = "" if sources[0].name is None else f" as {sources[0].name}"
            raise InputError(
                f"{file.path} holds the adapter {_listed(wanted)}{name}, "
                f"{_listed([source.path for source in sources])} is {_listed(found)}",
                hint="give the adapter that the engine was compiled with",
            )
        for adapter in adapters:
            adapter.check(description, checkpoint.fingerprint())
        return cls(Path(model_dir), tuple(adapters[found.index(one)] for one in wanted), description)

    @property
    def own(self) -> Rotation:
        """The rotation in which the adapters were trained; where they differ, that of one that cannot leave its own,
        else none."""
        rotations = {self._hash(_rotation(adapter)): _rotation(adapter) for adapter in self.adapters}
        if len(rotations) == 1:
            return next(iter(rotations.values()))
        return next((_rotation(adapter) for adapter in self.adapters if bound(adapter) is not None), UNROTATED)

    @property
    def names(self) -> dict[str, None]:
        """The weights that an adapter updates, in order."""
        return dict.fromkeys(name for adapter in self.adapters for name in adapter.deltas)

    @property
    def base_is_float(self) -> bool:
        """Whether the adapters were trained on float weights, so that they can be compared with them."""
        return self._grid() is None

    def trained(self) -> Reference:
        """The PEFT model as it was trained, all adapters active."""

        def prepare(reference: Reference) -> None:
            reference.fold(self.own, tied=reference.description.architecture.tied)
            self._quantize_base(reference)

        reference = self._attached(prepare, self.own)
        reference.rotate_online(self.own, tied=reference.description.architecture.tied)
        return reference

    def framed(self, rotation: Rotation, *, tied: bool, beside: Collection[str]) -> Reference:
        """The same function in the engine's frame, on float weights, but for the online rotations.

        The adapters stay in wrappers around the linears named in `beside` and go into the weights of all others. What
        LoftQ took out of the base before it was quantized is taken out here too.
        """
        if self._hash(rotation) == self._hash(self.own):
            reference = self._attached(lambda fresh: self._fold(fresh, rotation, tied), rotation)
            self._merge_all_but(reference, beside)
            return reference
        read = Checkpoint.open(self.model_dir).read
        reference = self._attached(lambda fresh: None if tied else fresh.untie())  # before a head takes an adapter up
        for index, adapter in enumerate(self.adapters):
            if _rotation(adapter).sites:
                for name, delta in adapter.deltas.items():
                    plain = to_plain(name, delta, self.description, _rotation(adapter), read)
                    install(reference.parts[name], index, plain)
        self._merge_all_but(reference, beside)
        framed = {
            (name, index): to_frame(name, one_delta(reference.parts[name], index), self.description, rotation, read)
            for index, adapter in enumerate(self.adapters)
            for name in adapter.deltas
            if name in beside
        }
        for (name, index), delta in framed.items():
            install(reference.parts[name], index, delta)
        reference.fold(rotation, tied=tied)
        return reference

    def beside(self, reference: Reference, names: Collection[str]) -> dict[str, Delta]:
        """What the wrappers of a reference add to the linears in `names`, summed."""
        return {name: delta_of(reference.parts[name]) for name in self.names if name in names}

    def _hash(self, rotation: Rotation) -> str | None:
        return rotation.basis(dimensions(self.description)) if rotation.sites else None

    def _grid(self) -> Grid | None:
        grids = (None if adapter.basis is None else adapter.basis.grid for adapter in self.adapters)
        return next((grid for grid in grids if grid is not None), None)

    def _attached(self, prepare: Callable[[Reference], None], frame: Rotation | None = None) -> Reference:
        """A fresh model, prepared, then wrapped by plain peft, all adapters active.

        frame: the basis of the prepared model; adapters of another one are carried into it by rqc, None: as they are.
        What peft cannot open is converted first. Both are noted.
        """
        carried = {} if frame is None else self._carried(frame)
        while True:
            reference = Reference.load(self.model_dir)
            prepare(reference)
            failed = self._attach_all(reference, carried)
            if failed is None:
                return reference
            index, reason = failed
            directory = self.adapters[index].directory
            if index in carried:
                raise InputError(f"peft cannot open {directory}: {reason}", hint="give a PEFT directory")
            self._note(f"peft cannot open {directory} ({reason}): compared with it written as plain LoRA")
            carried[index] = self.adapters[index].deltas

    def _carried(self, frame: Rotation) -> dict[int, Mapping[str, Delta]]:
        """The adapters of another basis than `frame`, in it, by number."""
        read, found = Checkpoint.open(self.model_dir).read, dict[int, Mapping[str, Delta]]()
        for index, adapter in enumerate(self.adapters):
            own = _rotation(adapter)
            if self._hash(own) == self._hash(frame):
                continue
            self._note(f"{adapter.directory} is of another basis ({own}): compared with it carried into {frame}")
            deltas = {name: to_plain(name, d, self.description, own, read) for name, d in adapter.deltas.items()}
            found[index] = {name: to_frame(name, d, self.description, frame, read) for name, d in deltas.items()}
        return found

    def _attach_all(self, reference: Reference, carried: Mapping[int, Mapping[str, Delta]]) -> tuple[int, str] | None:
        """Wrap a model by all adapters. The number of one that peft cannot open, and why."""
        wrapped: Any = None
        with scratch_folder("adapter") as folder:
            for index, adapter in enumerate(self.adapters):
                directory, deltas = adapter.directory, carried.get(index)
                if deltas is not None:
                    directory = Path(folder) / str(index)
                    write_adapter(directory, deltas, None, torch_names=torch_names(self.description))
                wrapped, reason = attach(reference, wrapped, directory, index)
                bare = [name for name in adapter.deltas if not wraps(reference.parts[name], index)]
                if reason is None and bare:
                    reason = f"it left {bare[0]} without an adapter"
                if reason is not None:
                    return index, reason
        return None

    def _note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)

    def _fold(self, reference: Reference, rotation: Rotation, tied: bool) -> None:
        reference.fold(rotation, tied=tied)
        self._subtract_residual(reference)

    def _subtract_residual(self, reference: Reference) -> None:
        for adapter in self.adapters:
            for name, delta in adapter.residual.items():
                reference.set_weight(name, (reference.read(name) - delta.dense()).astype(np.float32))

    def _quantize_base(self, reference: Reference) -> None:
        grid = self._grid()
        if grid is None:
            return
        self._subtract_residual(reference)
        for claim in reference.description.claims:
            if claim.quantized and claim.weight in reference.parts:
                reference.set_weight(claim.weight, quantize(reference.read(claim.weight), grid).dequantize())

    def _merge_all_but(self, reference: Reference, beside: Collection[str]) -> None:
        """Put the adapters of all other linears into their weights; wrappers with nothing left in them go."""
        merge_in(reference, [name for name in self.names if name not in beside])


def _rotation(adapter: Adapter) -> Rotation:
    """The rotation in which an adapter was trained."""
    return UNROTATED if adapter.basis is None else adapter.basis.rotation


def _listed(words: Sequence[object]) -> str:
    return " and ".join(str(word) if isinstance(word, Path) else str(word)[:12] for word in words)
