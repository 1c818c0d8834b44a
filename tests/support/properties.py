"""How the tests that draw spellings from a grammar run hypothesis."""

from __future__ import annotations

from hypothesis import HealthCheck, settings


def profile(examples: int) -> settings:
    """So many examples, the same in every run, however long one takes."""
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        print_blob=False,
    )  # fmt: skip
