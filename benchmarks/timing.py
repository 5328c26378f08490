"""The seconds of one forward and one backward: by the clock on a CPU, by events on a GPU."""

import functools
import time
from collections.abc import Callable

import torch

from benchmarks.gates import Function, Inputs


class CpuRunner:
    """Runs a function and its backward once; the gradients are freed at once."""

    def __init__(self, function: Function, inputs: Inputs) -> None:
        self._function, self._inputs = function, inputs

    def __call__(self) -> tuple[float, float]:
        start = time.perf_counter()
        value = self._inputs.value(self._function)
        middle = time.perf_counter()
        self._inputs.gradients(value)
        end = time.perf_counter()
        return middle - start, end - middle


class CudaRunner:
    """Runs a function and its backward a few times in a row; means of the GPU's time.

    The GPU is first told to sleep, for as long as Python takes to queue the calls: so what the
    events enclose is the work and not the wait for it. A function that waits for the GPU itself is
    timed with its waiting. Before each forward the second-level cache is overwritten, and
    `restore` runs, which puts back inputs that the function destroys.

    The third number is the time until the call returns to Python, from an idle GPU: where it is
    above the sum of the others, it is what a caller waits for.
    """

    def __init__(
        self,
        function: Function,
        inputs: Inputs,
        restore: Callable[[], object] = lambda: None,
        seconds: float = 0.004,
    ) -> None:
        self._function, self._inputs, self._restore = function, inputs, restore
        self._seconds = seconds
        self._calls = 0

    def __call__(self) -> tuple[float, float, float]:
        if not self._calls:  # warm it up, and see how often it fits
            self._queue(3)
            forward, backward = self._queue(1)
            self._calls = min(20, max(1, round(self._seconds / (forward + backward))))
        self._restore()
        torch.cuda.synchronize()
        start = time.perf_counter()
        value = self._inputs.value(self._function)
        self._inputs.gradients(value)
        host = time.perf_counter() - start
        del value
        torch.cuda.synchronize()
        # Half as much again, for the events and the cache; and never so long that a round drags.
        torch.cuda._sleep(round(min(1.5 * host * self._calls, 0.05) * _cycles_per_second()))
        return *self._queue(self._calls), host

    def _queue(self, calls: int) -> tuple[float, float]:
        marks = []
        for _ in range(calls):
            self._restore()
            _cold_cache().zero_()
            start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
            start.record()
            value = self._inputs.value(self._function)
            middle.record()
            self._inputs.gradients(value)
            end.record()
            del value
            marks.append((start, middle, end))
        torch.cuda.synchronize()
        forward = sum(start.elapsed_time(middle) for start, middle, _ in marks)
        backward = sum(middle.elapsed_time(end) for _, middle, end in marks)
        return forward / calls / 1e3, backward / calls / 1e3


def cuda_seconds(run: Callable[[], object], calls: int = 3) -> float:
    """Seconds of one call on the GPU, the mean of several that were queued together."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(round(1e-3 * _cycles_per_second()))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls / 1e3


def cache_bytes() -> int:
    """Of the GPU's second-level cache."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


@functools.cache
def _cold_cache() -> torch.Tensor:
    return torch.empty(2 * cache_bytes(), dtype=torch.int8, device="cuda")


@functools.cache
def _cycles_per_second() -> float:
    cycles = 5_000_000
    torch.cuda._sleep(cycles)  # awake, and at its clock
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch.cuda._sleep(cycles)
    end.record()
    torch.cuda.synchronize()
    return cycles / (start.elapsed_time(end) / 1e3)
