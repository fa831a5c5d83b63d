"""tools/bench: what is said of rounds, and that contenders do not disturb each other. Speeds are not tested."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from rqc.runtime.errors import ResourceError

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
def rounds() -> ModuleType:
    from benching import rounds

    return rounds


def test_each_round_begins_with_the_next_contender(rounds: ModuleType) -> None:
    order: list[str] = []

    def measure(name: str) -> dict[str, float]:
        order.append(name)
        return {"speed": 1.0}

    done = rounds.interleaved("abc", 4, measure, lambda _: None)
    assert "".join(order) == "abcbcacababc"
    assert all(set(row) == set("abc") for row in done)


def test_ratios_are_taken_within_rounds(rounds: ModuleType) -> None:
    """A machine that slows down by ten between rounds does not change a ratio."""
    speeds = [100.0, 10.0, 50.0]
    done = [{"a": {"speed": 0.9 * speed}, "b": {"speed": speed}} for speed in speeds]
    assert rounds.ratio(done, "a", "b", "speed").to_json() == pytest.approx({"median": 0.9, "q1": 0.9, "q3": 0.9})
    assert rounds.figure(done, "b", "speed") == rounds.Quartiles(50.0, 30.0, 75.0)
    assert rounds.widest(done, ["speed"]) == pytest.approx(0.9)


@pytest.mark.parametrize(("spreads", "made", "kept"), [([0.1], 1, 0), ([0.4, 0.1], 2, 1), ([0.3, 0.5, 0.4], 3, 0)])
def test_unsteady_runs_are_repeated_and_the_steadiest_is_kept(
    rounds: ModuleType, spreads: list[float], made: int, kept: int
) -> None:
    runs = [[{"a": {"speed": 1 + factor * spread}} for factor in (-1, 0, 1)] for spread in spreads]
    pending = iter(runs)
    best, found = rounds.steady(lambda: next(pending), ["speed"], limit=0.15, runs=3)
    assert best is runs[kept]
    assert found == pytest.approx(spreads[:made])


WORKER = """
import json, sys, threading, time
if sys.argv[2].endswith("bad"):
    sys.exit("no such model")
def spin():
    while True:
        pass
threading.Thread(target=spin, daemon=True).start()
print(json.dumps({"load_s": 0.0, "versions": {}}), flush=True)
for line in sys.stdin:
    begin = time.process_time()
    request = json.loads(line)
    print(json.dumps({"prefill_s": 1.0, "decode_s": 2.0, "prefill_cpu_s": 0.0, "decode_cpu_s": 0.0,
                      "tokens": len(request["prompt"]) + request["new"]}), flush=True)
"""


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_idle_contenders_use_no_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    from benching import contenders

    monkeypatch.setattr(contenders, "WORKER", tmp_path / "worker.py")
    contenders.WORKER.write_text(WORKER)
    contender = contenders.Contender("spinner", "rqc", tmp_path, Path(sys.executable), "")
    with contenders.Running(contender, 1, 8, tmp_path / "log") as running:
        assert running.run([1, 2, 3], 4)["tokens"] == 7
        pid = running._process.pid
        time.sleep(0.05)  # the signal arrives
        before = cpu_ticks(pid)
        time.sleep(0.3)
        assert cpu_ticks(pid) == before
        assert running.run([1], 1)["tokens"] == 2, "it goes on when asked"
    assert not Path(f"/proc/{pid}").exists()


def test_a_contender_that_does_not_load_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benching import contenders

    monkeypatch.setattr(contenders, "WORKER", tmp_path / "worker.py")
    contenders.WORKER.write_text(WORKER)
    contender = contenders.Contender("broken", "rqc", tmp_path / "bad", Path(sys.executable), "")
    with pytest.raises(ResourceError, match="broken ended with code 1: no such model"):
        contenders.Running(contender, 1, 8, tmp_path / "log")


def test_kernel_graphs_compute_the_same_linear() -> None:
    """Nibble planes and float agree to the last bits, the int8 forms to their grid."""
    from benching.kernel_graphs import Linear, Variant
    from benching.kernels import Timed

    linear = Linear(48, 64, 3)
    codes = linear.blocks(32)
    x = {"x64": np.random.default_rng(0).standard_normal((2, 64), np.float32)}
    exact = x["x64"] @ codes.weight.T
    for variant, limit in (
        (Variant.blocks([codes], level=0), 1e-5),
        (Variant.planes(codes), 1e-5),
        (Variant.floats([codes]), 1e-5),
        (Variant.blocks([codes], level=4), 0.02),
        (Variant.dynamic([linear]), 0.03),
    ):
        (result,) = Timed(variant, x, 1).results()
        assert np.linalg.norm(result - exact) / np.linalg.norm(exact) < limit


def test_gguf_names_and_rotary_order() -> None:
    from benching.gguf_q4_0 import gguf_name, reordered

    assert gguf_name("model.layers.12.self_attn.q_proj.weight") == "blk.12.attn_q.weight"
    assert gguf_name("lm_head.weight") == "output.weight"
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert reordered(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_random_adapter_is_one_for_every_linear(tmp_path: Path) -> None:
    """What --branch times is an adapter that the compiler reads, beside all linears of the blocks."""
    from benching import engines
    from tiny import save_tiny

    from rqc.compiler.importer import import_model
    from rqc.models.adapter import Adapter

    model = save_tiny("llama16", tmp_path / "tiny")
    description = import_model(model).description
    found = Adapter.open(engines.adapter(model, tmp_path, 5), description)
    assert set(found.deltas) == set(description.by_weight)
    assert all(delta.rank == 5 and np.abs(delta.dense()).max() > 0 for delta in found.deltas.values())
