"""Progress on stderr, drawn by rich: a line for each finished step, a bar while a long one is under way."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn


class Steps:
    """Lines on stderr, and a bar on a terminal; where stderr is none, a line for each tenth of a long step."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._tenths = 0
        self._began = (0.0, 0)

    def __enter__(self) -> Steps:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar off the terminal, whatever ended the command."""
        self._stop()

    def line(self, text: str) -> None:
        """One finished step."""
        self._console.print(text, markup=False)

    def advance(self, label: str, done: int, total: int) -> None:
        """A step that is under way: `done` of `total`."""
        if self._console.is_terminal:
            self._draw(label, done, total)
            return
        tenths = 10 * done // max(total, 1)
        if tenths > self._tenths:
            self.line(f"{label} {10 * tenths}%{self._left(done, total)}")
        self._tenths = tenths if done < total else 0
        if not 0 < self._began[1] <= done < total:  # the first of a step, or its end
            self._began = (time.monotonic(), done if done < total else 0)

    def _left(self, done: int, total: int) -> str:
        """About how long the rest of a step takes, by what was done since the first that was heard of it."""
        began, first = self._began
        if not 0 < first < done < total:
            return ""
        seconds = (time.monotonic() - began) / (done - first) * (total - done)
        return f", about {seconds / 60:.0f} min left" if seconds >= 90 else f", about {seconds:.0f} s left"

    def _draw(self, label: str, done: int, total: int) -> None:
        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task(label, total=total)
            self._bar.start()
        self._bar.update(self._task, description=label, completed=done)
        if done >= total:
            self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
