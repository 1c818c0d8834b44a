"""`python -m fusion_passes bench`: arguments, and what is done with the results."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fusion_passes import arch, benchmarking, hf_models
from fusion_passes.bench import cases, comparison, models, plots, results, runner, tables, verdicts
from fusion_passes.bench.contestants import known_baselines, parse_baselines
from fusion_passes.bench.progress import Progress
from fusion_passes.bench.results import Results, Row

DESCRIPTION = """\
Times the cases that the ops declare, or whole Hugging Face models with random weights, beside stock torch.compile.

Cases: GPU time is the median of CUDA-graph replays over rotated inputs that are cold in L2, with outputs of their own;
wall time is per call without a graph; all contestants take turns. With --warm one set of inputs is replayed. "fused"
is the plain PyTorch spelling compiled with this backend, "op" the bare op. Next to each time stands the relative error
(L2) against float64. The floor is the time that the bytes at the GPU's copy rate, or the FLOPs at its matrix rate,
would take.

Models: "fused" is the model compiled as it is with this backend, "bound" the same inside of fusion_passes.transformers.
bind, where it has linear attention. The first call compiles everything anew. The peak of memory includes the weights.
"""

EPILOG = """\
exit status: 0 all is well; 1 a result is wrong, or slower than stock or combo_kernels (by more than 2 % of GPU time or
5 % of wall time) where something was fused, or --compare found a regression; 2 bad usage, or no GPU to measure on.
"""

# A name for the progress line, and what measures the row.
Job = tuple[str, Callable[[], Row]]


class Unusable(Exception):
    """The arguments, or this machine, do not allow what was asked; the message says why and what would."""


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of `python -m fusion_passes`."""
    command = commands.add_parser(
        "bench",
        help="times beside stock torch.compile and others, on a GPU",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = command.add_argument_group("what is measured")
    what.add_argument("--op", nargs="+", default=[], metavar="NAME", help="ops; all, unless models are given")
    what.add_argument("--case", default="", metavar="A,B", help="only cases with one of these in their names")
    what.add_argument("--sizes", choices=("small", "all"), default="all", help="small: cases of 32 MiB and less")
    what.add_argument("--model", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(hf_models.NAMES)}")
    what.add_argument("--tokens", nargs="+", type=int, default=[2048], help="tokens of a model's input")
    what.add_argument("--batch", type=int, default=1, help="sequences of a model's input")
    what.add_argument("--layers", type=int, default=2, help="layers of a model")
    what.add_argument("--decode", action="store_true", help="of a model, the step of one token behind its input")
    what.add_argument(
        "--ways", metavar="A,B", help=f"how a model is made ours, of {', '.join(results.COMPILED)}; default: both"
    )
    what.add_argument("--limit", type=float, metavar="SECONDS", help="a contestant of a model that takes longer fails")
    what.add_argument(
        "--baselines",
        metavar="A,B",
        help="of stock, combo_kernels, max_autotune, eager and the peers that cases name, such as fla; default: all",
    )
    what.add_argument("--warm", action="store_true", help="replay one set of inputs, which stays in L2 where it fits")
    what.add_argument("--list", action="store_true", help="print the cases and models and stop; needs no GPU")
    out = command.add_argument_group("what comes out")
    out.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    out.add_argument("--table", action="store_true", help="print a Markdown table")
    out.add_argument("--plot", type=Path, metavar="DIR", help="write bars and a roofline as PNG; needs matplotlib")
    old = command.add_argument_group("results of earlier runs; need no GPU")
    old.add_argument("--from", dest="source", type=Path, metavar="FILE", help="read results in place of measuring")
    old.add_argument(
        "--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="name what became slower; exit 1 if anything did"
    )
    old.add_argument("--tolerance", type=float, default=0.05, help="share of a time that may be lost: %(default)s")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say; the exit status."""
    try:
        if args.list:
            return _list(args)
        if args.compare:
            return _compare(args)
        if args.plot:
            plots.require()
        found = results.read(args.source) if args.source else None
        jobs = _jobs(args) if found is None else []
    except (Unusable, ImportError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    problems: list[str] = []
    if found is None:
        found = _measure(jobs, args)
        problems = verdicts.failures(found.rows)
    _deliver(found, args)
    for problem in problems:
        print(f"bench: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _list(args: argparse.Namespace) -> int:
    for op, case in cases.select(args.op, args.case, args.sizes):
        beside = ", ".join([*(["stock spelling"] if case.plain is not None else []), *case.peers])
        print(f"{op:<18} {case.name:<32} {case.bytes / 1e6:9.2f} MB {case.flops / 1e9:9.3f} GFLOP  {beside}")
    if not args.op and not args.case:
        print(f"models: {', '.join(hf_models.NAMES)}")
    return 0


def _compare(args: argparse.Namespace) -> int:
    old, new = map(results.read, args.compare)
    found = comparison.compare(old, new, args.tolerance)
    print(found)
    return 1 if found.regressions else 0


def _jobs(args: argparse.Namespace) -> list[Job]:
    """What the arguments select, each with its name."""
    chosen = [] if args.model and not args.op else cases.select(args.op, args.case, args.sizes)
    for name in args.model:
        cases.require(name, hf_models.NAMES, "model")
    baselines = parse_baselines(args.baselines, known_baselines([case for _, case in chosen]))
    ways = parse_baselines(args.ways, results.COMPILED, "way")
    if args.model:
        models.require()
    device = _device()
    on = arch.of_device(device)
    jobs: list[Job] = []
    for op, case in chosen:
        measure = functools.partial(runner.measure, op, case, baselines, on, device, warm=args.warm)
        jobs.append((f"{op} {case.name}", measure))
    for name in args.model:
        for tokens in args.tokens:
            size = models.Size(tokens, args.batch, args.layers, args.decode)
            measure = functools.partial(models.measure, name, size, baselines, device, ways=ways, limit_s=args.limit)
            jobs.append((f"{name} {size}", measure))
    return jobs


def _device() -> torch.device:
    if not torch.cuda.is_available():
        raise Unusable(
            "no CUDA GPU on this machine, and there is nothing to time without one; "
            "--list, --compare OLD NEW and --from FILE work here"
        )
    return torch.device("cuda", torch.cuda.current_device())


def _measure(jobs: Sequence[Job], args: argparse.Namespace) -> Results:
    """Run the jobs; what is there so far is written after each, so that a run that is cut off leaves its rows."""
    environment = {**_environment(), "inputs": "warm" if args.warm else "cold"}
    progress, rows = Progress(len(jobs)), []
    found = results.taken_now((), environment)
    for name, job in jobs:
        with progress.measuring(name):
            rows.append(job())
        progress.finished(tables.summary(rows[-1]))
        found = dataclasses.replace(found, rows=tuple(rows))
        if args.json:
            found.write(args.json)
    return found


def _environment() -> dict[str, Any]:
    """The environment, with the copy rate that this GPU reaches now."""
    return {**benchmarking.environment(), "copy_rate_TBps": round(benchmarking.copy_rate() / 1e12, 2)}


def _deliver(found: Results, args: argparse.Namespace) -> None:
    """Write and print what was asked for."""
    if args.json:
        found.write(args.json)
    if args.table or not (args.json or args.plot):
        print(tables.markdown(found.rows))
    if args.plot:
        for path in plots.draw(found, args.plot):
            print(path, file=sys.stderr)
