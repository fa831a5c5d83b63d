"""Writing a directory as a whole: into one beside it, which takes its name at the end, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from rqc.runtime.errors import InputError

Part = Callable[[], Iterable[bytes]]
"""The contents of a file, made when it is written."""


def new_directory(directory: str | Path) -> Path:
    """The path, if nothing is there yet or an empty directory. Raises InputError."""
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists and is not an empty directory", hint="name a new directory")
    return target


def write_directory(parts: Mapping[str, Part], target: Path) -> list[Path]:
    """Write the parts, by relative path, into a new directory; the paths written. rename(2) replaces an empty one."""
    made = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
    staged: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        for name, part in parts.items():
            path = staged / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as out:
                out.writelines(part())
        staged.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        os.replace(staged, target)
    except BaseException:
        if staged is not None:
            shutil.rmtree(staged, ignore_errors=True)
        with contextlib.suppress(OSError):  # not made after all, or used by others by now
            for folder in made:
                folder.rmdir()
        raise
    return [target / name for name in parts]


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
