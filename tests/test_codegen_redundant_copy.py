"""The CUDA code of the table's rows, at their real sizes: kernels and bytes are what is left to do, and no more."""

from __future__ import annotations

import pytest
import torch

from tests.support import fake_cuda
from tests.support.redundant_copy import generate
from tests.support.redundant_copy_rows import ROWS, Dims, make

DIMS = Dims()


@pytest.fixture(autouse=True)
def _supported() -> None:
    fake_cuda.require()


@pytest.mark.parametrize("name", ROWS)
def test_bytes_and_kernels(name: str) -> None:
    row = ROWS[name]
    with torch._subclasses.FakeTensorMode():
        args = make(row.inputs, DIMS)
    stock = generate(row.function, args, fused=False)
    ours = generate(row.function, args, fused=True)
    assert ours.sites == row.sites
    if row.extra(DIMS):
        assert ours.bytes == row.moved(DIMS) and len(ours.launches) == row.launches, (ours.bytes, ours.launches)
        assert stock.bytes - ours.bytes >= row.extra(DIMS), (stock.bytes, ours.bytes)
        assert ours.allocated <= stock.allocated
    else:
        # Nothing to be won: the same code.
        assert (ours.bytes, ours.launches) == (stock.bytes, stock.launches)
    if name.startswith("R"):
        # One launch each, on the memory as it is: the matrix product is all that is in a buffer.
        assert all(launch.startswith("rotate_pairs_kernel") for launch in ours.launches)
        assert "torch.ops.fusion_passes" not in ours.wrapper
        assert ours.allocated == (DIMS.query if "w" in row.inputs else 0)
