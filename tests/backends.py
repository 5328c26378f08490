"""The backends under test.

Where torch sees no GPU, Triton's kernels run in its interpreter, on CPU tensors. Where it sees one
they are compiled, and the same tests take their tensors there and back. The CUDA kernels run in
their host twin, too.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import interpreter  # before fastgpt
import pytest
import torch
import twin
from torch.utils._pytree import tree_map_only

import fastgpt
from benchmarks.memory import peak_bytes
from fastgpt import dispatch
from fastgpt.backends import native
from fastgpt.ops import attention, cross_entropy

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

    def __init__(
        self,
        name: str,
        isa: str | None = None,
        device: str | None = None,
        twin: bool = False,
        hopper: bool = False,
    ):
        self.name, self.isa = name, isa
        self.twin = twin  # whether the native kernels are those of CUDA, on the host
        self.hopper = hopper  # and those of attention the ones for GPUs of 9.0a
        self.interpreted = name == "triton" and interpreter.ON
        on_gpu = name == "triton" and not interpreter.ON
        self.device = device or ("cuda" if on_gpu else "cpu")

    def __repr__(self) -> str:
        return f"{self.label}-{self.isa}" if self.isa else self.label

    @property
    def label(self) -> str:
        """Its name; the native kernels of a GPU are "cuda", and in their host twin "twin", or
        "twin-hopper".
        """
        if self.twin:
            return "twin-hopper" if self.hopper else "twin"
        return "cuda" if self.name == "native" and self.device == "cuda" else self.name

    @property
    def is_cuda(self) -> bool:
        """Whether its kernels are those of csrc/cuda."""
        return self.twin or self.label == "cuda"

    def columns(self, n: int) -> int:
        """So many of a head, or the next number of them that Hopper's kernels take."""
        return -(-n // 8) * 8 if self.hopper else n

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
        assert self.twin == (cross_entropy.LAUNCHERS["native"] is not NATIVE_LAUNCHER)
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


NATIVE_LAUNCHER = cross_entropy.LAUNCHERS["native"]
NATIVE_ATTENTION = attention.LAUNCHERS["native"]
EAGER = Backend("eager")
NATIVE = [Backend("native", isa) for isa in native.isas()] or [Backend("native")]
TRITON = Backend("triton")
TWIN = Backend("native", twin=True)  # of tests that are marked so
HOPPER = Backend("native", twin=True, hopper=True)  # of those of attention among them


def on_cuda() -> list[Backend]:
    """The native kernels of a GPU, where torch sees one and they were built. That they are there on
    a GPU is tested in tests/device.
    """
    backend = Backend("native", device="cuda")
    return [backend] if torch.cuda.is_available() and not backend.reason() else []


CUDA = on_cuda()


def limited_as_twin(item: pytest.Item) -> bool:
    """Whether it is a test of CUDA's kernels on a GPU that is kept where that of their twin is:
    one of another op than cross-entropy, since those take some types and options only.
    """
    values = getattr(getattr(item, "callspec", None), "params", {}).values()
    mine = any(isinstance(v, Backend) and v.label == "cuda" for v in values)
    return mine and not item.path.name.startswith("test_cross_entropy")


def activate(backend: Backend) -> Iterator[Backend]:
    """For a fixture: the backend, preferred while the test runs, on its instruction set."""
    reason = backend.reason()
    if reason and backend.name == "native":
        pytest.fail(f"the native extension is missing: {reason}")
    if reason:  # that it is on where it ought to be is tested in test_dispatch.py
        pytest.skip(reason)
    previous = native.isa()
    if backend.isa:
        native.extension.set_isa(backend.isa)
    if backend.twin:
        cross_entropy.LAUNCHERS["native"] = twin.launcher()
        attention.LAUNCHERS["native"] = twin.attention_launcher()
    if backend.hopper:
        torch.ops.fastgpt_twin_settings.hopper(True)
    try:
        with fastgpt.backend(backend.name):
            yield backend
    finally:
        cross_entropy.LAUNCHERS["native"] = NATIVE_LAUNCHER
        attention.LAUNCHERS["native"] = NATIVE_ATTENTION
        if backend.hopper:
            torch.ops.fastgpt_twin_settings.hopper(False)
        if backend.isa:
            native.extension.set_isa(previous)
