"""`redundant_copy` on a GPU: compiled code against eager, writes into inputs included, and the kernel of rotations."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fusion_passes
from fusion_passes import benchmarking
from fusion_passes.ops.rotate_pairs import rotate_pairs_
from tests.patterns.redundant_copy_spellings import CHAINS, arguments
from tests.patterns.test_redundant_copy_properties import COLUMN_RANGES, KINDS, Step, differ, inputs, program
from tests.patterns.test_redundant_copy_rotations import SPELLINGS as ROTATIONS
from tests.patterns.test_redundant_copy_rotations import inputs as rotated_inputs
from tests.support.redundant_copy_rows import ROWS, Dims, make
from tests.support.rotate_pairs import LAYOUTS, PAIRINGS, SHARED, close, exact, normal

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

NAME = "redundant_copy"
SIZES = {"small": Dims(tokens=5, heads=2, cache=64), "large": Dims(tokens=512, cache=8192)}


def copies(args: Sequence[Tensor]) -> list[Tensor]:
    return [a.detach().clone() for a in args]


def compiled(function: Callable[..., Any], args: list[Tensor], fused: bool = True) -> tuple[Any, str]:
    """What `function` gives on `args`, which it changes, and the code that was run."""
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    options = fusion_passes.options(fusions=NAME if fused else "none", always_profitable=True, strict=True)
    with torch.no_grad():
        result, (code,) = run_and_get_code(torch.compile(function, fullgraph=True, options=options), *args)
    return result, code


def tensors(result: Any, args: Sequence[Tensor]) -> list[Tensor]:
    return [t for t in (*torch.utils._pytree.tree_leaves(result), *args) if isinstance(t, Tensor)]


def check(function: Callable[..., Any], args: list[Tensor]) -> str:
    """Results and inputs have an error of twice eager's and one rounding at most; the code."""
    wide = [a.double() if a.is_floating_point() else a.clone() for a in args]
    theirs, ours = copies(args), copies(args)
    exact_values = tensors(function(*wide), wide)
    eager_values = tensors(function(*theirs), theirs)
    result, code = compiled(function, ours)
    for actual, eager, wanted in zip(tensors(result, ours), eager_values, exact_values, strict=True):
        if torch.equal(actual, eager):
            continue
        bound = 2 * benchmarking.relative_error(eager, wanted) + torch.finfo(actual.dtype).eps / 2
        assert benchmarking.relative_error(actual, wanted) <= bound
    return code


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("size", SIZES)
def test_table(name: str, size: str) -> None:
    row = ROWS[name]
    before = fusion_passes.report().counts[NAME]
    code = check(row.function, make(row.inputs, SIZES[size], device="cuda"))
    assert fusion_passes.report().counts[NAME] - before == row.sites
    body = code[code.index("def call(") :]
    if row.sites:
        assert body.count(".run(") == row.launches
    if name.startswith("R"):
        assert body.count("rotate_pairs_kernel") >= row.launches and "torch.ops.fusion_passes" not in body


@pytest.mark.parametrize("name", CHAINS)
def test_chains(name: str) -> None:
    args = arguments()
    if name != "accumulated":
        args[3] = torch.tensor([20, 3, 9, 5])  # Which of two writes to one row is the last is not defined on a GPU.
    check(CHAINS[name], [a.cuda() for a in args])


@pytest.mark.parametrize("name", ["neox", "interleaved", "interleaved_repeated", "by_neighbours", "different_halves"])
def test_rotations(name: str) -> None:
    before = fusion_passes.report().counts[NAME]
    check(ROTATIONS[name], [a.cuda() for a in rotated_inputs()])
    assert fusion_passes.report().counts[NAME] == before + 1


@pytest.mark.parametrize("name", ["R2 rope of an input", "R7 rope of two inputs"])
def test_a_symbolic_number_of_tokens(name: str) -> None:
    """One compile for all, and the kernel writes into the input and not into a copy of it."""
    row = ROWS[name]
    torch._dynamo.reset()
    options = fusion_passes.options(fusions=NAME, strict=True)
    function = torch.compile(row.function, fullgraph=True, options=options)
    for tokens in (5, 64, 301):
        ours = make(row.inputs, Dims(tokens=tokens), device="cuda", dtype=torch.float32)
        theirs = copies(ours)
        for value in ours:
            torch._dynamo.mark_dynamic(value, 0)
        with torch.no_grad():
            function(*ours)
        row.function(*theirs)
        for actual, wanted in zip(ours, theirs, strict=True):
            torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("seed", range(25))
def test_random_programs(seed: int) -> None:
    """Programs of reads and writes, with the order in which Inductor's kernels for the GPU do them."""
    draw = random.Random(seed)

    def region() -> tuple[int, int, int, tuple[int, int]]:
        return draw.randint(0, 11), draw.randint(1, 12), draw.choice([1, 1, 1, 2, 3]), draw.choice(COLUMN_RANGES)

    kinds = draw.sample(KINDS, 4)
    steps: list[Step] = [
        (draw.choice(kinds), draw.randint(0, 2), draw.randint(0, 2), region(), region()) for _ in range(5)
    ]

    def outcome(run: Callable[[list[Tensor]], Any]) -> list[Tensor] | str:
        args = [a.cuda() for a in inputs()]
        try:
            return [t.cpu() for t in tensors(run(args), args)]
        except RuntimeError as error:
            return type(error).__name__

    function = program(steps)
    expected = outcome(lambda args: function(*args))
    ours = outcome(lambda args: compiled(function, args)[0])
    assert not isinstance(expected, str)
    if isinstance(ours, str) or differ(ours, expected):
        # Stock is wrong in just the same way, so that it is not of our making.
        stock = outcome(lambda args: compiled(function, args, fused=False)[0])
        if isinstance(ours, str) or isinstance(stock, str):
            assert ours == stock, steps
        else:
            assert not differ(ours, stock), steps


# --- the kernel -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernel(layout: str, pairing: str, shared: str, dtype: torch.dtype) -> None:
    x = LAYOUTS[layout](normal(2, 3, 5, 100, dtype=dtype, device="cuda"))
    before = x.clone()
    for channels in (6, 64, 96):
        cos, sin = (normal(*SHARED[shared], channels // 2, device="cuda", seed=seed) for seed in (1, 2))
        wanted = exact(PAIRINGS[pairing](x, channels), cos, sin)
        rotate_pairs_(PAIRINGS[pairing](x, channels), cos, sin)
        close(PAIRINGS[pairing](x, channels), wanted)
    assert torch.equal(x[..., 96:], before[..., 96:])


def test_offsets_beyond_two_billion_elements() -> None:
    x = torch.zeros(1, 1, 70_000, 32_768, dtype=torch.bfloat16, device="cuda")
    x[..., -1, :64] = 1
    cos, sin = (torch.full((1, 1, 1, 1, 32), value, device="cuda") for value in (0.0, 1.0))
    rotate_pairs_(PAIRINGS["halves"](x, 64), cos, sin)
    assert x[..., -1, :32].eq(-1).all() and x[..., -1, 32:64].eq(1).all() and x[..., :-1, :].count_nonzero() == 0


def test_cuda_graph() -> None:
    x, cos, sin = (
        normal(1, 64, 4, 128, device="cuda"),
        *(normal(1, 64, 1, 1, 32, device="cuda", seed=s) for s in (1, 2)),
    )
    start = x.clone()
    rotate_pairs_(PAIRINGS["halves"](x, 64), cos, sin)
    once = x.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rotate_pairs_(PAIRINGS["halves"](x, 64), cos, sin)
    x.copy_(start)
    graph.replay()
    assert torch.equal(x, once)
