"""The command line: parsing only. Every command imports what it needs when it runs, so that a device needs no torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rqc.compiler.commands.build import build
from rqc.compiler.commands.compile import compile_
from rqc.compiler.commands.export import export
from rqc.compiler.commands.finetune import finetune
from rqc.compiler.commands.parameters import BackendName, EnginePath, Json, Threads
from rqc.compiler.commands.rotate import rotate
from rqc.compiler.commands.verify import verify
from rqc.compiler.console import guarded, open_standard_streams, result_on_stdout, stream
from rqc.runtime import doctor as doctors
from rqc.runtime.errors import InputError

app = typer.Typer(
    name="rqc",
    help="A Hugging Face model in, one engine.plan for a small device out.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

app.command("compile")(compile_)
app.command()(verify)
app.command()(finetune)
app.command()(rotate)
app.command()(build)
app.command()(export)


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
