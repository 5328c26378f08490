"""What the machine's memory allows, measured beside the kernels in the same rounds.

Cross-entropy must read the logits once for the loss, and read them and write the gradient once for
the backward: N x C is larger than the caches, so nothing of the first read is left. Its floor is

    forward    bytes / read bandwidth
    backward   2 bytes / copy bandwidth

Both are timed on buffers of the size of the logits, of pages that have been touched, by whichever
of several torch operations is fastest on this machine.
"""

import ctypes
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


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
        self.reader, self._read = _fastest(readers)
        self.copier, self._copy = _fastest(copiers)

    def read(self) -> float:
        """Seconds to read the buffer once."""
        return _seconds(self._read)

    def copy(self) -> float:
        """Seconds to read it once and write it once elsewhere."""
        return _seconds(self._copy)

    def close(self) -> None:
        self._pool.shutdown()

    def _memmove(self) -> None:
        # The C library writes large blocks around the caches; ctypes lets go of the GIL.
        source, destination = self.source.data_ptr(), self.destination.data_ptr()

        def copy(part: tuple[int, int]) -> None:
            ctypes.memmove(destination + part[0], source + part[0], part[1])

        list(self._pool.map(copy, self._parts))


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _fastest(candidates: dict[str, Callable[[], object]]) -> tuple[str, Callable[[], object]]:
    times = {name: [] for name in candidates}
    for _ in range(5):
        for name, run in candidates.items():
            times[name].append(_seconds(run))
    name = min(times, key=lambda key: min(times[key]))
    return name, candidates[name]
