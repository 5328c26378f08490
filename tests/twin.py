"""The CUDA kernels on the host: csrc/cuda compiled against the host twin of its primitives.

The same sources as those of a GPU, the operators' checks included, are registered as operators of
the namespace `fastgpt_twin` that take CPU tensors.
"""

import contextlib
import fcntl
import functools
import importlib.util
import io
import subprocess
from pathlib import Path

import torch

from fastgpt.ops import attention, cross_entropy, cross_entropy_direct
from fastgpt.ops.raw import Launcher

ROOT = Path(__file__).resolve().parent.parent
NAMESPACE = "fastgpt_twin"


@functools.cache
def setup():
    """The module setup.py."""
    spec = importlib.util.spec_from_file_location("fastgpt_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build() -> Path:
    """Compile what has changed. Of several processes one does, and the others wait for it."""
    s = setup()
    installed = s.check_torch(s.find_torch())
    folder = ROOT / "build" / "twin" / f"torch-{installed.version}"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "twin.so"
    compiler = s.find_compiler()
    flags = [*s.COMPILE_FLAGS, *s.HOST_FLAGS, *s.WARNINGS, *s.include_flags(installed)]
    steps = s.make_steps(
        library,
        s.sources("csrc/cuda/*.cpp", "csrc/cuda/*.cu"),
        [*compiler, *flags, "-DFASTGPT_TWIN", "-x", "c++"],
        [*compiler, "-shared"],
        s.library_flags(installed, "torch_cpu"),
    )
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.redirect_stdout(io.StringIO()):
            s.run_steps(steps, folder)
    return library


def run_program(source: Path, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """What a program of the twin did that has no need of torch, built in a folder."""
    program = folder / source.stem
    command = [*setup().find_compiler(), "-std=c++17", "-O1", *flags, str(source)]
    build = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    return subprocess.run([str(program)], capture_output=True, text=True)


@functools.cache
def load() -> None:
    """The library, built and loaded."""
    torch.ops.load_library(build())


@functools.cache
def launcher() -> Launcher:
    """The operators of cross-entropy."""
    load()
    cross_entropy_direct.define(NAMESPACE)
    return cross_entropy.define(NAMESPACE)


@functools.cache
def attention_launcher() -> Launcher:
    """The operators of attention."""
    load()
    return attention.define(NAMESPACE)
