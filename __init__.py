"""rqc: a Hugging Face model (and a LoRA adapter) in, one engine.plan for a small device out.

Names are resolved on first use (PEP 562): `rqc.load` on a device imports neither torch nor the compiler.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rqc.runtime.engine import Engine
    from rqc.runtime.errors import RqcError

    load = Engine.load
    __version__: str

__all__ = ["Engine", "RqcError", "__version__", "build", "compile", "export", "finetune", "load", "rotate", "verify"]

_HOMES = {
    "Engine": ("rqc.runtime.engine", "Engine"),
    "RqcError": ("rqc.runtime.errors", "RqcError"),
    "build": ("rqc.runtime.add_plan", "add_plan"),
    "compile": ("rqc.compiler.api", "compile_engine"),
    "export": ("rqc.compiler.export.run", "export"),
    "finetune": ("rqc.compiler.finetune.run", "finetune"),
    "load": ("rqc.runtime.engine", "Engine.load"),
    "rotate": ("rqc.compiler.rotate.run", "rotate"),
    "verify": ("rqc.compiler.verify.engine", "verify_engine"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module 'rqc' has no attribute {name!r}")
    module, path = _HOMES[name]
    if module.startswith("rqc.compiler") and not _can_compile():
        return _refuse
    value: Any = import_module(module)
    for part in path.split("."):
        value = getattr(value, part)
    globals()[name] = value
    return value


def _can_compile() -> bool:
    from rqc.runtime.doctor import can_compile

    return can_compile()


def _refuse(*_arguments: Any, **_options: Any) -> None:
    """What the compiler's names are where its packages are not installed. Raises ResourceError."""
    from rqc.runtime.doctor import require_compile

    require_compile()


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """The installed version; a checkout that was never installed says so."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("rqc")
    except PackageNotFoundError:
        return "0+uninstalled"
