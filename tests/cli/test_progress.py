"""Progress: whole lines where stderr is no terminal, a bar that never outlives the command where it is one."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from rqc.compiler.progress import Steps


def test_lines_by_tenths_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Steps() as steps:
        steps.line("PackBlocks [exact] 0.1 s")
        for done in range(0, 201, 3):
            steps.advance("weights", min(done, 200), 200)
        steps.advance("weights", 200, 200)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "PackBlocks [exact] 0.1 s"
    assert [line.partition(",")[0] for line in lines[1:]] == [f"weights {tenth}0%" for tenth in range(1, 11)]


def test_a_bar_is_taken_off_when_the_command_fails() -> None:
    out = io.StringIO()
    steps = Steps()
    steps._console = Console(file=out, force_terminal=True, width=80)

    def interrupted() -> None:
        with steps:
            steps.advance("weights", 10, 100)
            assert steps._bar is not None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert steps._bar is None
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h")  # the cursor is back


def test_the_time_left_is_told_where_there_is_no_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10000, 30))
    monkeypatch.setattr("rqc.compiler.progress.time.monotonic", lambda: float(next(clock)))
    with Steps() as steps:
        for done in range(1, 11):
            steps.advance("blocks", done, 10)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "blocks 10%"  # nothing is known yet
    assert lines[1] == "blocks 20%, about 4 min left"
    assert lines[8] == "blocks 90%, about 30 s left"
    assert lines[9] == "blocks 100%"
