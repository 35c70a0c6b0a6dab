"""Stages set up the process that they have to themselves; in the tests they share one with others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def own_numerics() -> Iterator[None]:
    """The number of threads, and denormal numbers, as they were."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
