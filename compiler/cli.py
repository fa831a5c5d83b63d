"""The command line: parsing only. Every command imports what it needs when it runs, so that a device needs no torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rqc.compiler.commands.build import build
from rqc.compiler.commands.export import export
from rqc.compiler.commands.finetune import finetune
from rqc.compiler.commands.rotate import rotate
from rqc.compiler.console import guarded, open_standard_streams, result_on_stdout, stream
from rqc.runtime import doctor as doctors
from rqc.runtime.errors import InputError, ParityError

app = typer.Typer(
    name="rqc",
    help="A Hugging Face model in, one engine.plan for a small device out.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.command()(finetune)
app.command()(rotate)
app.command()(build)
app.command()(export)

EnginePath = Annotated[Path, typer.Argument(metavar="ENGINE", help="An engine.plan.", show_default=False)]
ModelDir = Annotated[
    Path, typer.Argument(metavar="MODEL_DIR", help="A Hugging Face model directory.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
Threads = Annotated[int | None, typer.Option(help="Threads per operator; the physical cores by default.")]
BackendName = Annotated[str, typer.Option("--backend", help="auto onnxruntime tensorrt.")]


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point `rqc`: the exit code is 0 done, 1 a gate failed, 2 wrong usage or bad input."""
    open_standard_streams()
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    command = f"rqc {args[0]}" if args[0] in _names() else "rqc"
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):
            output.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character is no failure
    return guarded(lambda: app(args, prog_name="rqc", standalone_mode=False), as_json="--json" in args, command=command)


def _names() -> set[str]:
    return {str(info.name or getattr(info.callback, "__name__", "")) for info in app.registered_commands}


def _version(asked: bool) -> None:
    if asked:
        print(f"rqc {doctors.version('rqc')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A Hugging Face model in, one engine.plan for a small device out."""


@app.command("compile")
def compile_(
    context: typer.Context,
    model_dir: ModelDir,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="ENGINE", help="The engine to write.", show_default=False)
    ] = None,
    target: Annotated[str | None, typer.Option(help="onnx tensorrt-rtx tensorrt.  [default: onnx]")] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            help="fp32 fp16 w8a16 w8a8 w6a6 w4a16 w4a8 w4a4 w3a16 w2a16; for TensorRT also fp8a16 nvfp4a16.  "
            "[default: w4a8]"
        ),
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="16 32 64 128 256, -1 per channel.  [default: 32]")] = None,
    bits_budget: Annotated[
        float | None,
        typer.Option(
            metavar="BITS",
            help="With w4a16 w4a8 w4a4: the mean of all linears, each of 2 4 8 bits by how sensitive it is.",
        ),
    ] = None,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="Grids with or without zero points.  [symmetric]")
    ] = None,
    clip: Annotated[str | None, typer.Option(help="none or mse.  [default: mse]")] = None,
    method: Annotated[
        str | None, typer.Option(help="rtn, rounding to nearest; gptq, fitted to text; auto.  [default: rtn]")
    ] = None,
    compensate: Annotated[
        str | None,
        typer.Option(help="none; eora or loftq, a low-rank branch for rounding's error.  [default: none]"),
    ] = None,
    compensate_rank: Annotated[int | None, typer.Option(help="Rank of every branch.  [default: 32]")] = None,
    compensate_budget: Annotated[
        float | None,
        typer.Option(metavar="BITS", help="Bits of all branches for each weight: ranks where they take off most."),
    ] = None,
    sparsity: Annotated[str | None, typer.Option(help="none or 2:4.  [default: none]")] = None,
    prune: Annotated[
        str | None, typer.Option(help="With --sparsity: magnitude, or wanda, by what is read.  [default: wanda]")
    ] = None,
    activation_symmetric: Annotated[
        bool | None,
        typer.Option(
            "--activation-symmetric/--activation-asymmetric",
            help="Activations per token with or without zero points.  [symmetric]",
        ),
    ] = None,
    activation_clip: Annotated[
        str | None,
        typer.Option(
            metavar="RATIO|auto", help="Clip their range to this share, or search it on the text.  [default: 1.0]"
        ),
    ] = None,
    rotate: Annotated[
        str | None, typer.Option(help="auto, none, or a comma list of r1 r2 r3 r4.  [default: auto, or the adapter's]")
    ] = None,
    rotation_seed: Annotated[int | None, typer.Option(help="Seed of the signs.  [default: 0]")] = None,
    hadamard: Annotated[str | None, typer.Option(help="full or block.  [default: full]")] = None,
    rotation_file: Annotated[
        Path | None, typer.Option("--rotation", metavar="FILE", help="What `rqc rotate` has learned.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DIR",
            help="A PEFT directory to merge; it brings its basis and grid along. Repeated: their sum, or with names, "
            "one that `run --adapter NAME` switches on.",
        ),
    ] = None,
    merge: Annotated[str | None, typer.Option(help="auto fold zero-point branch.  [default: auto]")] = None,
    min_survival: Annotated[
        float | None,
        typer.Option(help="Fail where rounding leaves less of the adapter in a linear.  [default: 0.5]"),
    ] = None,
    kv_cache: Annotated[
        str | None, typer.Option(help="Keys and values in float int8 int4; target onnx.  [default: float]")
    ] = None,
    tied: Annotated[
        str | None, typer.Option(help="keep: one table for embedding and head; untie: two.  [default: keep]")
    ] = None,
    embedding_bits: Annotated[
        int | None, typer.Option(help="4 8 16 32.  [default: 8; the scheme's own type for fp32 and fp16]")
    ] = None,
    head_bits: Annotated[
        int | None, typer.Option(help="As --embedding-bits; tied and kept, one value for both.")
    ] = None,
    max_memory: Annotated[str | None, typer.Option(help="Such as 4GiB: stay under it or fail before starting.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text, or data as of finetune; a text ships with rqc.")
    ] = None,
    calibration_samples: Annotated[int | None, typer.Option(help="Windows of text.  [default: 64]")] = None,
    calibration_length: Annotated[int | None, typer.Option(help="Tokens of a window.  [default: 512]")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, or cuda: what calibration runs on.  [default: cpu]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Floats of a TensorRT target: fp16 bf16 fp32.  [default: fp16]")
    ] = None,
    sm: Annotated[
        str | None,
        typer.Option(
            help="Compute capabilities for tensorrt-rtx.  [default: 80,86,89,120; fp8a16 from 89, nvfp4a16 from 120 on]"
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(metavar="SHAPES", help="Of TensorRT: batch/prompt/context, min:opt:max or one number each."),
    ] = None,
    portable: Annotated[
        bool | None,
        typer.Option(
            "--portable/--no-portable", help="Write the ONNX part of a TensorRT engine now; `rqc build` on the device."
        ),
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="A TOML file of these options; flags override it.")] = None,
    verify_after: Annotated[bool, typer.Option("--verify", help="Run `rqc verify` afterwards.")] = False,
    verify_each: Annotated[bool, typer.Option(help="Run the graph around each pass; fail one that drifts.")] = False,
    dump_ir: Annotated[Path | None, typer.Option(help="Write the graph after each pass into this directory.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Plan and estimate only; write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Compile a model directory, and an adapter if there is one, into one engine.plan."""
    doctors.require_compile()
    from rqc.compiler.api import compile_engine
    from rqc.compiler.progress import Steps
    from rqc.compiler.recipe import Recipe
    from rqc.compiler.reports import compile_text, failed_gates

    # the other flags are the fields of a recipe, by name
    options = {name: value for name, value in context.params.items() if name in Recipe.__dataclass_fields__}
    options["adapter"] = adapter or None
    with result_on_stdout() as emit, Steps() as progress:
        value = compile_engine(
            model_dir,
            output,
            recipe=recipe,
            verify=verify_after,
            verify_each=verify_each,
            dump_ir=dump_ir,
            dry_run=dry_run,
            progress=progress,
            **options,
        ).to_json()
        emit(value, compile_text(value), as_json)
    if value["parity"] and not value["parity"]["passed"]:
        _fail_gates(failed_gates(value["parity"]), as_json)


@app.command()
def verify(
    engine: EnginePath,
    model_dir: ModelDir,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]DIR", help="The adapter that the engine was compiled with; repeatable."),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text, or data as of finetune; a text ships with rqc.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to compare.")] = 2048,
    window: Annotated[int, typer.Option(help="Tokens of one window, capped at the context.")] = 1024,
    gate: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A limit such as ppl_ratio=1.05; repeatable.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Compare an engine with PyTorch; exit 1 if a gate fails."""
    gates = dict(_gate(limit) for limit in gate or [])
    doctors.require_compile()
    from rqc.compiler.reports import failed_gates, parity_text
    from rqc.compiler.verify.engine import verify_engine

    with result_on_stdout() as emit:
        report = verify_engine(
            engine,
            model_dir,
            adapter=adapter,
            text=text,
            tokens=tokens,
            window=window,
            gates=gates,
            threads=threads,
        )
        value, idle = report.to_json(), [gate.name for gate in report.gates if not gate.counts]
        emit(value, parity_text(value, idle, report.notes), as_json)
    if not report.passed:
        _fail_gates(failed_gates(value, idle), as_json)


@app.command()
def run(
    engine: EnginePath,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The text; stdin without it.")] = None,
    chat: Annotated[bool, typer.Option(help="By the model's chat template; on a terminal without -p, a talk.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus; 1 is off.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Best k; 0 is off.")] = 0,
    seed: Annotated[int | None, typer.Option(help="For the same draw again.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; repeatable.")] = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="NAME", help="One that the engine can switch on; the model alone without.")
    ] = None,
    threads: Threads = None,
    backend: BackendName = "auto",
) -> None:
    """Generate; the continuation streams to stdout."""
    from rqc.runtime.engine import Engine

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    options |= {"top_p": top_p, "top_k": top_k, "stop": stop or None, "adapter": adapter}
    talk = prompt is None and sys.stdin.isatty()
    if talk and not chat:
        raise InputError("no prompt", hint="-p TEXT, text on stdin, or --chat for a talk")
    with Engine.load(engine, threads=threads, backend=backend) as loaded:
        if talk:
            _talk(loaded, options)
            return
        text = sys.stdin.read() if prompt is None else prompt
        stream(loaded.stream_chat([_says("user", text)], **options) if chat else loaded.stream(text, **options))


def _talk(engine: Any, options: dict[str, Any]) -> None:
    """Turns from the terminal until the end of input; the conversation grows until it fills the context."""
    messages: list[dict[str, str]] = []
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            messages.append(_says("user", line.rstrip("\n")))
            messages.append(_says("assistant", stream(engine.stream_chat(messages, **options))))


def _says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@app.command()
def inspect(
    engine: EnginePath,
    layers: Annotated[bool, typer.Option("--layers", help="One line for each weight.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Hash everything, the weights too.")] = False,
    context: Annotated[int | None, typer.Option(help="Tokens to tell the memory for; the longest by default.")] = None,
    as_json: Json = False,
) -> None:
    """What is inside an engine: scheme, rotation, sizes, memory."""
    from rqc.runtime.inspection import inspect_engine

    with result_on_stdout() as emit:
        found = inspect_engine(engine, check=check, context=context)
        emit(found.to_json(), found.to_text(layers=layers), as_json)


@app.command()
def bench(
    engine: EnginePath,
    prompt_tokens: Annotated[int | None, typer.Option(help="Tokens of the prompt.  [default: 128]")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens to generate.  [default: 64]")] = None,
    repeats: Annotated[int, typer.Option(help="Runs after one that warms up; medians count.")] = 3,
    threads: Threads = None,
    backend: BackendName = "auto",
    as_json: Json = False,
) -> None:
    """Load time, time to first token, prefill and decode speed, peak memory."""
    from rqc.runtime.bench import bench_engine

    with result_on_stdout() as emit:
        measured = bench_engine(
            engine,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
            threads=threads,
            backend=backend,
        )
        emit(measured, _bench_text(measured), as_json)


@app.command()
def extract(
    engine: EnginePath,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="A new directory.", show_default=False)],
    format: Annotated[
        str | None, typer.Option(help="trt: the raw TensorRT plans alone, and what each takes.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """The raw parts: graph.onnx with its weights, tokenizer; or the raw TensorRT plans."""
    from rqc.runtime.extract import extract as extract_parts

    with result_on_stdout() as emit:
        paths = [str(path) for path in extract_parts(engine, output, format)]
        emit({"directory": str(output), "files": paths}, "\n".join(paths), as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, instruction set, providers, what can be built and run here."""
    with result_on_stdout() as emit:
        report = doctors.diagnose()
        emit(report, doctors.to_text(report), as_json)


def _gate(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise InputError(f"--gate {text}", hint="--gate NAME=VALUE, such as ppl_ratio=1.05") from None


def _fail_gates(failed: Sequence[str], as_json: bool) -> None:
    """End with exit code 1; the report is already on stdout."""
    if as_json:
        raise typer.Exit(1)
    raise ParityError(f"gates failed: {', '.join(failed)}", hint="the table above has values and limits")


def _bench_text(measured: dict[str, float | int]) -> str:
    prompt, new = measured["prompt_tokens"], measured["new_tokens"]
    rows = [
        ("load", f"{measured['load_s']:.2f} s"),
        ("first token", f"{measured['ttft_s'] * 1e3:.1f} ms after {prompt} tokens"),
        ("prefill", f"{measured['prefill_tokens_per_s']:.1f} tokens/s"),
        ("decode", f"{measured['decode_tokens_per_s']:.1f} tokens/s over {new} tokens"),
        ("peak memory", f"{measured['peak_rss_bytes'] / 1e6:.0f} MB resident"),
        ("threads", f"{measured['threads']}"),
    ]
    return "\n".join(f"{name:<14}{value}" for name, value in rows)
