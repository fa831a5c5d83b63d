"""What commands print and how they end: results on stdout, progress on stderr, errors as two lines, exit codes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import typer

from rqc.runtime.errors import RqcError

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
PIPE_CLOSED = 141  # 128 + SIGPIPE
FAULT = 70  # sysexits' EX_SOFTWARE: a fault of rqc, neither a failed gate (1) nor wrong input (2)


def guarded(call: Callable[[], object], *, as_json: bool, command: str) -> int:
    """Run a command and return its exit code; whatever ends it early is told as `error: …` and `hint: …` on stderr.

    as_json: the error also goes to stdout, as {"error": {"type", "message", "hint"}}.
    """
    try:
        code = call()
    except RqcError as error:
        return _fail(type(error).__name__, error.message, error.hint, error.exit_code, as_json)
    except typer.TyperException as error:  # wrong usage
        return _fail("UsageError", error.format_message(), f"{command} --help", 2, as_json)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except MemoryError:
        return _fail("ResourceError", "out of memory", "use a smaller model or a machine with more memory", 2, as_json)
    except OSError as error:
        place = "" if error.filename is None else f": {error.filename}"
        return _fail("ResourceError", f"{error.strerror or error}{place}", "check the path and the disk", 2, as_json)
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
        return _fail("InternalError", message, "this is a fault of rqc: please report the lines above", FAULT, as_json)
    if code == INTERRUPTED:
        return _fail("Interrupted", "interrupted", "", INTERRUPTED, as_json)
    return code if isinstance(code, int) else 0


def _fail(kind: str, message: str, hint: str, code: int, as_json: bool) -> int:
    if as_json:
        _say(json.dumps({"error": {"type": kind, "message": message, "hint": hint}}), sys.stdout)
    _say(f"error: {' '.join(message.split())}", sys.stderr)
    if hint:
        _say(f"hint: {hint}", sys.stderr)
    return code


def _say(line: str, out: Any) -> None:
    """Print a line of an error. Where nobody listens (a closed pipe, a full disk) the exit code has to say it."""
    try:
        print(line, file=out, flush=True)
    except OSError:
        _silence(out)


def _silence(out: Any) -> None:
    """Send what is still in the buffer nowhere: the interpreter flushes once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


def open_standard_streams() -> None:
    """Put /dev/null where a standard stream was closed: the next file opened, an engine, would get its descriptor, and
    whatever a library prints."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (for good)


@contextlib.contextmanager
def result_on_stdout() -> Iterator[Callable[[Mapping[str, Any], str, bool], None]]:
    """Keep stdout for the result: what is printed meanwhile goes to stderr. Yields `emit(value, text, as_json)`."""
    out = sys.stdout

    def emit(value: Mapping[str, Any], text: str, as_json: bool) -> None:
        write((json.dumps(plain(value), indent=1) if as_json else text) + "\n", out)

    with contextlib.redirect_stdout(sys.stderr):
        yield emit


def stream(pieces: Iterable[str]) -> str:
    """Print pieces as they come, then end the line; the whole text."""
    whole = []
    for piece in pieces:
        write(piece, sys.stdout)
        whole.append(piece)
    write("\n", sys.stdout)
    return "".join(whole)


def write(text: str, out: Any) -> None:
    """Write and flush. Ends the command quietly where the reader of the pipe has gone."""
    try:
        out.write(text)
        out.flush()
    except BrokenPipeError as error:
        _silence(sys.stdout)
        raise typer.Exit(PIPE_CLOSED) from error


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: infinities and NaN become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
