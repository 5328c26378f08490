"""The tests that need a GPU; without one they are deselected, and the summary says so.

With FASTGPT_TEST_DEVICE=cpu those that need no more than its kernels run on the CPU, in Triton's
interpreter: a rehearsal.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from device_oracle import BACKENDS, REHEARSED

import fastgpt
from fastgpt import dispatch

HERE = Path(__file__).parent
RUN = torch.cuda.is_available() or REHEARSED

# Deterministic mode, in which memory is poisoned, wants it for the references' matrix products.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

_deselected = 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    global _deselected
    if RUN or config.option.collectonly:
        return
    mine = [item for item in items if HERE in item.path.parents]
    _deselected = len(mine)
    config.hook.pytest_deselected(items=mine)
    items[:] = [item for item in items if HERE not in item.path.parents]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _deselected:
        terminalreporter.write_line(
            f"{_deselected} device tests were left out: torch sees no GPU (`make gpu` runs them)"
        )


@pytest.fixture
def device() -> Iterator[str]:
    """Where the kernels run: the GPU; in a rehearsal the CPU."""
    if not REHEARSED:
        yield "cuda"
        return
    with fastgpt.backend("triton"):
        yield "cpu"


@pytest.fixture
def gpu() -> str:
    """The GPU, of a test that makes no sense without."""
    if REHEARSED:
        pytest.skip("needs a GPU, and this is a rehearsal on the CPU")
    return "cuda"


def _preferring(backend: str) -> Iterator[str]:
    """That it is off is no reason to skip: these tests are run to see that it works."""
    cell = dispatch.lookup("cross_entropy", backend, "cpu" if REHEARSED else "cuda")
    if cell.reason:
        pytest.fail(f"cross_entropy is off on {backend}: {cell.reason}")
    with fastgpt.backend(backend):
        yield backend


@pytest.fixture(params=BACKENDS)
def kernels(request) -> Iterator[str]:
    """The backend whose cross-entropy kernels run: each that has some for this device."""
    yield from _preferring(request.param)


@pytest.fixture
def native(gpu) -> Iterator[str]:
    """CUDA's own kernels, of a test of what Triton's do not do."""
    if "native" not in BACKENDS:
        pytest.skip("there are no native kernels for AMD's GPUs")
    yield from _preferring("native")


@pytest.fixture
def free_memory(device):
    """Skips, with the reason, what the GPU has no memory for."""

    def check(gigabytes: float) -> None:
        if device == "cpu":
            return
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / 1e9
        if free < gigabytes:
            pytest.skip(f"needs {gigabytes:.0f} GB of free GPU memory, {free:.0f} are there")

    yield check
    if device != "cpu":
        torch.cuda.empty_cache()
