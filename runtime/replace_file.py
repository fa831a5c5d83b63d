"""Replacing a file as a whole: written beside it under a temporary name, synced and renamed over it, or not touched."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from types import TracebackType

from rqc.runtime.errors import InputError, ResourceError

_LONGEST = 200  # bytes of a target's name that go into its temporary name; file names have at most 255
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def explained(path: str) -> Iterator[None]:
    """Turn the operating system's refusals to write beside `path` into errors that name cause and way out."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise ResourceError(
                f"no space for {path} ({error.strerror})", hint="free some, or write elsewhere"
            ) from error
        if error.errno == errno.EIO:
            raise ResourceError(f"{path} cannot be written ({error.strerror})", hint="check the disk") from error
        raise InputError(f"{path} cannot be written ({error.strerror})", hint="choose a writable folder") from error


def check_folder(path: str) -> None:
    """Raise InputError where no file can lie at `path`, before anything has been computed for it."""
    with explained(path):
        os.stat(os.path.join(os.path.dirname(path), ""))
        with contextlib.suppress(FileNotFoundError):
            os.lstat(path)  # a name that is too long shows


def _stem(path: str) -> str:
    """What the temporary names of a target begin with: its own name, or a hash of it where that is long."""
    name = os.fsencode(os.path.basename(path))
    return f".{os.fsdecode(name) if len(name) <= _LONGEST else hashlib.sha256(name).hexdigest()}.rqc-"


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Whether the lock was taken. The kernel drops it when its owner dies, however; a process id may be reused."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in (*_NO_LOCKS, errno.EWOULDBLOCK):
            return False
        raise
    return True


def _is_at(descriptor: int, path: str) -> bool:
    """Whether `path` is the open file (and not removed or another one by now)."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def remove_abandoned(path: str) -> list[str]:
    """Remove the temporary files that dead writers of `path` left; return them. A living owner's is locked and stays.

    On a file system without locks none is removed.
    """
    folder, stem = os.path.dirname(path), _stem(path)
    pattern = re.compile(re.escape(stem) + r"[0-9]+-[0-9]+\.tmp")
    removed: list[str] = []
    for name in sorted(os.listdir(folder)):
        if not pattern.fullmatch(name):
            continue
        left = os.path.join(folder, name)
        try:
            descriptor = os.open(left, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # gone meanwhile, another user's, or no file: nothing of ours to clean
            continue
        try:
            if _lock(descriptor, wait=False) and _is_at(descriptor, left):
                os.unlink(left)
                removed.append(left)
        finally:
            os.close(descriptor)
    return removed


def folder_beside(path: str) -> contextlib.AbstractContextManager[str]:
    """A temporary folder beside the file at the real path `path`, for what becomes part of it; see `locked_folder`."""
    return locked_folder(_stem(path), os.path.dirname(path))


@contextlib.contextmanager
def locked_folder(prefix: str, parent: str) -> Iterator[str]:
    """A temporary folder in `parent` that vanishes at the end; those of this name that dead owners left vanish too.

    Raises InputError if `parent` cannot be written to, ResourceError if the disk is full.
    """
    with explained(parent):
        _remove_folders(prefix, parent)
        while True:
            folder = tempfile.mkdtemp(prefix=prefix, dir=parent)
            try:
                descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:  # another owner saw it before the lock was on it, and removed it
                continue
            _lock(descriptor, wait=True)
            if _is_at(descriptor, folder):
                break
            os.close(descriptor)  # likewise
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


@contextlib.contextmanager
def scratch_folder(kind: str) -> Iterator[str]:
    """A `locked_folder` where TMPDIR says, for what is gone when the work is done. Raises ResourceError, naming it, for
    whatever is written in this context once it is full."""
    with locked_folder(f"rqc-scratch-{kind}-", tempfile.gettempdir()) as folder, scratch_written(folder):
        yield folder


@contextlib.contextmanager
def scratch_written(folder: str) -> Iterator[None]:
    """Turn a full disk, met in this context, into a ResourceError that names the scratch folder."""
    try:
        yield
    except OSError as error:
        if error.errno not in (*_FULL, None):  # numpy's own, of a file that was cut short, has no number
            raise
        raise ResourceError(
            f"no space for temporary files in {os.path.dirname(folder)} ({error.strerror or error})",
            hint="free some, or let TMPDIR name another folder",
        ) from error


def _remove_folders(prefix: str, parent: str) -> None:
    pattern = re.compile(re.escape(prefix) + "[a-z0-9_]{8}")  # what mkdtemp adds, and nobody's own
    for name in sorted(os.listdir(parent)):
        if not pattern.fullmatch(name):
            continue
        left = os.path.join(parent, name)
        try:
            descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:  # no folder, gone meanwhile, or another user's
            continue
        try:
            if _lock(descriptor, wait=False) and _is_at(descriptor, left):
                shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(descriptor)


class Replacement:
    """A context in which the successor of the file at `path` is written; without `commit` it vanishes at the end.

    Raises InputError if the folder cannot be written to, ResourceError if the disk is full.
    """

    def __init__(self, path: str, size_bytes: int) -> None:
        """Prepare a successor of `size_bytes` bytes for the file at the real path `path`."""
        self.path = path
        self.temporary = ""
        self._size = size_bytes
        self._descriptor = -1

    def __enter__(self) -> Replacement:
        try:
            with explained(self.path):
                remove_abandoned(self.path)
                self._create()
                self._reserve()
        except BaseException:
            self._discard()
            raise
        return self

    def _create(self) -> None:
        for attempt in range(1000):
            name = f"{_stem(self.path)}{os.getpid()}-{attempt}.tmp"
            temporary = os.path.join(os.path.dirname(self.path), name)
            try:
                self._descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            except FileExistsError:
                continue
            self.temporary = temporary
            _lock(self._descriptor, wait=True)
            if _is_at(self._descriptor, temporary):
                return
            # another writer saw the file before the lock was on it, and removed it
            os.close(self._descriptor)
            self._descriptor, self.temporary = -1, ""
        raise FileExistsError(errno.EEXIST, "a thousand temporary files are in use", self.path)

    def _reserve(self) -> None:
        """Take the space now: a full disk shows at once and not after minutes of folding."""
        try:
            os.posix_fallocate(self._descriptor, 0, self._size)
        except OSError as error:
            if error.errno in _FULL:
                raise
            os.ftruncate(self._descriptor, self._size)  # a file system that cannot reserve

    def write(self, data: bytes | memoryview, place: int) -> None:
        """Write `data` at byte `place`."""
        rest = memoryview(data)
        with explained(self.path):
            while rest:
                done = os.pwrite(self._descriptor, rest, place)
                rest, place = rest[done:], place + done

    def commit(self) -> None:
        """Sync the file and let it take the place of the old one."""
        with explained(self.path):
            os.fsync(self._descriptor)
            os.replace(self.temporary, self.path)
            self.temporary = ""
            folder = os.open(os.path.dirname(self.path), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _discard(self) -> None:
        try:
            if self.temporary:
                os.unlink(self.temporary)
        finally:
            self.temporary = ""
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()
