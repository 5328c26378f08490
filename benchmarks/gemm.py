"""The rate of multiply-adds, from gemm.cpp, compiled on first use for each instruction set.

Which sets this processor can run, the package's own dispatch says. Unlike the package, which must
run anywhere, this is compiled for the machine it runs on, so flags choose the instruction set.
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
    """The loops of gemm.cpp for an instruction set and a type, with torch's number of threads."""

    # Long beside the start of a thread, short beside what disturbs a machine.
    SECONDS = 0.005

    def __init__(self, isa: str, type_name: str) -> None:
        self._name = f"{isa} {type_name}"
        self._multiply_add = _function(isa, f"multiply_add_{type_name}")
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads)
        self._steps = _repeats(self._multiply_add, self.SECONDS)

    def __str__(self) -> str:
        return self._name

    def fma_rate(self) -> float:
        """Floating-point operations per second of all threads, on registers alone."""
        return sum(self._pool.map(self._timed, range(self._threads)))

    def close(self) -> None:
        self._pool.shutdown()

    def _timed(self, thread: int) -> float:
        start = time.perf_counter()
        operations = self._multiply_add(self._steps)  # ctypes lets go of the GIL
        return operations / (time.perf_counter() - start)


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


def _function(isa: str, name: str) -> Callable[[int], float]:
    function = getattr(_library(isa), name)
    function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_double
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
            subprocess.run(
                [*command, str(_SOURCE), "-o", str(library)],
                capture_output=True,
                text=True,
                check=True,
            )
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", "") or str(error)).strip()
            raise UnavailableError(f"gemm.cpp: {said.splitlines()[0]}") from error
        return ctypes.CDLL(str(library))  # loaded, it outlives its file


def _repeats(run: Callable[[int], object], seconds: float) -> int:
    """How many repeats take about that long."""
    repeats = 1
    while True:
        start = time.perf_counter()
        run(repeats)
        took = time.perf_counter() - start
        if took > seconds / 4:
            return max(1, round(repeats * seconds / took))
        repeats *= 4
