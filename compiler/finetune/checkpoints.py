"""What an unfinished run leaves in OUTPUT/checkpoints: what it is a run of, and complete checkpoints alone.

A checkpoint is written into a folder of another name, synced and renamed: whatever kills the process, a folder called
checkpoint-N is whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from rqc.models.adapter_basis import BASIS_FILE
from rqc.models.json_files import read_object
from rqc.runtime.errors import InputError
from rqc.runtime.replace_file import explained

FOLDER = "checkpoints"
RUN = "run.json"
"""What the run is of: settings, model, data."""
TRAINING = "training.json"
"""In a finished adapter: settings and log."""
DAY = "day"
"""In what a run is of: the day on which it was started, which chat templates may tell the model."""
KEPT = 2
MAY_DIFFER = ("device", "gradient_checkpointing", "save_steps", "export_plain", "eval_data", DAY)
"""Settings that don't change what is trained; data, with the day in it, is known by its hash."""
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_WRITING, _REMOVING, _LOCK = "writing", "removing", "lock"
_FINISHED = ".checkpoints.removing"

Identity = Mapping[str, Any]


class Run:
    """The state of a run in an output directory."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output / FOLDER

    @property
    def writing(self) -> Path:
        """Where a checkpoint is written before it has its name."""
        return self.folder / _WRITING

    @property
    def unfinished(self) -> bool:
        """Whether there is something to resume."""
        return self.latest() is not None

    @property
    def finished(self) -> bool:
        """Whether the directory holds an adapter that rqc trained."""
        return (self.output / TRAINING).is_file() and (self.output / BASIS_FILE).is_file()

    def latest(self) -> Path | None:
        """The complete checkpoint of the most steps."""
        return max(self._complete(), key=_step, default=None)

    def step(self) -> int:
        """The steps of `latest`; 0 without one."""
        latest = self.latest()
        return 0 if latest is None else _step(latest)

    def check_place(self, *, resume: bool) -> None:
        """Raise InputError where the directory holds something else, or a run that would be lost."""
        if self.output.exists() and not self.output.is_dir():
            raise InputError(f"{self.output} is a file", hint="-o names a directory")
        nearest = next(path for path in (self.output, *self.output.absolute().parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise InputError(f"{self.output} cannot be written: {nearest} is no writable folder", hint="choose another")
        entries = {entry.name for entry in self.output.iterdir()} if self.output.is_dir() else set()
        if entries - {FOLDER, _FINISHED} and not entries & {BASIS_FILE, TRAINING}:
            raise InputError(
                f"{self.output} holds files that are no adapter of rqc's; it is not overwritten",
                hint="name a new directory",
            )
        if self.unfinished and not resume:
            raise InputError(
                f"{self.output} holds a run that stopped after step {self.step()}",
                hint=f"go on with --resume, or remove {self.folder}",
            )

    def check_apart(self, directory: Path) -> None:
        """Raise InputError for a directory of another adapter that is this one's, or goes with its checkpoints."""
        other, own = directory.resolve(), self.output.resolve()
        if other == own or other.is_relative_to(self.folder.resolve()):
            raise InputError(
                f"{directory} is where the adapter itself is written", hint="--export-plain names another directory"
            )

    def compare(self, identity: Identity) -> None:
        """Raise InputError, naming what differs, where there is a run or adapter of other settings, model or data."""
        if (before := self._identity()) is not None:
            _same(self.output, before, identity)

    def day(self) -> datetime | None:
        """The day on which the run, or the finished adapter, was started; None where there is none."""
        started = (self._identity() or {}).get(DAY)
        try:
            return None if started is None else datetime.fromisoformat(started)
        except (TypeError, ValueError) as error:
            raise InputError(f"{self.output}: a run of the day {started!r}", hint="start it anew, elsewhere") from error

    @contextlib.contextmanager
    def opened(self, identity: Identity, *, resume: bool) -> Iterator[None]:
        """Take the directory for this run, in the one process that writes; leave it as it was if there is nothing to
        resume. Raises InputError if another process has it."""
        with explained(str(self.output)):
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._lock(descriptor)
            try:
                with explained(str(self.output)):
                    self._clean(keep=resume)
                    _replace(self.folder / RUN, json.dumps(dict(identity), indent=1))
                yield
            finally:
                if not self.unfinished:
                    shutil.rmtree(self.folder, ignore_errors=True)
                    with contextlib.suppress(OSError):  # not empty: an older adapter
                        self.output.rmdir()
        finally:
            os.close(descriptor)

    def commit(self) -> None:
        """Give what stands in `writing` its name, and let the oldest checkpoints go."""
        (written,) = self.writing.iterdir()
        for path in [*written.iterdir(), written]:
            _sync(path)
        os.rename(written, self.folder / written.name)
        _sync(self.folder)
        for old in sorted(self._complete(), key=_step)[:-KEPT]:
            os.rename(old, self.folder / _REMOVING)
            shutil.rmtree(self.folder / _REMOVING)

    def describe(self, directory: Path, training: Mapping[str, Any]) -> None:
        """Write what the training was beside an adapter."""
        with explained(str(directory)):
            _replace(directory / TRAINING, json.dumps(training, indent=1))

    def finish(self, training: Mapping[str, Any]) -> None:
        """Describe the finished adapter and remove the checkpoints."""
        self.describe(self.output, training)
        with explained(str(self.output)):
            os.rename(self.folder, self.output / _FINISHED)  # whole or gone, should this be killed
            shutil.rmtree(self.output / _FINISHED)

    def _identity(self) -> dict[str, Any] | None:
        """What the run, or the finished adapter, is of."""
        if self.unfinished:
            return read_object(self.folder / RUN)
        if not self.finished:
            return None
        training = read_object(self.output / TRAINING)
        if not isinstance(training.get("run"), dict) or not isinstance(training.get("report"), dict):
            raise InputError(f"{self.output / TRAINING} is damaged", hint="name another directory, or restore the file")
        return dict(training["run"])

    def _lock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another process is training into {self.output}", hint="wait for it, or name another directory"
            ) from error

    def _clean(self, *, keep: bool) -> None:
        """Remove what killed runs left: whatever is not whole, and without `keep` all checkpoints."""
        whole = set(self._complete()) if keep else set()
        left = [*self.output.parent.glob(f".{self.output.name}.rqc-*"), self.output / _FINISHED, *self.folder.iterdir()]
        for path in left:
            if path.is_dir() and path not in whole:
                shutil.rmtree(path)

    def _complete(self) -> list[Path]:
        if not (self.folder / RUN).is_file():
            return []
        return [path for path in self.folder.iterdir() if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]


def check_new(directory: Path) -> None:
    """Raise InputError unless a directory for an exported adapter is new, empty, or one of rqc's."""
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory} is a file", hint="--export-plain names a directory")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / TRAINING).is_file():
        raise InputError(
            f"{directory} holds files that are no adapter of rqc's; it is not overwritten", hint="name a new directory"
        )


def _step(checkpoint: Path) -> int:
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def _same(output: Path, before: Mapping[str, Any], now: Identity) -> None:
    """Raise InputError, naming what differs, unless a run is one of the same settings, model and data."""
    old, new = _flat(before), _flat(now)
    differing = [name for name in {**old, **new} if name not in MAY_DIFFER and old.get(name) != new.get(name)]
    if differing:
        told = "; ".join(f"{name} was {_short(old.get(name))}, is {_short(new.get(name))}" for name in differing)
        raise InputError(
            f"{output} holds another run: {told}", hint="resume it as it was started, or name another directory"
        )


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in identity.items() if name != "settings"}
    return {**identity.get("settings", {}), **rest}


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if re.fullmatch(r"[0-9a-f]{64}", text) else text


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    _sync(temporary)
    os.replace(temporary, path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
