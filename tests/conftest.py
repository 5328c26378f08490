"""Fixtures that every test of the kernels uses: the backend under test, and poisoned memory.

Where torch sees no GPU, Triton's kernels run in its interpreter, on CPU tensors. Where it sees one
they are compiled, and the same tests take their tensors there and back.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import interpreter  # before fastgpt
import pytest
import torch
from torch.utils._pytree import tree_map_only

import fastgpt
from benchmarks.memory import peak_bytes
from fastgpt import dispatch
from fastgpt.backends import native

interpreter.load_kernels()
if not interpreter.ON:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic products


class _Place(torch.autograd.Function):
    """A tensor on another device with the strides and the alignment that it has here."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, device: str) -> torch.Tensor:
        end = x.storage_offset() + 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride()))  # noqa: B905
        storage = x.as_strided((end,), (1,), 0).to(device)
        return storage.as_strided(x.shape, x.stride(), x.storage_offset())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.cpu(), None


class Backend:
    """A backend under test. Its functions assert that this backend is what runs the call."""

    def __init__(self, name: str, isa: str | None = None):
        self.name, self.isa = name, isa
        self.interpreted = name == "triton" and interpreter.ON
        self.device = "cuda" if name == "triton" and not interpreter.ON else "cpu"

    def __repr__(self) -> str:
        return f"{self.name}-{self.isa}" if self.isa else self.name

    def reason(self) -> str:
        """Why it can't run here; empty where it can."""
        return dispatch.lookup("cross_entropy", self.name, self.device).reason

    def cross_entropy(self, *args, **kwargs):
        return self._run(fastgpt.cross_entropy, *args, **kwargs)

    def linear_cross_entropy(self, *args, **kwargs):
        return self._run(fastgpt.linear_cross_entropy, *args, **kwargs)

    def attention(self, *args, **kwargs):
        return self._run(fastgpt.scaled_dot_product_attention, *args, **kwargs)

    def _run(self, function, *args, **kwargs):
        args, kwargs = self.placed((args, kwargs))
        explanation = fastgpt.explain(function, *args, **kwargs)
        assert explanation.backend == self.name, str(explanation)
        if self.isa:
            assert native.isa() == self.isa
        return self.returned(function(*args, **kwargs))

    def placed(self, values: Any) -> Any:
        """A tree of tensors, on the device of this backend."""
        return tree_map_only(torch.Tensor, self._place, values) if self.device != "cpu" else values

    def _place(self, x: torch.Tensor) -> torch.Tensor:
        transformed = torch._C._functorch.is_functorch_wrapped_tensor(x)
        if x.is_contiguous() or transformed or x.device.type != "cpu":
            return x.to(self.device)
        return _Place.apply(x, self.device)

    def returned(self, values: Any) -> Any:
        """A tree of tensors, on the CPU."""
        if self.device == "cpu":
            return values
        return tree_map_only(torch.Tensor, torch.Tensor.cpu, values)

    def on_device(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of tensors on the CPU that runs on this backend's device. It may go to any
        backend there, as calls inside transforms do.
        """

        def run(*args, **kwargs):
            args, kwargs = self.placed((args, kwargs))
            return self.returned(function(*args, **kwargs))

        return run if self.device != "cpu" else function

    def peak_bytes(self, function: Callable[[], Any]) -> int:
        """The most memory of its device that a call held at once, with its result."""
        if self.device == "cpu":
            return peak_bytes(function)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = function()
        peak = torch.cuda.max_memory_allocated() - before
        del kept
        return peak


EAGER = Backend("eager")
NATIVE = [Backend("native", isa) for isa in native.isas()] or [Backend("native")]
TRITON = Backend("triton")


def _activate(backend: Backend) -> Iterator[Backend]:
    reason = backend.reason()
    if reason and backend.name == "native":
        pytest.fail(f"the native extension is missing: {reason}")
    if reason:  # that it is on where it ought to be is tested in test_dispatch.py
        pytest.skip(reason)
    previous = native.isa()
    if backend.isa:
        native.extension.set_isa(backend.isa)
    try:
        with fastgpt.backend(backend.name):
            yield backend
    finally:
        if backend.isa:
            native.extension.set_isa(previous)


@pytest.fixture(params=[EAGER, *NATIVE, TRITON], ids=repr)
def backend(request) -> Iterator[Backend]:
    """Every backend, the native one once for each instruction set of this processor."""
    yield from _activate(request.param)


@pytest.fixture
def eager() -> Iterator[Backend]:
    """The reference, in torch operations."""
    yield from _activate(EAGER)


@pytest.fixture(params=[EAGER, NATIVE[-1], TRITON], ids=lambda b: b.name)
def one_isa(request) -> Iterator[Backend]:
    """Every backend, on its best instruction set: where the kernel's arithmetic does not matter."""
    yield from _activate(request.param)


@pytest.fixture(params=[*NATIVE, TRITON], ids=repr)
def kernel(request) -> Iterator[Backend]:
    """Every fused backend, the native one once for each instruction set of this processor."""
    yield from _activate(request.param)


@pytest.fixture(params=[NATIVE[-1], TRITON], ids=lambda b: b.name)
def best_kernel(request) -> Iterator[Backend]:
    """Every fused backend, on its best instruction set."""
    yield from _activate(request.param)


@pytest.fixture(params=NATIVE, ids=repr)
def native_backend(request) -> Iterator[Backend]:
    """The native backend, once for each instruction set of this processor."""
    yield from _activate(request.param)


@pytest.fixture(params=[EAGER, *NATIVE], ids=repr)
def linear_backend(request) -> Iterator[Backend]:
    """Every backend that has linear cross-entropy, the native one once for each instruction set."""
    yield from _activate(request.param)


@pytest.fixture(params=[EAGER, NATIVE[-1]], ids=lambda b: b.name)
def linear_one_isa(request) -> Iterator[Backend]:
    """Every backend that has linear cross-entropy, on its best instruction set."""
    yield from _activate(request.param)


@pytest.fixture
def best_native() -> Iterator[Backend]:
    """The native backend on its best instruction set."""
    yield from _activate(NATIVE[-1])


def pytest_collection_modifyitems(config, items):
    """Under the interpreter, keep of the marked tests what their `interpreted` markers name."""
    kept, dropped = [], []
    for item in items:
        markers = list(item.iter_markers("interpreted"))
        values = item.callspec.params if markers else {}
        mine = any(isinstance(v, Backend) and v.interpreted for v in values.values())
        wanted = any(
            all(values[name] in allowed for name, allowed in marker.kwargs.items())
            for marker in markers
        )
        (kept if wanted or not mine else dropped).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


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
