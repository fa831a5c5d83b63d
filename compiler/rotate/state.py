"""What an unfinished `rqc rotate` leaves beside its output: everything that the next step needs, and what it is of."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save
from torch import Tensor

from rqc.models.rotation_file import KEY, RotationFile
from rqc.runtime.container import check_path
from rqc.runtime.errors import InputError, RqcError
from rqc.runtime.replace_file import Replacement, check_folder

Identity = Mapping[str, Any]
SUFFIX = ".training"


@dataclass
class State:
    """Matrices and momenta by site, float64, after `step` steps, with the loss of each; held_out: before the first."""

    matrices: dict[str, Tensor]
    moments: dict[str, Tensor]
    losses: list[float] = field(default_factory=list)
    held_out: float = 0.0

    @property
    def step(self) -> int:
        """Steps that were taken."""
        return len(self.losses)

    def on(self, device: str) -> State:
        """A copy there, by site in order of the names. A tensor of a file may lie at any address, which shows in the
        last bit of products."""
        matrices, moments = (
            {name: tensor.to(device, copy=True) for name, tensor in sorted(group.items())}
            for group in (self.matrices, self.moments)
        )
        return State(matrices, moments, self.losses, self.held_out)


class Place:
    """Where a rotation is written, and the state of learning it beside that."""

    def __init__(self, output: str | Path) -> None:
        self.output = Path(output)
        self.state = self.output.with_name(self.output.name + SUFFIX)
        check_path(self.output)

    def check(self, *, resume: bool) -> None:
        """Raise InputError where nothing can be written, or something would be lost: another file, a run that was not
        finished."""
        check_folder(check_path(self.output))
        check_path(self.state)
        if self.output.exists():
            _check_ours(self.output)
        if self.state.exists() and not resume:
            raise InputError(
                f"{self.state} holds a run that was not finished", hint="go on with --resume, or remove that file"
            )

    def finished(self, identity: Identity) -> RotationFile | None:
        """The rotation that is there already, if there is nothing to go on with. Raises InputError for another one."""
        if self.state.exists() or not self.output.exists():
            return None
        found = RotationFile.read(self.output)
        _same(self.output, (found.training or {}).get("run"), identity)
        return found

    def load(self, identity: Identity) -> State | None:
        """The state to go on from, None where there is none. Raises InputError for one of another run, or damaged."""
        if not self.state.exists():
            return None
        try:
            with safetensors.safe_open(self.state, "pt") as file:
                said = json.loads(file.metadata()[KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            _same(self.state, said["run"], identity)
            parts = {
                kind: {name.removeprefix(f"{kind}."): t for name, t in tensors.items() if name.startswith(f"{kind}.")}
                for kind in ("matrices", "moments")
            }
            return State(parts["matrices"], parts["moments"], list(said["losses"]), float(said["held_out"]))
        except RqcError:
            raise
        except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.state} is damaged: {error}", hint="remove it and start again") from error

    def save(self, state: State, identity: Identity) -> None:
        """Replace the stored state, as a whole. Raises ResourceError where there is no space."""
        tensors = {
            f"{kind}.{name}": tensor.cpu().contiguous()
            for kind, group in (("matrices", state.matrices), ("moments", state.moments))
            for name, tensor in group.items()
        }
        said = {"run": dict(identity), "losses": state.losses, "held_out": state.held_out}
        _replace(self.state, save(tensors, {KEY: json.dumps(said)}))

    def finish(self, file: RotationFile) -> None:
        """Write the rotation; what was kept to go on goes."""
        _replace(self.output, file.to_bytes())
        self.state.unlink(missing_ok=True)


def _check_ours(path: Path) -> None:
    """Raise InputError for a file that is no rotation: it is not replaced."""
    try:
        RotationFile.read(path)
    except InputError as error:
        raise InputError(f"{path} is there, and is no rotation", hint="name another file with -o") from error


def _replace(path: Path, content: bytes) -> None:
    with Replacement(check_path(path), len(content)) as new:
        new.write(content, 0)
        new.commit()


def _same(path: Path, before: object, now: Identity) -> None:
    """Raise InputError, naming what differs, unless a run is one of the same settings, model and text."""
    old, new = _flat(before if isinstance(before, dict) else {}), _flat(now)
    differing = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if differing:
        told = "; ".join(f"{name} was {_short(old.get(name))}, is {_short(new.get(name))}" for name in differing)
        raise InputError(f"{path} is of another run: {told}", hint="resume it as it was started, or name another file")


def _flat(identity: Identity) -> dict[str, Any]:
    rest = {name: value for name, value in identity.items() if name != "settings"}
    return {**identity.get("settings", {}), **rest}


def _short(value: Any) -> str:
    return str(value)[:12] if re.fullmatch(r"[0-9a-f]{64}", str(value)) else str(value)
