"""Compile the native kernels while fastgpt is installed; the metadata is in pyproject.toml.

Two extension modules are made, both for the limited Python API and torch's stable ABI, so that one
file serves every Python >= 3.10 and every torch >= 2.10:

    fastgpt/_C.abi3.so      csrc/registration.cpp, csrc/cpu/*.cpp
    fastgpt/_cuda.abi3.so   csrc/cuda/*.cpp, csrc/cuda/*.cu

An extension that cannot be built does not fail the install: `fastgpt/_build.json`, written beside
the extensions, says why it is missing, and `fastgpt.info()` prints that. Environment variables:

    CXX, CXXFLAGS, LDFLAGS   the compiler, and flags to add to ours (nvcc has NVCC_APPEND_FLAGS)
    MAX_JOBS                 how many compilers run at once (default: one per core)
    CUDA_HOME, CUDA_PATH     where the CUDA toolkit is (else nvcc on PATH, else /usr/local/cuda)
    TORCH_CUDA_ARCH_LIST     GPU architectures, as torch reads it (default: DEFAULT_ARCH_LIST)
    FASTGPT_CUDA             0: leave CUDA out; 1: a CUDA part that cannot be built is a failure
    FASTGPT_FORCE_BUILD      1: a failure ends the install with an error
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import setuptools
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)
RECORD = "_build.json"
MACOS = sys.platform == "darwin"

COMPILE_FLAGS = [
    "-O3",
    "-DNDEBUG",
    "-DPy_LIMITED_API=0x030a0000",
    "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH),
]
HOST_FLAGS = ["-fPIC", "-fvisibility=hidden"]
WARNINGS = ["-Wall", "-Wextra"]

# Machine code for the two generations the kernels are written for. The PTX is that of 8.0: it runs
# on every later GPU, which that of 9.0a (tied to its architecture by the "a") does not.
DEFAULT_ARCH_LIST = "8.0+PTX;9.0a"


class NotBuilt(Exception):  # noqa: N818
    """Why an extension was left out, in sentences for the user; nothing went wrong."""


class BuildFailure(NotBuilt):
    """Why an extension that should be there is not; an error under FASTGPT_FORCE_BUILD=1."""


# --- what is on this machine ----------------------------------------------------------------------


class Torch(NamedTuple):
    """An installed torch, known from its files: to import it is slow, and may not work here."""

    root: Path
    version: str
    cuda: str | None


def version_tuple(version: str) -> tuple[int, ...]:
    """(major, minor) of "2.13.0+cpu", "2.10.0a0+git1234", "12.8"."""
    return tuple(int(part) for part in version.split(".")[:2])


def find_torch() -> Torch | None:
    """The torch that will be imported beside fastgpt, or None.

    Without build isolation, and where torch had to be asked for as a build requirement, it is on
    this process's path. Under pip's isolation this process cannot see the user's packages, but it
    is run by the user's interpreter, which does see them once pip's variables are taken away.
    """
    spec = importlib.util.find_spec("torch")
    origin = spec.origin if spec else None
    if origin is None:
        hidden_by_pip = ("PYTHONPATH", "PYTHONNOUSERSITE")
        origin = subprocess.run(
            [
                sys.executable,
                "-c",
                "import importlib.util as util; spec = util.find_spec('torch');"
                "print(spec.origin or '' if spec else '')",
            ],
            env={name: value for name, value in os.environ.items() if name not in hidden_by_pip},
            stdout=subprocess.PIPE,
            text=True,
        ).stdout.strip()
    if not origin:
        return None
    root = Path(origin).parent
    version = runpy.run_path(str(root / "version.py"))
    return Torch(root, version["__version__"], version["cuda"])


def check_torch(torch: Torch | None) -> Torch:
    """The torch to build against, when there is one that will do on a platform that will."""
    if sys.platform == "win32":
        raise BuildFailure("The native kernels are not built on Windows.")
    oldest = "torch {}.{}".format(*OLDEST_TORCH)
    advice = f"Install {oldest} or a later one, then fastgpt again."
    if torch is None:
        raise BuildFailure(f"torch was not installed when fastgpt was built. {advice}")
    if version_tuple(torch.version) < OLDEST_TORCH:
        raise BuildFailure(f"torch {torch.version} is older than {oldest}. {advice}")
    return torch


def find_compiler() -> list[str]:
    """The C++ compiler's command: $CXX, else the first of the usual names on PATH."""
    named = os.environ.get("CXX")
    candidates = [shlex.split(named)] if named else [["c++"], ["g++"], ["clang++"]]
    for command in candidates:
        if shutil.which(command[0]):
            return command
    missing = (
        f"The C++ compiler that CXX names, {named!r}, cannot be run."
        if named
        else "No C++ compiler was found: none of c++, g++ and clang++ is on PATH."
    )
    raise BuildFailure(
        f"{missing} Install one with C++17 (Debian, Ubuntu: apt-get install g++; macOS: "
        "xcode-select --install), or name it in CXX, and install fastgpt again."
    )


def describe_compiler(compiler: Sequence[str]) -> str:
    """The first line of `c++ --version`; the command itself when it does not answer."""
    answered, text = execute([*compiler, "--version"])
    return text.splitlines()[0] if answered and text else shlex.join(compiler)


class Toolkit(NamedTuple):
    """A CUDA toolkit. nvcc finds its own headers and libraries."""

    nvcc: str
    version: str


def find_toolkits() -> list[Toolkit]:
    """Every CUDA toolkit in the usual places, in the order of preference."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [shutil.which("nvcc", path=os.path.join(home, "bin")) for home in homes if home]
    candidates += [shutil.which("nvcc"), shutil.which("nvcc", path="/usr/local/cuda/bin")]
    toolkits = []
    for nvcc in dict.fromkeys(filter(None, candidates)):
        _, text = execute([nvcc, "--version"])
        if release := re.search(r"release (\d+\.\d+)", text):
            toolkits.append(Toolkit(nvcc, release[1]))
    return toolkits


def choose_toolkit(torch: Torch, toolkits: Sequence[Toolkit]) -> Toolkit:
    """The first toolkit of the major version torch was built with: libcudart's ABI follows it."""
    if torch.cuda is None:
        raise NotBuilt(
            f"torch {torch.version} has no CUDA. Install a CUDA build of torch, then fastgpt again."
        )
    major = version_tuple(torch.cuda)[0]
    for toolkit in toolkits:
        if version_tuple(toolkit.version)[0] == major:
            return toolkit
    advice = f"Install CUDA toolkit {major}, or name it in CUDA_HOME, and install fastgpt again."
    if not toolkits:
        raise NotBuilt(
            "No CUDA toolkit was found: there is no nvcc in CUDA_HOME, in CUDA_PATH, on PATH or in "
            f"/usr/local/cuda. {advice}"
        )
    found = ", ".join(f"{toolkit.nvcc} ({toolkit.version})" for toolkit in toolkits)
    raise NotBuilt(
        f"torch {torch.version} was built with CUDA {torch.cuda}, and no toolkit of the same major "
        f"version was found, only {found}. {advice}"
    )


def parse_arch_list(text: str) -> list[str]:
    """nvcc's -gencode values for a TORCH_CUDA_ARCH_LIST such as "8.0;9.0a+PTX"."""
    targets = []
    for item in re.split(r"[;,\s]+", text.strip("; ,\t\n")):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", item)
        if match is None:
            raise BuildFailure(
                f"TORCH_CUDA_ARCH_LIST holds {item!r}, which is no GPU architecture. Write it like "
                '"8.0;9.0a" or "9.0+PTX", and install fastgpt again.'
            )
        number = match[1] + match[2]
        targets.append(f"arch=compute_{number},code=sm_{number}")
        if match[3]:
            targets.append(f"arch=compute_{number},code=compute_{number}")
    return list(dict.fromkeys(targets))


# --- what is run for an extension -----------------------------------------------------------------


class Step(NamedTuple):
    """One command. A compile step lists the headers it read in `depfile`; a link step has none."""

    command: list[str]
    inputs: list[Path]
    output: Path
    depfile: Path | None


def make_steps(
    output: Path, sources: Iterable[Path], compiling: list[str], linking: list[str], libs: list[str]
) -> list[Step]:
    """A compile step for each source and, last, the link step; objects go to output's folder."""
    steps = []
    for source in sources:
        stem = str(output.parent / source)
        command = [*compiling, "-MD", "-MF", f"{stem}.d", "-c", str(source), "-o", f"{stem}.o"]
        steps.append(Step(command, [source], Path(f"{stem}.o"), Path(f"{stem}.d")))
    objects = [step.output for step in steps]
    command = [*linking, *map(str, objects), "-o", str(output), *libs]
    return [*steps, Step(command, objects, output, None)]


def sources(*patterns: str) -> list[Path]:
    """The files that match, relative to the project, so that no object names this machine."""
    return sorted(path.relative_to(ROOT) for pattern in patterns for path in ROOT.glob(pattern))


def include_flags(torch: Torch) -> list[str]:
    """Where torch's and Python's headers are, as system headers: their warnings are not ours."""
    python = sysconfig.get_path("include")
    if not Path(python, "Python.h").exists():
        raise BuildFailure(
            f"Python's headers were not found in {python}. Install them (Debian, Ubuntu: apt-get "
            "install python3-dev), and install fastgpt again."
        )
    return ["-isystem", str(torch.root / "include"), "-isystem", python]


def library_flags(torch: Torch, *names: str) -> list[str]:
    """Link against torch without an rpath: fastgpt imports torch before its extensions, so these
    libraries are in the process already, and are found by name wherever torch was installed."""
    return [f"-L{torch.root / 'lib'}", *(f"-l{name}" for name in names)]


def plan_cpu(torch: Torch, output: Path, record: dict[str, Any]) -> list[Step]:
    compiler = find_compiler()
    record["compiler"] = describe_compiler(compiler)
    cxxflags, ldflags = (shlex.split(os.environ.get(name, "")) for name in ("CXXFLAGS", "LDFLAGS"))
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if MACOS else ["-shared"]
    return make_steps(
        output,
        sources("csrc/registration.cpp", "csrc/cpu/*.cpp"),
        [*compiler, *COMPILE_FLAGS, *HOST_FLAGS, *WARNINGS, *include_flags(torch), *cxxflags],
        [*compiler, *shared, *ldflags],
        library_flags(torch, "torch_cpu"),
    )


def plan_cuda(torch: Torch, output: Path, record: dict[str, Any]) -> list[Step]:
    """nvcc runs every step, and adds the toolkit's own headers, libraries and NVCC_APPEND_FLAGS."""
    wanted = os.environ.get("FASTGPT_CUDA")
    if wanted == "0":
        raise NotBuilt("FASTGPT_CUDA=0 left the CUDA part out of the build.")
    try:
        files = sources("csrc/cuda/*.cpp", "csrc/cuda/*.cu")
        if not files:
            raise NotBuilt("There are no CUDA kernels yet: csrc/cuda holds no sources.")
        toolkit = choose_toolkit(torch, find_toolkits())
    except NotBuilt as unmet:
        if wanted != "1":
            raise
        raise BuildFailure(f"FASTGPT_CUDA=1 could not be met. {unmet}") from None
    gencode = parse_arch_list(os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCH_LIST)
    record["cuda_toolkit"] = toolkit.version
    record["cuda_targets"] = gencode
    compiler = shutil.which(os.environ.get("CXX", ""))
    nvcc = [toolkit.nvcc, *(["-ccbin", compiler] if compiler else [])]
    nvcc += [word for flag in HOST_FLAGS for word in ("-Xcompiler", flag)]
    nvcc += [word for target in gencode for word in ("-gencode", target)]
    warnings = [word for flag in WARNINGS for word in ("-Xcompiler", flag)]
    return make_steps(
        output,
        files,
        [*nvcc, *COMPILE_FLAGS, *warnings, "-DUSE_CUDA", *include_flags(torch)],
        # The libcudart that torch has loaded, not a second copy of it.
        [*nvcc, "-shared", "--cudart=shared"],
        library_flags(torch, "torch_cpu", "torch_cuda"),
    )


# --- how it is run --------------------------------------------------------------------------------


def run_steps(steps: Sequence[Step], folder: Path) -> None:
    """Run the steps, with ninja where there is one; what they print goes to folder/build.log."""
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    folder.mkdir(parents=True, exist_ok=True)
    ninja = find_ninja()
    if ninja:
        ninja_file = folder / "build.ninja"
        ninja_file.write_text(ninja_text(steps, folder))
        succeeded, text = execute([ninja, "-f", str(ninja_file), f"-j{jobs}"])
    else:
        succeeded, text = run_in_threads(steps, jobs)
    log = folder / "build.log"
    log.write_text(text)
    print(text)
    if not succeeded:
        tail = "\n".join(text.splitlines()[-20:])
        raise BuildFailure(
            f"The native kernels could not be compiled. The end of the output:\n{tail}\n"
            f"The whole of it is in {log} (pip -v prints it too). When what it names is mended, "
            "install fastgpt again."
        )


def find_ninja() -> str | None:
    """A ninja that runs: under build isolation the script beside the interpreter may not."""
    for path in (None, os.path.dirname(sys.executable)):
        ninja = shutil.which("ninja", path=path)
        if ninja and execute([ninja, "--version"])[0]:
            return ninja
    return None


def ninja_text(steps: Sequence[Step], folder: Path) -> str:
    """The steps as a ninja file: only what is older than its inputs, headers included, is run."""

    def escaped(*paths: Path) -> str:
        return " ".join(re.sub(r"([$ :])", r"$\1", str(path)) for path in paths)

    lines = [f"builddir = {escaped(folder)}", "rule run", "  command = $run"]
    for step in steps:
        lines.append(f"build {escaped(step.output)}: run {escaped(*step.inputs)}")
        lines.append("  run = " + shlex.join(step.command).replace("$", "$$"))
        if step.depfile:
            lines += [f"  depfile = {escaped(step.depfile)}", "  deps = gcc"]
    return "\n".join(lines) + "\n"


def run_in_threads(steps: Sequence[Step], jobs: int) -> tuple[bool, str]:
    """The same without ninja: every source is compiled, changed or not."""
    *compiling, linking = steps
    for step in steps:
        step.output.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(lambda step: execute(step.command), compiling))
    if all(succeeded for succeeded, _ in results):
        results.append(execute(linking.command))
    return all(succeeded for succeeded, _ in results), "".join(text for _, text in results)


def execute(command: Sequence[str]) -> tuple[bool, str]:
    """Whether the command succeeded, and what it printed (LC_ALL=C: in English)."""
    try:
        run = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "LC_ALL": "C"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        return False, f"{shlex.join(command)}: {error}\n"
    return run.returncode == 0, run.stdout


# --- the command ----------------------------------------------------------------------------------


class BuildNative(build_ext):
    """build_ext with the steps above in the place of distutils' compilers."""

    # (key in _build.json, file, the steps that make it)
    EXTENSIONS = (("C", "_C.abi3.so", plan_cpu), ("cuda", "_cuda.abi3.so", plan_cuda))

    def run(self) -> None:
        """Build what can be built; leave it, and the record of it, in the package's folder."""
        torch = find_torch()
        record: dict[str, Any] = {"torch": torch and torch.version}
        failures = []
        package = self.package_folder(self.inplace)
        package.mkdir(parents=True, exist_ok=True)
        for key, filename, plan in self.EXTENSIONS:
            try:
                torch = check_torch(torch)
                # One folder for each torch: to go from one to another and back compiles nothing.
                folder = ROOT / "build" / "native" / f"torch-{torch.version}" / key
                if self.force:
                    shutil.rmtree(folder, ignore_errors=True)
                run_steps(plan(torch, folder / filename, record), folder)
                replace_file(package / filename, (folder / filename).read_bytes())
                record[key] = {"built": True, "reason": None}
            except NotBuilt as error:
                # An older extension must not stay to contradict the record.
                (package / filename).unlink(missing_ok=True)
                record[key] = {"built": False, "reason": str(error)}
                if isinstance(error, BuildFailure):
                    failures.append(str(error))
        text = json.dumps(record, indent=2) + "\n"
        replace_file(package / RECORD, text.encode())
        print(text)
        if failures and os.environ.get("FASTGPT_FORCE_BUILD") == "1":
            raise CompileError("\n".join(failures))

    def package_folder(self, inplace: bool) -> Path:
        return (ROOT if inplace else Path(self.build_lib)) / "fastgpt"

    def get_output_mapping(self) -> dict[str, str]:
        """For an editable install: each built file, by the path it would have in a wheel."""
        if not self.inplace:
            return {}
        here, there = self.package_folder(True), self.package_folder(False)
        return {str(there / name): str(here / name) for name in self.built_files()}

    def get_outputs(self) -> list[str]:
        return [str(self.package_folder(False) / name) for name in self.built_files()]

    def built_files(self) -> list[str]:
        names = [RECORD, *(filename for _, filename, _ in self.EXTENSIONS)]
        return [name for name in names if (self.package_folder(self.inplace) / name).exists()]

    def get_source_files(self) -> list[str]:
        """What an sdist needs of csrc: headers too."""
        return [path.as_posix() for path in sources("csrc/**/*.*")]


def replace_file(path: Path, content: bytes) -> None:
    """Write the file in one step, so that a running process keeps the one it has open."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def torch_requirement() -> list[str]:
    """torch, only for who has none to build against: what is installed is never built past."""
    try:
        check_torch(find_torch())
    except NotBuilt:
        return ["torch>={}.{}".format(*OLDEST_TORCH)]
    return []


if __name__ == "__main__":
    setuptools.setup(
        # A name known to old and new setuptools alike; each deprecates the other's in pyproject.
        license="MIT",
        # Says that the wheel is for one platform; BuildNative has its own list of sources.
        ext_modules=[setuptools.Extension("fastgpt._C", [], py_limited_api=True)],
        cmdclass={"build_ext": BuildNative},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
        # Reported to pip as a build requirement.
        setup_requires=torch_requirement(),
    )
