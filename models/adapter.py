"""Adapters: PEFT directories of low-rank updates, with the basis in which they were trained (rqc_basis.json).

Any LoRA, rsLoRA or DoRA directory of plain peft is one, without a basis; so are pooled ones, whose A is compact there.
What a directory holds beyond updates of linears is refused by name (`rqc.models.adapter_config`).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rqc.models.adapter_basis import BASIS_FILE, AdapterBasis
from rqc.models.adapter_config import CONFIG_FILE, AdapterConfig
from rqc.models.adapter_read import read_deltas, read_repaired, without_tables
from rqc.models.adapter_tensors import read_tensors
from rqc.models.adapter_write import MARK, RESIDUAL_FILE, START_FILE, WEIGHTS_FILE, write_adapter
from rqc.models.algebra import Read, dimensions
from rqc.models.delta import Delta
from rqc.models.description import Description
from rqc.runtime.errors import BasisMismatchError, InputError, RqcError

__all__ = ["Adapter", "AdapterBasis", "write_adapter"]


@dataclass(frozen=True, eq=False)
class Adapter:
    """An opened adapter. `deltas`: its updates by the graph's weight names, in its basis (None: the model's own).

    kind: lora, dora, qalora, qbara or qahira. residual: what LoftQ's base was quantized without. start: what updates
    were before training, where that made up for the rounding of W itself. fingerprint: sha256 over the adapter's files.
    """

    directory: Path
    kind: str
    deltas: dict[str, Delta] = field(repr=False)
    basis: AdapterBasis | None
    residual: dict[str, Delta] = field(repr=False)
    start: dict[str, Delta] = field(repr=False)
    fingerprint: str

    @classmethod
    def open(cls, directory: str | Path, description: Description, read: Read | None = None) -> Adapter:
        """Read an adapter of the described model; `description.architecture.tied` tells whether its head stays tied.

        `read` gives the base's weights. Only an adapter on lm_head needs it: peft saves the table of the base along
        with it, which must be the base's.

        Raises InputError for what is missing, damaged or of another model, UnsupportedModelError for features that are
        no low-rank update of linears.
        """
        path = Path(directory)
        if not path.is_dir():
            raise InputError(f"{path} is not an adapter directory", hint="give a directory with adapter_config.json")
        with _named(path):
            config = AdapterConfig.read(path)
            tensors, metadata = read_tensors(_weights(path))
            basis = AdapterBasis.read(path)
            _check_mark(path, basis, metadata.get(MARK))
            tensors = without_tables(tensors, description, read)
            deltas, compact = read_deltas(tensors, config, description)
            residual = read_repaired(path / RESIDUAL_FILE, description) if basis is not None and basis.residual else {}
            start = read_repaired(path / START_FILE, description) if basis is not None and basis.start else {}
        kind = "dora" if config.dora else "qalora" if compact else "lora"
        kind = kind if basis is None else basis.adapter_type
        return cls(path, kind, deltas, basis, residual, start, _fingerprint(path))

    @property
    def repaired(self) -> dict[str, Delta]:
        """What updates of a rounded base say that float weights have already: residual and start."""
        return self.start | self.residual

    def check(self, description: Description, base_fingerprint: str) -> None:
        """That the adapter was trained on this model, in a basis that this rqc builds as well; nothing to check without
        a basis. Raises InputError naming both fingerprints, BasisMismatchError naming both hashes."""
        if self.basis is None:
            return
        if self.basis.base != base_fingerprint:
            raise InputError(
                f"{self.directory} was trained on the base {self.basis.base}, this model is {base_fingerprint}",
                hint="give the model directory that the adapter was trained on, unchanged",
            )
        built = self.basis.rotation.basis(dimensions(description)) if self.basis.rotation.sites else None
        if built != self.basis.basis:
            raise BasisMismatchError(
                f"{self.directory} was trained in the basis {self.basis.basis}, this rqc builds {built} from the same "
                f"rotation ({self.basis.rotation}, {self.basis.rotation.made})",
                hint="use the rqc that trained it, or train it again",
            )


@contextlib.contextmanager
def _named(directory: Path) -> Iterator[None]:
    """Put the adapter's directory in front of errors that lack it: it may be one of several."""
    try:
        yield
    except RqcError as error:
        if error.message.startswith(str(directory)):
            raise
        raise type(error)(f"{directory}: {error.message}", hint=error.hint) from error


def _weights(directory: Path) -> Path:
    path = directory / WEIGHTS_FILE
    if path.is_file():
        return path
    if (directory / "adapter_model.bin").exists():
        raise InputError(
            f"{directory} holds pickled weights (adapter_model.bin), which can run code when they are read",
            hint="save it from where it was made with save_pretrained(DIR, safe_serialization=True)",
        )
    raise InputError(f"{directory} has no {WEIGHTS_FILE}", hint="save the adapter again with peft's save_pretrained")


def _check_mark(directory: Path, basis: AdapterBasis | None, mark: str | None) -> None:
    """Raise InputError where weights and rqc_basis.json are not of one adapter."""
    if mark is not None and basis is None:
        raise InputError(
            f"{directory} was trained in the basis {mark}, and its {BASIS_FILE} is gone",
            hint=f"copy {BASIS_FILE} from where the adapter was trained",
        )
    if mark is not None and basis is not None and mark != basis.mark:
        raise InputError(
            f"{directory}: the weights are of the basis {mark}, {BASIS_FILE} is of {basis.mark}",
            hint="they are of different adapters: copy the whole directory again",
        )


def _fingerprint(directory: Path) -> str:
    digest = hashlib.sha256()
    for name in (CONFIG_FILE, WEIGHTS_FILE, BASIS_FILE, RESIDUAL_FILE, START_FILE):
        path = directory / name
        content = path.read_bytes() if path.is_file() else b""
        digest.update(f"{name} {len(content)}".encode() + content)  # a learned rotation is in the basis by its hash
    return digest.hexdigest()
