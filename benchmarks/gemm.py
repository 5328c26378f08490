"""The rates of gemm.cpp, multiply-adds alone and in small products, for each instruction set.

It is compiled on first use. Which sets this processor can run, the package's own dispatch says.
Unlike the package, which must run anywhere, this is compiled for the machine it runs on, so flags
choose the instruction set.
"""

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import fastgpt
from benchmarks import UnavailableError

_SOURCE = Path(__file__).with_name("gemm.cpp")
_CSRC = _SOURCE.parent.parent / "csrc" / "cpu"
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-DFASTGPT_AVX512")
_FLAGS = {
    "scalar": (),
    "avx2": (*_AVX2, "-DFASTGPT_AVX2"),
    "avx512": _AVX512,
    "avx512_bf16": (*_AVX512, "-mavx512bf16", "-DFASTGPT_AVX512_BF16"),
}


class MicroKernel:
    """The loops of gemm.cpp for an instruction set and a type, with torch's number of threads.

    Rates are floating-point operations per second, of all threads together.
    """

    def __init__(self, isa: str, type_name: str) -> None:
        self._name = f"{isa} {type_name}"
        library = _library(isa)
        self._multiply_add = _function(library, f"multiply_add_{type_name}", 1)
        self._product = _function(library, f"product_{type_name}", 4)
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads)
        self._repeats: dict[tuple[int, ...], int] = {}

    def __str__(self) -> str:
        return self._name

    def fma_rate(self) -> float:
        """Of multiply-adds on registers alone."""
        return self._rate(self._multiply_add)

    def product_rate(self, m: int, n: int, k: int) -> float:
        """Of C (m, n) = A (m, k) B (k, n), a set of matrices for each thread; at most the sizes of
        gemm.cpp's buffers.
        """
        return self._rate(self._product, m, n, k)

    def close(self) -> None:
        self._pool.shutdown()

    def _rate(self, loop: Callable[..., float], *sizes: int) -> float:
        if sizes not in self._repeats:
            self._repeats[sizes] = _repeats(lambda repeats: loop(*sizes, repeats))
        repeats = self._repeats[sizes]

        def timed(thread: int) -> float:
            start = time.perf_counter()
            operations = loop(*sizes, repeats)  # ctypes lets go of the GIL
            return operations / (time.perf_counter() - start)

        return sum(self._pool.map(timed, range(self._threads)))


def kernel_of(dtype: torch.dtype) -> MicroKernel:
    """The kernel of this machine's fastest instruction set for inputs of a type.

    16-bit types are computed in float32 where no instruction multiplies them.
    """
    isas = fastgpt.info().isas
    if not isas:
        raise UnavailableError("the native kernels are not built")
    if dtype == torch.float64 or (dtype == torch.bfloat16 and isas[-1] == "avx512_bf16"):
        return MicroKernel(isas[-1], str(dtype).removeprefix("torch."))
    return MicroKernel(isas[-1], "float32")


def _function(library: ctypes.CDLL, name: str, arguments: int) -> Callable[..., float]:
    function = getattr(library, name)
    function.argtypes, function.restype = [ctypes.c_int64] * arguments, ctypes.c_double
    return function


@functools.cache
def _library(isa: str) -> ctypes.CDLL:
    if isa not in fastgpt.info().isas:
        raise UnavailableError(f"this processor does not have {isa}")
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        raise UnavailableError("no C++ compiler")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / f"{isa}.so"
        command = [*shlex.split(compiler), "-O3", "-shared", "-fPIC", f"-I{_CSRC}", *_FLAGS[isa]]
        try:
            result = subprocess.run(
                [*command, str(_SOURCE), "-o", str(library)], capture_output=True, text=True
            )
        except OSError as error:
            raise UnavailableError(f"{compiler}: {error.strerror}") from error
        if result.returncode != 0:
            errors = (line for line in result.stderr.splitlines() if "error" in line)
            raise UnavailableError(f"{compiler} on gemm.cpp: {next(errors, 'failed')}")
        return ctypes.CDLL(str(library))  # loaded, it outlives its file


def _repeats(run: Callable[[int], object]) -> int:
    """How many repeats take 5 ms: long beside the start of a thread, short beside what disturbs a
    machine.
    """
    repeats = 1
    while True:
        start = time.perf_counter()
        run(repeats)
        took = time.perf_counter() - start
        if took > 0.001:
            return max(1, round(repeats * 0.005 / took))
        repeats *= 4
