"""tools/schemes: that rows are kept, and what is said of them. No engine is compiled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from threading import Barrier, Thread
from time import sleep
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from rqc.compiler.recipe import Recipe

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """tools/ on the path, as for the script itself."""
    write_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path.insert(0, str(TOOLS))
    yield
    sys.path.remove(str(TOOLS))
    sys.dont_write_bytecode = write_bytecode


@pytest.fixture
def rows() -> ModuleType:
    from scoring import rows

    return rows


@pytest.fixture
def measure() -> ModuleType:
    from scoring import measure

    return measure


@pytest.fixture
def verdicts() -> ModuleType:
    from scoring import verdicts

    return verdicts


@pytest.fixture
def told() -> ModuleType:
    from scoring import told

    return told


@pytest.fixture
def script() -> ModuleType:
    """The script as a module."""
    loader = SourceFileLoader("schemes_script", str(TOOLS / "schemes"))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_each_row_has_a_name_and_an_engine_of_its_own(rows: ModuleType) -> None:
    for table in (rows.ROWS, rows.FAITHFUL):
        assert len({row.name for row in table}) == len(table)
        assert len({tuple(row.options(Path("r"))) for row in table}) == len(table)
    assert {rows.BY_NAME[row.name] for row in rows.ROWS} == set(rows.ROWS)


def test_options_that_compile_knows_are_in_rows(rows: ModuleType) -> None:
    """The grids of activations, caches, methods, groups and rotations of the rows that need nothing else."""
    for row in rows.ROWS:
        words = row.options(Path("r"))
        if row.rotation == rows.LEARNED or {"--compensate", "--sparsity", "--activation-asymmetric"} & set(words):
            continue
        values: dict[str, Any] = {key[2:]: value for key, value in zip(words[::2], words[1::2], strict=True)}
        values["group-size"] = int(values["group-size"])
        if "bits-budget" in values:
            values["bits-budget"] = float(values["bits-budget"])
        recipe = Recipe.from_values(values)
        assert ("r3" in recipe.rotate) == (recipe.kv_cache != "float" and row.rotation == "all")


def test_patterns_choose_rows_and_learned_ones_want_a_file(rows: ModuleType) -> None:
    names = [row.name for row in rows.chosen(rows.ROWS, ["w4a4.*.gptq.*"], None)]
    assert sorted(names) == sorted(
        f"w4a4.{rotation}.gptq.{group}" for rotation in ("none", "r1r4", "all") for group in ("64", "channel")
    )
    assert [row.name for row in rows.chosen(rows.ROWS, ["w4a4.learned.rtn.64"], Path("r"))] == ["w4a4.learned.rtn.64"]


def test_what_is_kept_is_not_measured_again(measure: ModuleType, tmp_path: Path) -> None:
    calls: list[str] = []

    def make() -> dict[str, float]:
        calls.append("made")
        return {"perplexity": float(len(calls))}

    path = tmp_path / "rows" / "w4a4.all.rtn.64.json"
    first = measure.kept(path, ["--scheme", "w4a4"], make)
    assert measure.kept(path, ["--scheme", "w4a4"], make) == first
    assert measure.kept(path, ["--scheme", "w4a4", "--activation-clip", "0.9"], make)["perplexity"] == 2
    assert len(calls) == 2


def test_a_row_that_fails_or_is_killed_leaves_nothing(measure: ModuleType, tmp_path: Path) -> None:
    def killed() -> dict[str, float]:
        raise KeyboardInterrupt

    path = tmp_path / "row.json"
    with pytest.raises(KeyboardInterrupt):
        measure.kept(path, [], killed)
    assert not path.exists()
    assert measure.kept(path, [], lambda: {"perplexity": 1.0})["perplexity"] == 1.0


def test_two_that_want_the_same_row_measure_it_once(measure: ModuleType, tmp_path: Path) -> None:
    calls: list[int] = []
    start = Barrier(2)

    def make() -> dict[str, float]:
        calls.append(1)
        sleep(0.1)
        return {"perplexity": 1.0}

    def wanted() -> None:
        start.wait()
        measure.kept(tmp_path / "row.json", [], make)

    threads = [Thread(target=wanted) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_a_table_goes_on_after_a_row_that_fails(
    script: ModuleType, rows: ModuleType, measure: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = rows.BY_NAME["w4a4.all.rtn.64"], rows.BY_NAME["w4a4.none.rtn.64"]
    place = measure.Place(tmp_path, tmp_path, tmp_path)

    def fake(row: Any, _: Any) -> dict[str, Any]:
        if row is one:
            raise measure.FailedError("no such\noption")
        return _row(12.0)

    found, failed = script.measured([one, other], place, fake, 1)
    assert (list(found), failed) == ([other], {one: "no such option"})
    assert script.told([], failed) == 1
    assert "12.00" in script.table(found, failed, 10.0)
    assert "failed: no such option" in script.table(found, failed, 10.0)
    assert "[2 of 2] w4a4.none.rtn.64" in capsys.readouterr().err


def test_perplexities_are_pivoted_by_rotation_and_method(script: ModuleType, rows: ModuleType) -> None:
    names = {
        "w4a4.learned.gptq.64": 1.0,
        "w4a4.none.gptq.64": 2.0,
        "w4a4.none.rtn.64": 3.0,
        "w6a6.none.rtn.channel": 4.0,
    }
    found = {rows.BY_NAME[name]: _row(value) for name, value in names.items()}
    assert script.pivot(found).split("\n") == [
        "| scheme | group | none, rtn | none, gptq | learned, gptq |",
        "| --- | --- | --- | --- | --- |",
        "| w4a4 | 64 | 3.00 | 2.00 | 1.00 |",
        "| w6a6 | per channel | 4.00 |  |  |",
    ]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a single core")
def test_jobs_run_side_by_side_on_cores_of_their_own(script: ModuleType) -> None:
    both, cores = Barrier(2, timeout=20), []

    def work(_: int) -> None:
        both.wait()
        cores.append(os.sched_getaffinity(0))

    mine = os.sched_getaffinity(0)
    script.side_by_side(work, range(4), 2)
    assert len(cores) == 4
    assert sorted({tuple(sorted(share)) for share in cores}) == sorted(
        tuple(sorted(mine)[first::2]) for first in range(2)
    )
    assert os.sched_getaffinity(0) == mine


def test_an_interrupt_ends_jobs_that_would_go_on(tmp_path: Path) -> None:
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from scoring.jobs import side_by_side\n"
        "items = (item for item in range(4) if not item or time.sleep(0.2) is None)\n"
        "side_by_side(lambda item: (print(item, flush=True), time.sleep(60)), items, 1)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(TOOLS)], stdout=subprocess.PIPE, cwd=tmp_path) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"0\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=20) == 130
            assert process.stdout.read() == b""
        finally:
            process.kill()


def test_what_a_job_raises_ends_them_all(script: ModuleType) -> None:
    done = []

    def stumble(item: int) -> None:
        done.append(item)
        sleep(0.02)
        if item == 1:
            raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        script.side_by_side(stumble, range(50), 1)
    assert 1 < len(done) < 50


def test_a_compile_that_ends_with_an_error_says_which(measure: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(measure.FailedError, match="nowhere"):
        measure.rqc("inspect", tmp_path / "nowhere.plan")


def test_rows_tell_at_which_commit_they_were_measured(measure: ModuleType, told: ModuleType, tmp_path: Path) -> None:
    row = measure.kept(tmp_path / "row.json", [], lambda: {"perplexity": 1.0})
    assert row["commit"] == measure.commit()
    said = told.origin([{"commit": "abc"}, {"commit": "abc"}, {"perplexity": 1.0}])
    assert said == "measured at abc (2 rows), no commit known (1 rows)"


@pytest.mark.parametrize(
    ("scores", "missed"),
    [
        ({"w6a6.all.rtn.64": 10.3, "w4a4.all.gptq.64": 30.0, "w4a4-reference.none.rtn.64": 20.0}, 0),
        ({"w6a6.all.rtn.64": 10.4, "w6a6.r1r4.rtn.64": 10.2}, 0),
        ({"w6a6.all.rtn.64": 10.4, "w6a6.none.rtn.64": 10.1}, 1),
        ({"w4a4.all.gptq.64": 30.1}, 1),
        ({"w4a4.all.gptq.64": 20.0, "w4a4-reference.all.rtn.64": 21.0, "w4a4-reference.none.rtn.64": 1049.0}, 1),
        ({"w4a4.all.gptq.64": 20.0, "w4a4-reference.all.rtn.64": 21.0, "w4a4-reference.none.rtn.64": 1051.0}, 0),
        ({"w4a4-reference.all.gptq.64": 20.0, "w4a4-reference.none.gptq.64": 30.0}, 0),
        ({"w4a4.all.gptq.64": 20.0, "w4a4.none.gptq.64": 30.0}, 0),
        ({"w3a16.none.gptq.64": 20.0, "w3a16-eora.none.gptq.64": 20.0}, 1),
        ({"w3a16.none.gptq.64": 20.0, "w3a16-eora.none.gptq.64": 19.9}, 0),
        ({"w4a8.all.rtn.64": 20.0, "w4a8-kv8.all.rtn.64": 20.2}, 1),
        ({"w4a8.all.rtn.64": 20.0, "w4a8-kv8.all.rtn.64": 20.09, "w4a8-kv4.all.rtn.64": 30.0}, 0),
    ],
)
def test_a_figure_that_must_be_reached_fails_the_run(
    script: ModuleType, rows: ModuleType, verdicts: ModuleType, scores: dict[str, float], missed: int
) -> None:
    found = {rows.BY_NAME[name]: _row(value) for name, value in scores.items()}
    judged = verdicts.verdicts(found, 10.0)
    assert judged
    assert sum(one.must and not one.passed for one in judged) == missed
    assert script.told(judged, {}) == min(missed, 1)


@pytest.mark.parametrize(
    ("name", "ratios", "passed"),
    [
        ("w4a16.none.gptq.64", (0.7, 0.7, 1.0), True),
        ("w4a16.none.gptq.64", (0.1, 0.1, 1.01), False),
        ("w4a16.none.gptq.64", (0.8,), False),
        ("w4a4.none.gptq.64", (0.8,), True),
        ("w4a4.none.gptq.64", (0.1, 0.1, 1.01), False),
    ],
)
def test_no_linear_may_be_worse_than_rounding_to_nearest(
    rows: ModuleType, verdicts: ModuleType, name: str, ratios: tuple[float, ...], passed: bool
) -> None:
    objective = {f"layers.{at}": value for at, value in enumerate(ratios)}
    found = {rows.BY_NAME[name]: {**_row(10.0), "objective": objective}}
    assert [one.passed for one in verdicts.verdicts(found, 10.0) if "objective" in one.text] == [passed]


@pytest.mark.parametrize(
    ("name", "engine", "failed", "passed"),
    [
        ("w6a6.all.rtn.64", 10.09, [], True),
        ("w6a6.all.rtn.64", 9.85, [], False),
        ("w4a4.all.rtn.64", 10.15, [], True),
        ("w4a4-kv4.all.rtn.64", 10.21, [], False),
        ("w6a6.all.rtn.64", 10.0, ["weights"], False),
    ],
)
def test_an_engine_is_as_good_as_pytorch_and_no_better(
    rows: ModuleType, verdicts: ModuleType, name: str, engine: float, failed: list[str], passed: bool
) -> None:
    one = {"engine": engine, "pytorch": 10.0, "failed": failed}
    assert verdicts.faithful(rows.BY_NAME[name], one).passed is passed


def test_ranks_correlate_whatever_the_scale(verdicts: ModuleType) -> None:
    values = np.random.default_rng(0).normal(size=50)
    assert verdicts.spearman(values, np.exp(3 * values)) == pytest.approx(1)
    assert verdicts.spearman(values, -values) == pytest.approx(-1)
    # without ties, 1 − 6 Σd² / n(n² − 1)
    other = np.random.default_rng(1).normal(size=50)
    gaps = values.argsort().argsort() - other.argsort().argsort()
    assert verdicts.spearman(values, other) == pytest.approx(1 - 6 * (gaps**2).sum() / (50 * (50**2 - 1)))
    # with ties, the plain correlation of mean ranks: (1, 2.5, 2.5, 4) and (1, 2, 3, 4)
    assert verdicts.spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert np.isnan(verdicts.spearman([1, 1], [1, 2]))


def test_two_texts_agree_where_order_and_winners_do(script: ModuleType, tmp_path: Path) -> None:
    names = ["w6a6.all.rtn.64", "w4a4.all.gptq.64", "w4a4.all.rtn.64", "w4a4.r1r4.rtn.64", "w4a4.none.rtn.64"]
    first = _work(tmp_path / "a", dict(zip(names, (10, 20, 30, 40, 900), strict=True)))
    same = _work(tmp_path / "b", dict(zip(names, (12, 25, 36, 50, 9000), strict=True)))
    near = _work(tmp_path / "c", dict(zip(names, (12, 25, 24.6, 50, 9000), strict=True)))
    turned = _work(tmp_path / "d", dict(zip(names, (9000, 50, 36, 25, 12), strict=True)))
    assert script.main(["--compare", str(first), str(same)]) == 0
    assert script.main(["--compare", str(first), str(turned)]) == 1
    # another winner, less than 2 % apart: five rows with one swap correlate by 0.9
    assert script.main(["--compare", str(first), str(near)]) == 1
    judged = script.agreement(script._kept(first), script._kept(near))
    assert [one.passed for one in judged] == [False, True]


def test_figures_of_another_text_are_not_mixed_in(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work = _work(tmp_path / "a", {})
    with pytest.raises(SystemExit):
        script.main([str(tmp_path), "--data-dir", str(tmp_path), "--work", str(work), "--text", "c4"])
    assert "give another --work" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "are wanted"),
        (["--only", "w9"], "no row matches w9"),
        (["--tokens", "1"], "2 or more"),
        (["--jobs", "0"], "--jobs 0"),
    ],
)
def test_wrong_usage_is_said(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    place = [str(tmp_path), "--data-dir", str(tmp_path), "--work", str(tmp_path / "w")] if arguments else []
    with pytest.raises(SystemExit):
        script.main([*place, *arguments])
    assert said in capsys.readouterr().err


def test_texts_that_are_missing_are_named(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, name in (("wikitext", "valid.txt"), ("c4", "c4_demo.json")):
        work = tmp_path / text
        given = [str(tmp_path), "--data-dir", str(tmp_path), "--work", str(work), "--text", text]
        assert script.main(given) == 2
        assert name in capsys.readouterr().err


def _row(value: float) -> dict[str, Any]:
    """A row of the table as it is measured."""
    sizes = {"size_bytes": 1, "bits_per_weight": 4.5, "cache_bytes_per_token": 8}
    return {"perplexity": value, "compile_seconds": 1.0, "score_seconds": 1.0, **sizes, "objective": {}}


def _work(folder: Path, scores: dict[str, float]) -> Path:
    """A --work of that tool with rows in it."""
    (folder / "rows").mkdir(parents=True)
    (folder / "about.json").write_text(json.dumps({"model": "m", "text": "wikitext", "tokens": 4, "window": 2}))
    for name, value in scores.items():
        (folder / "rows" / f"{name}.json").write_text(json.dumps(_row(value)))
    return folder
