"""Fixtures that every test of the kernels uses: the backend under test, and poisoned memory."""

import gc
from collections.abc import Iterator

import pytest
import torch
from backends import (  # before fastgpt
    CUDA,
    EAGER,
    HOPPER,
    NATIVE,
    TRITON,
    TWIN,
    Backend,
    activate,
    limited_as_twin,
)


@pytest.fixture(params=[EAGER, *NATIVE, TWIN, HOPPER, TRITON, *CUDA], ids=repr)
def backend(request) -> Iterator[Backend]:
    """Every backend, the native one once for each instruction set of this processor."""
    yield from activate(request.param)


@pytest.fixture
def eager() -> Iterator[Backend]:
    """The reference, in torch operations."""
    yield from activate(EAGER)


@pytest.fixture(params=[EAGER, NATIVE[-1], TWIN, HOPPER, TRITON, *CUDA], ids=lambda b: b.label)
def one_isa(request) -> Iterator[Backend]:
    """Every backend, on its best instruction set: where the kernel's arithmetic does not matter."""
    yield from activate(request.param)


@pytest.fixture(params=[*NATIVE, TWIN, HOPPER, TRITON, *CUDA], ids=repr)
def kernel(request) -> Iterator[Backend]:
    """Every fused backend, the native one once for each instruction set of this processor."""
    yield from activate(request.param)


@pytest.fixture(params=[NATIVE[-1], TWIN, HOPPER, TRITON, *CUDA], ids=lambda b: b.label)
def best_kernel(request) -> Iterator[Backend]:
    """Every fused backend, on its best instruction set."""
    yield from activate(request.param)


@pytest.fixture(params=[*NATIVE, TWIN, HOPPER], ids=repr)
def native_backend(request) -> Iterator[Backend]:
    """The native backend, once for each instruction set of this processor."""
    yield from activate(request.param)


@pytest.fixture(params=[EAGER, *NATIVE], ids=repr)
def linear_backend(request) -> Iterator[Backend]:
    """Every backend that has linear cross-entropy, the native one once for each instruction set."""
    yield from activate(request.param)


@pytest.fixture(params=[EAGER, NATIVE[-1]], ids=lambda b: b.name)
def linear_one_isa(request) -> Iterator[Backend]:
    """Every backend that has linear cross-entropy, on its best instruction set."""
    yield from activate(request.param)


@pytest.fixture
def best_native() -> Iterator[Backend]:
    """The native backend on its best instruction set."""
    yield from activate(NATIVE[-1])


def pytest_collection(session):
    """Let the garbage collector pass over the tests, which stay, and are tens of thousands."""
    gc.disable()


def pytest_collection_finish(session):
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(config, items):
    """Keep of the marked tests under the interpreter what their `interpreted` markers name; of
    those in the twin what a `cuda_on_host` marker names, the module's of those whose kernels it
    has, but none of cross-entropy with Hopper's kernels, as it has none; of CUDA's kernels on a
    GPU, all tests of cross-entropy, and of the others what runs in the twin.
    """
    kept, dropped = [], []
    for item in items:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        backends = [v for v in values.values() if isinstance(v, Backend)]
        of_twin = any(v.twin for v in backends) or limited_as_twin(item)
        markers = list(item.iter_markers("cuda_on_host" if of_twin else "interpreted"))
        if of_twin:  # a test's own go before its module's
            markers = [marker for marker in markers if marker.kwargs] or markers
        mine = of_twin or (markers and any(v.interpreted for v in backends))
        wanted = any(
            all(values[name] in allowed for name, allowed in marker.kwargs.items())
            for marker in markers
        )
        if any(v.hopper for v in backends) and item.path.name.startswith("test_cross_entropy"):
            wanted = False
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
