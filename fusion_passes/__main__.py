"""Command line: `python -m fusion_passes list | env | explain | demo | bench`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import fusion_passes
from fusion_passes import arch, config, demo, registry
from fusion_passes.bench import cli as bench
from fusion_passes.settings import snapshot


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    args = _parser().parse_args(argv)
    return args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fusion_passes", description=fusion_passes.__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("list", help="the fusions, and which of them the current settings select")
    command.set_defaults(run=_list)

    command = commands.add_parser("env", help="versions, GPU and settings, for bug reports")
    command.set_defaults(run=_env)

    command = commands.add_parser("explain", help="what would be fused in a model, without a GPU")
    command.add_argument(
        "target",
        help=f"one of {', '.join(demo.model_names())}, or FILE.py:FUNCTION, where FUNCTION() returns a callable and "
        "the tuple of its arguments",
    )
    _model_arguments(command)
    command.add_argument("--fusions", help="as the setting of that name, such as default,-gate_cumsum")
    command.add_argument("--arch", help=f"the GPU to assume where there is none: {', '.join(arch.TABLE)}")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.add_argument("--html", metavar="FILE", help="also write the report as an HTML page")
    command.set_defaults(run=_explain)

    command = commands.add_parser("demo", help="compile a small Hugging Face model and compare it with eager")
    command.add_argument("--model", default="kimi_linear", choices=demo.model_names())
    _model_arguments(command)
    command.set_defaults(run=_demo)

    bench.add_parser(commands)
    return parser


def _model_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dtype", choices=demo.DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    command.add_argument("--layers", type=int, default=2)
    command.add_argument("--seq", type=int, default=200, help="number of tokens")
    command.add_argument("--batch", type=int, default=1)
    command.add_argument("--dynamic", action="store_true", help="make the number of tokens symbolic")


def _list(args: argparse.Namespace) -> int:
    settings = snapshot()
    selected = {fusion.name for fusion in registry.select(settings.fusions)}
    for fusion in registry.known().values():
        print(f"{'on ' if fusion.name in selected else 'off'}  {fusion.name:<18} {fusion.doc}")
    for name, error in registry.broken().items():
        print(f"--   {name:<18} cannot be loaded: {error}")
    return 0


def _env(args: argparse.Namespace) -> int:
    settings = snapshot()
    print(f"fusion_passes  {fusion_passes.__version__}")
    print(f"python         {platform.python_version()} on {platform.platform()}")
    print(f"torch          {torch.__version__}")
    print(f"triton         {_version('triton')}")
    print(f"transformers   {_version('transformers')}")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        print(f"GPU            {properties.name}, {properties.multi_processor_count} multiprocessors")
    else:
        print(f"GPU            none; explain assumes {arch.by_name(settings.arch).gpu} ({settings.arch})")
    for field in dataclasses.fields(settings):
        entry = config._config[field.name]  # type: ignore[attr-defined]
        print(f"{field.name:<20} {getattr(settings, field.name)!r:<12} default {entry.default!r}")
    return 0


def _explain(args: argparse.Namespace) -> int:
    own = {name: getattr(args, name) for name in ("fusions", "arch") if getattr(args, name) is not None}
    settings = snapshot(own)
    try:
        arch.by_name(settings.arch)
        registry.select(settings.fusions)
    except ValueError as error:
        raise SystemExit(f"explain: {error}") from None
    f, positional, keyword = _target(args)
    if args.dynamic:
        f = torch.compile(f, dynamic=True)
    with config.patch(**own), torch.no_grad():
        report = fusion_passes.explain(f, *positional, **keyword)
    if args.html:
        report.to_html(args.html)
    if args.json:
        print(report.to_json())
    else:
        report.show()
    return 0


def _target(args: argparse.Namespace) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    if args.target in demo.model_names():
        model, inputs = _built(args.target, args)
        return model, (), inputs
    path, separator, name = args.target.rpartition(":")
    if not separator or not Path(path).is_file():
        known = ", ".join(demo.model_names())
        raise SystemExit(f"explain: {args.target!r} is neither one of {known} nor an existing FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(path).parent))
    spec.loader.exec_module(module)
    if not hasattr(module, name):
        raise SystemExit(f"explain: {path} has no function {name!r}")
    f, positional = getattr(module, name)()
    return f, tuple(positional), {}


def _demo(args: argparse.Namespace) -> int:
    model, inputs = _built(args.model, args)
    return demo.run(args.model, model, inputs, dynamic=args.dynamic)


def _built(name: str, args: argparse.Namespace) -> tuple[torch.nn.Module, dict[str, Any]]:
    try:
        return demo.build(name, dtype=args.dtype, layers=args.layers, seq=args.seq, batch=args.batch)
    except (ImportError, ValueError) as error:
        raise SystemExit(f"{name} cannot be built: {error}") from None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
