"""What lazy weights raise while onnx_ir serializes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from onnx_ir.serde import SerdeError

from rqc.runtime.errors import RqcError


@contextmanager
def own_errors() -> Iterator[None]:
    """Raise the RqcError (a NaN in the checkpoint, a full disk) that onnx_ir has wrapped into errors of its own."""
    try:
        yield
    except SerdeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, RqcError):
            cause = cause.__cause__
        raise error if cause is None else cause from None
