"""What the machine allows, measured beside the kernels in the same rounds.

Cross-entropy must read the logits once for the loss, and read them and write the gradient once for
the backward: N x C is larger than the caches, so nothing of the first read is left. Its floor is

    forward    bytes / read bandwidth
    backward   2 bytes / copy bandwidth

Both are timed on buffers of the size of the logits, of pages that have been touched, by whichever
of several torch operations is fastest on this machine.

Attention is bound by arithmetic: its floor is the number of floating-point operations over the rate
of multiply-adds on registers alone (gemm.py).

Linear cross-entropy is bound by arithmetic with many rows and by the bytes of its matrix with few:
its floor is the larger of the two, where what is read and written are the inputs and gradients.

On a GPU the floors are what torch itself reaches: a copy of a large tensor, whose read is counted
as half of it, and a large matrix product of attention's type.
"""

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch

from benchmarks.gemm import MicroKernel, kernel_of
from benchmarks.timing import cuda_seconds


class Floor(Protocol):
    operations: str  # what is timed

    def __call__(self) -> tuple[float, float]:
        """Seconds that a forward and a backward must take, measured now."""

    def rates(self, forward: float, backward: float) -> dict[str, float]:
        """The machine's rates, by name, from the floor's times."""

    def close(self) -> None: ...


class FmaFloor:
    """The arithmetic of (forward, backward) operations on inputs of a type."""

    def __init__(self, work: tuple[float, float], dtype: torch.dtype) -> None:
        self._work = work
        self._kernel: MicroKernel = kernel_of(dtype)
        self.operations = f"multiply-adds of {self._kernel}"

    def __call__(self) -> tuple[float, float]:
        time.sleep(0.02)  # torch's threads wait for more work awake, and would take a share
        rate = self._kernel.fma_rate()
        forward, backward = self._work
        return forward / rate, backward / rate

    def rates(self, forward: float, backward: float) -> dict[str, float]:
        return {"operations_per_second": self._work[0] / forward}

    def close(self) -> None:
        self._kernel.close()


class MemoryFloor:
    """The fastest read and the fastest copy of `size` bytes with torch's number of threads."""

    def __init__(self, size: int) -> None:
        rows = 64  # so that a reduction over them gives every thread the same number of long rows
        columns = max(1, size // (4 * rows))
        self.source = torch.ones(rows, columns)
        self.destination = torch.ones(rows, columns)
        self.bytes = self.source.nbytes
        vector = torch.ones(columns)
        threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(threads)
        step = -(-self.bytes // threads)
        self._parts = [(at, min(step, self.bytes - at)) for at in range(0, self.bytes, step)]
        readers = {
            "matrix times vector": lambda: torch.mv(self.source, vector),
            "sum over rows": lambda: self.source.sum(1),
            "maximum over rows": lambda: self.source.amax(1),
        }
        copiers = {
            "Tensor.copy_": lambda: self.destination.copy_(self.source),
            "memmove in threads": self._memmove,
        }
        reader, self._read = _fastest(readers)
        copier, self._copy = _fastest(copiers)
        self.operations = f"{reader}; {copier}"

    def __call__(self) -> tuple[float, float]:
        """Seconds to read the buffer once, and to read it once and write it once elsewhere."""
        return _seconds(self._read), _seconds(self._copy)

    def rates(self, forward: float, backward: float) -> dict[str, float]:
        return {
            "read_bytes_per_second": self.bytes / forward,
            "copy_bytes_per_second": 2 * self.bytes / backward,  # read and written together
        }

    def close(self) -> None:
        self._pool.shutdown()

    def _memmove(self) -> None:
        # The C library writes large blocks around the caches; ctypes lets go of the GIL.
        source, destination = self.source.data_ptr(), self.destination.data_ptr()

        def copy(part: tuple[int, int]) -> None:
            ctypes.memmove(destination + part[0], source + part[0], part[1])

        list(self._pool.map(copy, self._parts))


class CudaCopyFloor:
    """The GPU's copy of `size` bytes, or of a gigabyte and scaled to it if that is less."""

    operations = "Tensor.copy_"

    def __init__(self, size: int) -> None:
        self._size = size
        self._source = torch.ones(min(size, 1 << 30), dtype=torch.int8, device="cuda")
        self._destination = torch.ones_like(self._source)

    def __call__(self) -> tuple[float, float]:
        copy = cuda_seconds(lambda: self._destination.copy_(self._source))
        copy *= self._size / self._source.nbytes
        return copy / 2, copy

    def rates(self, forward: float, backward: float) -> dict[str, float]:
        return {"copy_bytes_per_second": 2 * self._size / backward}  # read and written together

    def close(self) -> None: ...


class CudaMatmulFloor:
    """The rate of a large matrix product; IEEE float32 unless torch was told otherwise."""

    def __init__(self, work: tuple[float, float], dtype: torch.dtype) -> None:
        self._work = work
        n = 8192 if dtype.itemsize == 2 else 4096
        self._a, self._b = (torch.randn(n, n, dtype=dtype, device="cuda") for _ in range(2))
        self._out = torch.empty_like(self._a)
        self._matmul = 2.0 * n**3
        name = str(dtype).removeprefix("torch.")
        self.operations = f"a {name} matrix product of size {n}"

    def __call__(self) -> tuple[float, float]:
        rate = self._matmul / cuda_seconds(lambda: torch.mm(self._a, self._b, out=self._out))
        forward, backward = self._work
        return forward / rate, backward / rate

    def rates(self, forward: float, backward: float) -> dict[str, float]:
        return {"operations_per_second": self._work[0] / forward}

    def close(self) -> None: ...


class Roofline:
    """The larger of two floors: of the arithmetic, and of inputs that are read once and, if their
    gradients are wanted, written once.

    `memory` gives the seconds of reading, and of copying, the bytes of the inputs.
    """

    def __init__(self, arithmetic: Floor, memory: Floor, training: bool) -> None:
        self._arithmetic, self._memory, self._training = arithmetic, memory, training
        self.operations = f"{arithmetic.operations}; {memory.operations}"
        self._rates: list[dict[str, float]] = []

    def __call__(self) -> tuple[float, float]:
        forward, backward = self._arithmetic()
        read, copy = self._memory()
        self._rates.append(
            self._arithmetic.rates(forward, backward) | self._memory.rates(read, copy)
        )
        first = max(forward, read)
        return first, max(forward + backward, copy) - first if self._training else 0.0

    def rates(self, forward: float, backward: float) -> dict[str, float]:
        """Medians of what was measured: the times say only which of the two was larger."""
        names = self._rates[0]
        return {name: statistics.median(rates[name] for rates in self._rates) for name in names}

    def close(self) -> None:
        self._arithmetic.close()
        self._memory.close()


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _fastest(candidates: Mapping[str, Callable[[], object]]) -> tuple[str, Callable[[], object]]:
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(5):
        for name, run in candidates.items():
            times[name].append(_seconds(run))
    name = min(times, key=lambda key: min(times[key]))
    return name, candidates[name]
