"""The raw parts of an engine as a directory: graph.onnx with its weights beside it, tokenizer, manifest."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from rqc.runtime.container import EngineFile
from rqc.runtime.errors import InputError, ResourceError
from rqc.runtime.zip_layout import GRAPH


def extract(engine: str | Path, directory: str | Path) -> list[Path]:
    """Write every entry of `engine` into `directory`, new or empty; the paths written.

    graph.onnx is rebound to read its weights from weights.bin beside it, so any ONNX Runtime loads it; every other
    entry comes out byte for byte, checked against its hash. All or nothing: on an error `directory` is as it was.
    Raises InputError if `directory` is in use or cannot be written, ResourceError if the disk is full.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists and is not an empty directory", hint="name a new directory")
    with EngineFile.open(engine) as file:
        try:
            return _write(file, target)
        except OSError as error:
            problem = f"the parts of {engine} cannot be written to {target}: {error.strerror}"
            raise ResourceError(problem, hint=f"{file.size_bytes} bytes are needed, in a writable place") from error


def _write(file: EngineFile, target: Path) -> list[Path]:
    """Into a directory beside the target, which takes its name at the end: rename(2) replaces an empty directory."""
    made = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
    staged: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        for name in file.names():
            path = staged / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as out:
                out.writelines([file.standalone_graph()] if name == GRAPH else file.chunks(name))
        staged.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        os.replace(staged, target)
    except BaseException:
        if staged is not None:
            shutil.rmtree(staged, ignore_errors=True)
        with contextlib.suppress(OSError):  # not made after all, or used by others by now
            for folder in made:
                folder.rmdir()
        raise
    return [target / name for name in file.names()]


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
