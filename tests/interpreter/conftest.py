"""Kernels on Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/interpreter`.

Triton decides between compiler and interpreter when a function is defined, its own library included, so the variable
has to be set before anything imports triton; without it these tests are skipped.
"""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from fusion_passes.ops._gate_cumsum_kernel import gate_cumsum_kernel

    if type(gate_cumsum_kernel).__name__ != "InterpretedFunction":
        skip = pytest.mark.skip(reason="needs TRITON_INTERPRET=1 pytest tests/interpreter")
        for item in items:
            if "interpreter" in item.path.parts:
                item.add_marker(skip)
    else:
        from tests.support.interpreter import correct_rounding

        correct_rounding()
