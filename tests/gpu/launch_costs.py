"""What a launch costs the host: wall time per call of compiled functions that hold one op, by way of launching.

    PYTHONPATH=. python tests/gpu/launch_costs.py             # a few short cases: the host is what takes time
    PYTHONPATH=. python tests/gpu/launch_costs.py --rounds 5

"inductor" launches as Inductor launches the kernels of users, "short" by the function that is written after the first
call (`fusion_passes.launching`); each as an ordinary launch and as a programmatic dependent one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from unittest import mock

import torch
from torch._inductor import config as inductor

from fusion_passes import arch, benchmarking, launching
from fusion_passes.bench.contestants import contestants
from fusion_passes.benchmarking import Call, Case
from fusion_passes.ops import _gate_cumsum_cases, _mla_kv_pack_cases, qkv_split

DEVICE = torch.device("cuda")
WAYS = {
    "inductor": (False, False),
    "inductor, dependent": (False, True),
    "short": (True, False),
    "short, dependent": (True, True),
}


def cases() -> list[Case]:
    """Short ones: the host takes longer than the GPU."""
    wanted = ("16+16+32 heads x128 T=128 contiguous", "128 heads x 8 tokens cast", "KDA 32x128 T=128 bnchk",
              "GDN 32x1 T=512 bhnck")  # fmt: skip
    known = (*qkv_split.cases(), *_mla_kv_pack_cases.cases(), *_gate_cumsum_cases.cases())
    return [case for case in known if case.name in wanted]


@contextlib.contextmanager
def launched(short: bool, dependent: bool) -> Iterator[None]:
    """Graphs that are compiled in the block launch so."""
    gpu = arch.of_device(DEVICE)
    chosen = dataclasses.replace(gpu, pdl=gpu.pdl and dependent)
    straight = launching.straight if short else lambda kernel: kernel
    # What was compiled another way is not to be found.
    with inductor.patch(force_disable_caches=True), mock.patch.object(launching, "straight", straight):
        with mock.patch.object(arch, "of_device", lambda device: chosen):
            yield


def compiled(case: Case, args: Sequence[object]) -> dict[str, Call]:
    """Stock, combo_kernels and ours in all ways, compiled for these arguments."""
    found = {name: contestants(case, [name], DEVICE)[0][name] for name in ("stock", "combo_kernels")}
    for name, way in WAYS.items():
        found[name] = contestants(case, [], DEVICE)[0]["fused"]
        with launched(*way):
            found[name](*args)
    for call in found.values():
        call(*args)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often each case is measured")
    rounds = parser.parse_args().rounds
    with torch.no_grad():
        for case in cases():
            sets = benchmarking.input_sets(case, DEVICE)
            calls = compiled(case, sets[0])
            for _ in range(rounds):
                walls = benchmarking.wall_us_together(calls, sets)
                print(case.name, ", ".join(f"{name} {wall:.1f}" for name, wall in walls.items()), flush=True)


if __name__ == "__main__":
    main()
