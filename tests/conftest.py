"""Fixtures that every test of the kernels uses: the backend under test, and poisoned memory."""

from collections.abc import Iterator

import pytest
import torch

import fastgpt
from fastgpt.backends import native


class Backend:
    """A backend under test. Its functions assert that this backend is what runs the call."""

    def __init__(self, name: str, isa: str | None = None):
        self.name, self.isa = name, isa

    def __repr__(self) -> str:
        return f"{self.name}-{self.isa}" if self.isa else self.name

    def cross_entropy(self, *args, **kwargs):
        return self._run(fastgpt.cross_entropy, *args, **kwargs)

    def attention(self, *args, **kwargs):
        return self._run(fastgpt.scaled_dot_product_attention, *args, **kwargs)

    def _run(self, function, *args, **kwargs):
        explanation = fastgpt.explain(function, *args, **kwargs)
        assert explanation.backend == self.name, str(explanation)
        if self.isa:
            assert native.isa() == self.isa
        return function(*args, **kwargs)


def _native_backends() -> list[Backend]:
    """One for each instruction set; a single one that fails where the extension is missing."""
    return [Backend("native", isa) for isa in native.isas()] or [Backend("native")]


def _activate(backend: Backend) -> Iterator[Backend]:
    if backend.name == "native" and not native.isas():
        pytest.fail(f"the native extension is missing: {native._reason}")
    previous = native.isa()
    if backend.isa:
        native.extension.set_isa(backend.isa)
    try:
        with fastgpt.backend(backend.name):
            yield backend
    finally:
        if backend.isa:
            native.extension.set_isa(previous)


@pytest.fixture(params=[Backend("eager"), *_native_backends()], ids=repr)
def backend(request) -> Iterator[Backend]:
    """Every backend, the native one once for each instruction set of this processor."""
    yield from _activate(request.param)


@pytest.fixture(params=_native_backends(), ids=repr)
def native_backend(request) -> Iterator[Backend]:
    """The native backend, once for each instruction set of this processor."""
    yield from _activate(request.param)


@pytest.fixture(params=[Backend("eager"), _native_backends()[-1]], ids=lambda b: b.name)
def one_isa(request) -> Iterator[Backend]:
    """Every backend, on its best instruction set: where the kernel's arithmetic does not matter."""
    yield from _activate(request.param)


@pytest.fixture
def best_native() -> Iterator[Backend]:
    """The native backend on its best instruction set."""
    yield from _activate(_native_backends()[-1])


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill fresh tensors with NaN (integers with their maximum): a kernel that leaves an element
    unwritten, or reads one it did not write, shows.

    torch does so in deterministic mode, in `empty` and `new_empty`, the ones called from C++ too.
    """
    filled = torch.utils.deterministic.fill_uninitialized_memory
    mode = torch.get_deterministic_debug_mode()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts torch's number of threads back after the test."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.fixture
def compiled():
    """torch.compile with a backend that traces and differentiates, and generates no code."""
    torch._dynamo.reset()
    yield lambda f, **kw: torch.compile(f, fullgraph=True, backend="aot_eager", **kw)
    torch._dynamo.reset()
