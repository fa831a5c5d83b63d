"""The command line as scripts see it: results on stdout, exit codes, JSON keys, two-line errors."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from rqc.compiler import cli
from rqc.runtime import doctor
from rqc.runtime.engine import Engine
from rqc.runtime.errors import InputError

COMPILE_KEYS = {"engine", "size_bytes", "seconds", "peak_rss_bytes", "passes", "rotation", "survival", "parity"}
VERIFY_KEYS = {"passed", "tokens", "max_abs", "mean_kl", "top1_agreement", "ppl_engine", "ppl_reference", "gates"}
INSPECT_KEYS = {
    *("format_version", "target", "scheme", "group_size", "method", "rotation", "adapter", "kv_cache", "size_bytes"),
    *("weight_bytes", "bits_per_weight", "layers", "parameters", "provenance"),
}
BENCH_KEYS = {
    *("load_s", "ttft_s", "prompt_tokens", "new_tokens", "prefill_tokens_per_s", "decode_tokens_per_s"),
    *("peak_rss_bytes", "threads"),
}


def shell(*args: object, **options: object) -> subprocess.CompletedProcess[str]:
    """`rqc` as a process of its own, stdin closed."""
    command = [sys.executable, "-c", "import sys; from rqc.compiler.cli import main; sys.exit(main())", *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment, check=False, **options
    )


def test_compile_reports_its_keys_and_prints_nothing_else(rqc, model_dir, tmp_path):
    path = tmp_path / "e.plan"
    done = rqc("compile", model_dir, "-o", path, "--scheme", "w4a16", "--rotate", "r1,r4", "--json")
    assert done.code == 0
    assert set(done.value) >= COMPILE_KEYS
    assert done.value["engine"] == str(path)
    assert done.value["size_bytes"] == path.stat().st_size
    assert {"name", "exact", "seconds", "drift"} <= set(done.value["passes"][0])
    assert done.value["rotation"]["chosen"] == "r1,r4"
    assert done.value["parity"] is None


def test_compile_tells_a_person(rqc, model_dir, tmp_path):
    done = rqc("compile", model_dir, "-o", tmp_path / "e.plan", "--rotate", "none", "--scheme", "fp32")
    assert done.code == 0
    assert str(tmp_path / "e.plan") in done.out
    assert "Fuse" in done.err


def test_every_compile_flag_reaches_the_engine(rqc, model_dir, tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('scheme = "w8a16"\ngroup-size = 64\nhadamard = "block"\n')
    path = tmp_path / "e.plan"
    flags = ["--group-size", "-1", "--asymmetric", "--clip", "none", "--rotate", "r1", "--rotation-seed", "3"]
    done = rqc("compile", model_dir, "-o", path, "--recipe", recipe, *flags, "--tied", "untie", "--embedding-bits", "4")
    assert done.code == 0, done.err
    found = rqc("inspect", path, "--json").value
    assert (found["scheme"], found["group_size"], found["symmetric"], found["clip"]) == ("w8a16", -1, False, "none")
    assert (found["rotation"]["sites"], found["rotation"]["seed"]) == (["r1"], 3)
    assert (found["rotation"]["hadamard"], found["tied"]) == ("block", "untie")
    assert {layer["bits"] for layer in found["layers"] if "bits" in layer} == {4, 8}


def test_a_dry_run_writes_nothing(rqc, model_dir, tmp_path):
    done = rqc("compile", model_dir, "-o", tmp_path / "e.plan", "--rotate", "none", "--dry-run", "--json")
    assert (done.code, done.value["engine"]) == (0, None)
    assert list(tmp_path.iterdir()) == []


def test_dump_and_verify_each(rqc, model_dir, tmp_path):
    options = ["--rotate", "r1,r4", "--scheme", "fp32", "--verify-each", "--dump-ir", tmp_path / "ir", "--json"]
    done = rqc("compile", model_dir, "-o", tmp_path / "e.plan", *options)
    assert done.code == 0, done.err
    assert all(step["drift"] is not None for step in done.value["passes"])
    assert len(list((tmp_path / "ir").glob("*.onnx"))) == len(done.value["passes"]) + 1


def test_verify_after_a_compile(rqc, model_dir, tmp_path):
    path = tmp_path / "e.plan"
    done = rqc("compile", model_dir, "-o", path, "--scheme", "fp32", "--rotate", "none", "--verify", "--json")
    assert done.code == 0, done.err
    assert set(done.value["parity"]) >= VERIFY_KEYS
    assert done.value["parity"]["passed"]


def test_verify_fails_by_exit_code_when_a_gate_that_was_set_fails(rqc, engine, model_dir):
    options = [engine, model_dir, "--tokens", "128", "--window", "64"]
    done = rqc("verify", *options, "--json")
    assert done.code == 0, done.err
    assert set(done.value) >= VERIFY_KEYS
    done = rqc("verify", *options, "--gate", "ppl_ratio=0.01", "--json")
    assert done.code == 1
    assert not done.value["passed"]
    done = rqc("verify", *options, "--gate", "ppl_ratio=0.01")
    assert done.code == 1
    assert "ppl_ratio" in done.err.splitlines()[-2]
    assert "FAILED" in done.out


def test_inspect_tells_its_keys(rqc, engine):
    found = rqc("inspect", engine, "--check", "--json")
    assert found.code == 0
    assert set(found.value) >= INSPECT_KEYS
    assert {"sites", "basis", "hadamard"} <= set(found.value["rotation"])
    assert found.value["size_bytes"] == engine.stat().st_size
    memory = rqc("inspect", engine, "--context", "100", "--json").value["memory"]
    assert memory["kv_cache"] == 2 * 2 * 2 * 16 * 4 * 100  # k and v, layers, kv heads, head size, float32, tokens
    assert memory["total"] == memory["weights"] + memory["packed_copies"] + memory["kv_cache"]


def test_inspect_for_a_person(rqc, engine):
    short, long = rqc("inspect", engine).out, rqc("inspect", engine, "--layers").out
    assert long.startswith(short.rstrip())
    assert "down_proj" in long
    assert "down_proj" not in short
    for word in ("w4a8", "groups of 32", "llama", "int8", "about"):
        assert word in short


def test_inspect_refuses_a_context_that_the_engine_does_not_have(rqc, engine):
    assert rqc("inspect", engine, "--context", "129").code == 2


def test_inspect_check_finds_a_flipped_bit_in_the_weights(rqc, engine, tmp_path):
    data = bytearray(engine.read_bytes())
    entry = rqc("inspect", engine, "--json").value["entries"]
    data[len(data) - sum(size for name, size in entry.items() if name > "weights.bin") - 70_000] ^= 1
    damaged = tmp_path / "damaged.plan"
    damaged.write_bytes(data)
    done = rqc("inspect", damaged, "--check")
    assert done.code == 2
    assert done.err.startswith("error: ")


def test_bench_tells_exactly_its_keys(rqc, engine):
    done = rqc(
        "bench", engine, "--prompt-tokens", "8", "--new-tokens", "4", "--repeats", "1", "--threads", "1", "--json"
    )
    assert set(done.value) == BENCH_KEYS
    assert (done.value["prompt_tokens"], done.value["new_tokens"], done.value["threads"]) == (8, 4, 1)
    text = rqc("bench", engine, "--prompt-tokens", "8", "--new-tokens", "4", "--repeats", "1", "--threads", "1").out
    assert "tokens/s" in text


def test_extract_gives_parts_that_onnx_runtime_loads(rqc, engine, tmp_path):
    done = rqc("extract", engine, "-o", tmp_path / "parts", "--json")
    assert done.code == 0
    names = {Path(name).name for name in done.value["files"]}
    assert {"graph.onnx", "weights.bin", "manifest.json", "tokenizer.json", "chat_template.jinja"} <= names
    session = onnxruntime.InferenceSession(tmp_path / "parts" / "graph.onnx", providers=["CPUExecutionProvider"])
    assert "input_ids" in {value.name for value in session.get_inputs()}
    again = rqc("extract", engine, "-o", tmp_path / "parts")
    assert again.code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts"]


def test_run_streams_what_the_engine_generates(rqc, engine):
    with Engine.load(engine, threads=1) as loaded:
        greedy = loaded.generate("the cat", max_new_tokens=8)
        drawn = loaded.generate("the cat", max_new_tokens=8, temperature=1.5, top_k=50, top_p=0.9, seed=7)
        answer = loaded.chat([{"role": "user", "content": "Hi"}], max_new_tokens=8)
    common = ["--max-new-tokens", "8", "--threads", "1"]
    assert rqc("run", engine, "-p", "the cat", *common).out == greedy + "\n"
    sampling = ["--temperature", "1.5", "--top-k", "50", "--top-p", "0.9", "--seed", "7"]
    assert rqc("run", engine, "-p", "the cat", *common, *sampling).out == drawn + "\n"
    assert rqc("run", engine, "--chat", "-p", "Hi", *common).out == answer + "\n"
    stop = greedy[2:4]
    assert rqc("run", engine, "-p", "the cat", *common, "--stop", stop).out == greedy[: greedy.find(stop)] + "\n"


class Terminal(io.StringIO):
    """Standard input of a person."""

    def isatty(self) -> bool:
        return True


def test_run_reads_the_prompt_from_a_pipe_and_asks_for_one_on_a_terminal(rqc, engine, monkeypatch):
    options = ["--max-new-tokens", "4", "--threads", "1"]
    wanted = rqc("run", engine, "-p", "the dog", *options).out
    monkeypatch.setattr(sys, "stdin", io.StringIO("the dog"))
    assert rqc("run", engine, *options).out == wanted
    monkeypatch.setattr(sys, "stdin", Terminal("Hi\n\nAnd you?\n"))
    assert rqc("run", engine, "--chat", *options).out.count("\n") >= 2
    done = rqc("run", engine, *options)
    assert (done.code, done.err.splitlines()[-1]) == (2, "hint: -p TEXT, text on stdin, or --chat for a talk")


def test_doctor_and_version(rqc):
    report = rqc("doctor", "--json").value
    assert report["packages"]["onnxruntime"] == onnxruntime.__version__
    assert report["packages"]["numpy"] == np.__version__
    assert report["run"]["onnx"]
    assert "CPUExecutionProvider" in report["providers"]
    assert "onnxruntime" in rqc("doctor").out
    version = rqc("--version")
    assert (version.code, version.out) == (0, f"rqc {report['rqc']}\n")


@pytest.mark.parametrize(
    ("args", "said", "hinted"),
    [
        (["inspect", "nothing.plan"], "nothing.plan", "engine.plan"),
        (["compile", "nowhere", "-o", "e.plan"], "nowhere", ""),
        (["compile", "nowhere", "-o", "e.plan", "--scheme", "w5a5"], "w5a5", "w4a8"),
        (["compile", "nowhere", "-o", "e.plan", "--target", "coreml"], "coreml", "onnx"),
        (["compile", "nowhere"], "no engine", "-o"),
        (["compile", "nowhere", "--dry-run", "--verify"], "dry run", "leave"),
        (["verify", "e.plan", "nowhere", "--gate", "kl"], "--gate kl", "NAME=VALUE"),
        (["run"], "ENGINE", "rqc run --help"),
        (["run", "e.plan", "--warmth", "2"], "--warmth", "rqc run --help"),
        (["fine-tune", "m"], "fine-tune", "rqc --help"),
        (["finetune", "m"], "--data", "rqc finetune --help"),
        (["finetune", "m", "--data", "d.jsonl", "-o", "a", "--base", "w5"], "w5", "w4"),
        (["bench", "e.plan", "--threads", "two"], "--threads", "rqc bench --help"),
    ],
)
def test_errors_are_two_lines_or_one_object(rqc, args, said, hinted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = rqc(*args)
    assert (done.code, done.out) == (2, "")
    error, hint = done.err.splitlines()[-2:]
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    assert said in error
    assert hinted in hint
    assert "Traceback" not in done.err
    if args[0] not in ("run", "fine-tune"):
        with_json = rqc(*args, "--json")
        assert with_json.code == 2
        assert set(with_json.value) == {"error"}
        assert set(with_json.value["error"]) == {"type", "message", "hint"}
        assert said in with_json.value["error"]["message"]
    assert list(tmp_path.iterdir()) == []


def test_errors_of_a_process(tmp_path):
    done = shell("inspect", tmp_path / "nothing.plan", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["type"] == "InputError"
    assert done.stderr.splitlines()[0].startswith("error: ")
    assert len(done.stderr.splitlines()) == 2


def test_a_reader_that_goes_away_is_no_error(engine):
    command = [sys.executable, "-c", "import sys; from rqc.compiler.cli import main; sys.exit(main())"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*command, "inspect", str(engine)], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_commands_of_a_device_import_no_compiler(engine):
    script = """
import sys
from rqc.compiler.cli import main
codes = [main([*command.split(), *sys.argv[1:]]) for command in ("inspect", "run -p the --max-new-tokens 2")]
codes.append(main(["doctor"]))
heavy = {"torch", "transformers", "peft", "mobius", "onnx", "onnx_ir", "tomllib"} & set(sys.modules)
sys.exit(f"{codes} {heavy}" if any(codes) or heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", script, engine], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [["compile", "m", "-o", "e.plan"], ["verify", "e.plan", "m"]])
def test_without_the_extra_compile_says_how_to_get_it(rqc, monkeypatch, command):
    monkeypatch.setattr(doctor, "missing", lambda packages: ["torch"])
    done = rqc(*command)
    assert done.code == 2
    assert "torch" in done.err.splitlines()[-2]
    assert "pip install 'rqc[compile]'" in done.err.splitlines()[-1]


def test_an_interrupt_is_one_line(rqc, monkeypatch):
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.doctors, "diagnose", interrupted)
    done = rqc("doctor")
    assert (done.code, done.out, done.err) == (130, "", "error: interrupted\n")


def test_a_fault_of_rqc_is_told_apart_from_a_failed_gate(rqc, monkeypatch):
    def fault() -> None:
        raise ZeroDivisionError("seven")

    monkeypatch.setattr(cli.doctors, "diagnose", fault)
    done = rqc("doctor")
    assert done.code == 70
    assert "Traceback" in done.err
    assert "ZeroDivisionError: seven" in done.err.splitlines()[-2]


@pytest.mark.parametrize(("error", "code"), [(MemoryError(), 2), (OSError(28, "No space left on device", "x"), 2)])
def test_lack_of_memory_and_disk_are_errors_with_two_lines(rqc, monkeypatch, error, code):
    def lacking() -> None:
        raise error

    monkeypatch.setattr(cli.doctors, "diagnose", lacking)
    done = rqc("doctor", "--json")
    assert done.code == code
    assert done.value["error"]["type"] == "ResourceError"


def test_library_chatter_does_not_reach_stdout(rqc, monkeypatch):
    def chatty() -> dict[str, object]:
        print("loading weights: 100%")
        raise InputError("no", hint="way out")

    monkeypatch.setattr(cli.doctors, "diagnose", chatty)
    done = rqc("doctor", "--json")
    assert done.value == {"error": {"type": "InputError", "message": "no", "hint": "way out"}}


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams(engine, model_dir, tmp_path, closed):
    """Nothing that is printed lands in a file that took the place of a stream."""
    rqc = f"{sys.executable} -c 'import sys; from rqc.compiler.cli import main; sys.exit(main())'"
    path = tmp_path / "e.plan"
    for command in (f"compile {model_dir} -o {path} --rotate none", f"inspect --check {path}"):
        done = subprocess.run(["bash", "-c", f"{rqc} {command} {closed}"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert path.read_bytes() == engine.read_bytes()


@pytest.mark.parametrize("reader", ["| true", ">/dev/full"])
def test_an_error_that_nobody_reads_keeps_its_exit_code(tmp_path, reader):
    rqc = f"{sys.executable} -c 'import sys; from rqc.compiler.cli import main; sys.exit(main())'"
    command = f"(sleep 2; {rqc} inspect {tmp_path}/nothing.plan --json) {reader}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "hint: " in done.stderr
