"""The package root is light: a device that loads and runs an engine imports neither torch nor the compiler."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import rqc
from rqc.runtime.backends.session import _quota, default_threads
from rqc.runtime.bench import bench_engine, peak_rss_bytes
from rqc.runtime.errors import InputError

SCRIPT = """
import sys, json
import rqc
assert "numpy" not in sys.modules
engine = rqc.load(sys.argv[1], threads=1)
text = engine.generate("the cat", max_new_tokens=5)
engine.logits([1, 2, 3])
engine.chat([{"role": "user", "content": "Hi"}], max_new_tokens=3)
from rqc.runtime.bench import bench_engine
bench_engine(sys.argv[1], threads=1, repeats=1)
print(json.dumps([text, sorted(sys.modules)]))
"""
HEAVY = {"torch", "transformers", "peft", "mobius", "onnxscript", "onnx", "onnx_ir", "safetensors", "gguf", "ml_dtypes"}


def test_running_an_engine_imports_no_compiler(engine_path):
    path = engine_path(files={"chat_template.jinja": b"{{ messages[0].content }}"})
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text, modules = json.loads(done.stdout)
    assert text == rqc.load(path, threads=1).generate("the cat", max_new_tokens=5)
    roots = {name.split(".")[0] for name in modules}
    assert not roots & HEAVY
    assert not {name for name in modules if name.startswith(("rqc.compiler", "rqc.passes", "rqc.models"))}


def test_the_root_names():
    assert rqc.load.__qualname__ == "Engine.load"
    assert issubclass(InputError, rqc.RqcError)
    assert rqc.__version__[0].isdigit()
    assert {"load", "compile", "verify", "RqcError"} <= set(dir(rqc))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = rqc.nonsense


def test_bench_has_exactly_its_keys(engine_path, cache):
    result = bench_engine(engine_path(cache=cache), threads=1, repeats=1)
    assert set(result) == {
        "load_s",
        "ttft_s",
        "prompt_tokens",
        "new_tokens",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
        "peak_rss_bytes",
        "threads",
    }
    assert (result["prompt_tokens"], result["new_tokens"], result["threads"]) == (128, 64, 1)
    assert all(value > 0 for value in result.values())
    assert result["prefill_tokens_per_s"] == pytest.approx(128 / result["ttft_s"])
    json.dumps(result)


def test_bench_sizes(engine_path):
    path = engine_path(context=64)
    short = bench_engine(path, threads=1, repeats=1)
    assert short["prompt_tokens"] + short["new_tokens"] <= 64
    for sizes in ({"prompt_tokens": 60, "new_tokens": 5}, {"prompt_tokens": 0}, {"new_tokens": 1}, {"repeats": 0}):
        with pytest.raises(InputError):
            bench_engine(path, threads=1, **sizes)


@pytest.mark.parametrize(
    ("text", "expected"), [("200000 100000\n", 2), ("50000 100000\n", 1), ("350000 100000", 3), ("max 100000\n", 1024)]
)
def test_a_container_quota_limits_the_threads(tmp_path, text, expected):
    (tmp_path / "cpu.max").write_text(text)
    assert _quota(tmp_path / "cpu.max") == expected
    assert _quota(tmp_path / "absent") == 1024


def test_measures_of_the_process():
    assert 1 <= default_threads() <= 4096
    held = bytearray(b"x") * (64 << 20)
    assert peak_rss_bytes() >= len(held)
