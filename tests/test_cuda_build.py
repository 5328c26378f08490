"""The CUDA sources, compiled and linked as setup.py does it: no test here needs a GPU, or a torch
that has CUDA.

Each source is compiled once, for all of the default architectures. What ptxas reports of each
kernel is held against what the kernel itself states by __launch_bounds__, and the objects are
linked and loaded beside the torch that is installed.
"""

import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import triton
from once import made_once

from fastgpt.backends.triton import aot
from fastgpt.backends.triton.chips import CHIPS

ROOT = Path(__file__).resolve().parent.parent
OPERATORS = [
    f"fastgpt::cross_entropy_{which}"
    for which in ("forward", "backward", "backward_in_place", "reduced", "reduced_backward")
] + [f"fastgpt::attention_{which}" for which in ("forward", "backward")]

spec = importlib.util.spec_from_file_location("fastgpt_setup_of_cuda", ROOT / "setup.py")
setup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup)


# ---- what a kernel uses ----


class Kernel(NamedTuple):
    """A kernel's code for one architecture."""

    name: str
    architecture: str  # "sm_90a"
    used: aot.Resources
    threads: int | None  # that it states by __launch_bounds__; None where it does not
    blocks: int | None  # the same: what a multiprocessor must hold at once

    def complaints(self) -> list[str]:
        """What is wrong with it; empty where all is well."""
        found = []
        if self.used.spill_stores or self.used.spill_loads:
            found.append("spills registers")
        if self.used.stack:
            found.append("uses stack")
        if self.threads is None or self.blocks is None:
            return [*found, "does not state its threads and blocks"]
        chip = CHIPS[self.architecture.rstrip("af")]
        held = aot.occupancy(chip, self.used.registers, self.used.shared_memory, self.threads)
        if held < self.blocks:
            found.append(f"a multiprocessor holds {held} blocks, not {self.blocks}")
        return found


def read_kernels(log: str, ptx: Iterable[str]) -> list[Kernel]:
    """The kernels that ptxas reports in the log, with the bounds that stand in their PTX; and the
    dynamic shared memory, which FASTGPT_DYNAMIC_SHARED_BYTES leaves there.
    """
    bounds, dynamic = {}, {}
    for text in ptx:
        architecture = re.search(r"^\.target (\w+)", text, re.M)[1]
        for entry in text.split(".entry ")[1:]:
            name, stated = re.match(r"(\w+)\(.*?\)(.*?)\{", entry, re.S).groups()
            bounds[architecture, name] = stated
            told = re.search(r"// dynamic shared memory: (\d+)", entry)
            dynamic[architecture, name] = int(told[1]) if told else 0
    kernels = []
    for text in log.split("Compiling entry function ")[1:]:
        name, architecture = re.match(r"'(\w+)' for '(\w+)'", text).groups()
        used = aot.parse_ptxas(text)
        # A function that was not inlined has a line of its own, below that of the kernel.
        memory = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        lines = [tuple(map(int, line)) for line in re.findall(memory, text)]
        stack, stores, loads = map(max, zip(*lines, strict=True))
        shared = re.search(r"(\d+) bytes smem", text)
        used = used._replace(
            stack=stack,
            spill_stores=stores,
            spill_loads=loads,
            shared_memory=(int(shared[1]) if shared else 0) + dynamic[architecture, name],
        )
        stated = bounds[architecture, name]
        threads = re.search(r"\.(?:max|req)ntid (\d+)(?:, (\d+), (\d+))?", stated)
        blocks = re.search(r"\.minnctapersm (\d+)", stated)
        kernels.append(
            Kernel(
                name,
                architecture,
                used,
                math.prod(int(n or 1) for n in threads.groups()) if threads else None,
                int(blocks[1]) if blocks else None,
            )
        )
    assert {(k.architecture, k.name) for k in kernels} == set(bounds)
    return kernels


OVERRULED = (
    r"\bwgmma\.mma_async instructions are serialized",
    r"\bwarpgroup\.(?:wait|arrive) is injected",
    r"'setmaxnreg' ignored",
)


def overruled(log: str) -> list[str]:
    """Where ptxas says that it does not what a kernel asks: it waits for products that the kernel
    leaves under way, or lets no registers be given and taken.
    """
    return [line for line in log.splitlines() if re.search("|".join(OVERRULED), line)]


# ---- what is built ----


class Build(NamedTuple):
    """An extension that was compiled and linked, and what the compilers left."""

    folder: Path

    @property
    def extension(self) -> Path:
        return self.folder / "_cuda.abi3.so"

    @property
    def log(self) -> str:
        return (self.folder / "build.log").read_text()

    @property
    def kernels(self) -> list["Kernel"]:
        ptx = [path.read_text() for path in self.folder.glob("kept/*.ptx")]
        return read_kernels(self.log, ptx)


def toolkit() -> setup.Toolkit:
    toolkits = setup.find_toolkits()
    if not toolkits:
        pytest.skip("there is no nvcc in CUDA_HOME, in CUDA_PATH, on PATH or in /usr/local/cuda")
    major = torch.version.cuda and torch.version.cuda.split(".")[0]
    fitting = [kit for kit in toolkits if not major or kit.version.split(".")[0] == major]
    if not fitting:
        pytest.skip(f"there is no nvcc of CUDA {major}, with which torch was built")
    return fitting[0]


def build(tree: Path, folder: Path, architectures: str = "", link: bool = True) -> Build:
    """Compile the csrc/cuda of a tree as an install does with a torch that has CUDA."""
    kit, installed = toolkit(), setup.find_torch()
    (folder / "kept").mkdir(parents=True)
    kept = f"-Xptxas=-v --keep --keep-dir {folder / 'kept'}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "ROOT", tree)
        patch.delenv("FASTGPT_CUDA", raising=False)
        patch.setenv("TORCH_CUDA_ARCH_LIST", architectures)
        patch.setenv("NVCC_APPEND_FLAGS", f"{os.environ.get('NVCC_APPEND_FLAGS', '')} {kept}")
        built = Build(folder)
        with_cuda = installed._replace(cuda=kit.version)
        *compiling, linking = setup.plan_cuda(with_cuda, built.extension, {})
        if torch.version.cuda is None:
            # In the place of the library that this torch lacks, with all that we take from it.
            stub = make_stub(folder, "int aoti_torch_get_current_cuda_stream() { return 1; }")
            linking = linking._replace(command=[*linking.command, f"-L{stub}"])
        setup.run_steps([*compiling, linking] if link else compiling, folder)
    return built


def make_stub(folder: Path, source: str) -> Path:
    """A folder with a libtorch_cuda.so of this C source."""
    stub = folder / "stub"
    stub.mkdir()
    (stub / "stub.c").write_text(source + "\n")
    command = [*setup.find_compiler(), "-x", "c", "-shared", "-fPIC", str(stub / "stub.c")]
    subprocess.run([*command, "-o", str(stub / "libtorch_cuda.so")], check=True)
    return stub


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Build:
    """The real sources, built once for all the processes of the tests."""
    folder = made_once(tmp_path_factory, "cuda-build", lambda folder: build(ROOT, folder))
    return Build(folder)


# ---- what is tested ----

REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
ptxas info    : Function properties for kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 1024 bytes smem, 368 bytes cmem[0]
ptxas info    : Function properties for far
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""
PTX = """\
.target sm_90a
.visible .entry kernel(
	.param .u64 kernel_param_0
)
.maxntid 256, 1, 1
.minnctapersm 4
{
"""


@pytest.mark.parametrize(
    ("old", "new", "complaints"),
    [
        ("", "", []),
        ("kernel\n    0 bytes stack", "kernel\n    8 bytes stack", ["uses stack"]),
        ("far\n    0 bytes stack", "far\n    8 bytes stack", ["uses stack"]),
        ("0 bytes spill stores", "4 bytes spill stores", ["spills registers"]),
        ("0 bytes spill loads", "4 bytes spill loads", ["spills registers"]),
        ("Used 64", "Used 65", ["a multiprocessor holds 3 blocks, not 4"]),
        ("1024 bytes smem", "57345 bytes smem", ["a multiprocessor holds 3 blocks, not 4"]),
        ("1024 bytes smem", "57344 bytes smem", []),
        (".minnctapersm 4\n{\n", ".minnctapersm 4\n{\n// dynamic shared memory: 56320\n", []),
        (
            ".minnctapersm 4\n{\n",
            ".minnctapersm 4\n{\n// dynamic shared memory: 56321\n",
            ["a multiprocessor holds 3 blocks, not 4"],
        ),
        (".maxntid 256, 1, 1", ".maxntid 256, 2, 1", ["a multiprocessor holds 2 blocks, not 4"]),
        (".maxntid 256, 1, 1", ".reqntid 256", []),
        (".maxntid 256, 1, 1", "", ["does not state its threads and blocks"]),
        (".minnctapersm 4", "", ["does not state its threads and blocks"]),
    ],
)
def test_a_kernel_that_does_not_fit_passes(old, new, complaints):
    [kernel] = read_kernels(REPORT.replace(old, new), [PTX.replace(old, new)])
    assert kernel.complaints() == complaints


@pytest.mark.slow
def test_a_broken_kernel_passes(tmp_path):
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "broken_kernels.cu", folder)
    kernels = build(tmp_path, tmp_path / "built", architectures="8.0", link=False).kernels
    found = {re.sub(r"^_Z\d+|P[fK].*", "", kernel.name): kernel.complaints() for kernel in kernels}
    assert found.pop("spills")[0] == "spills registers"
    assert found == {
        "good": [],
        "has_a_stack": ["uses stack"],
        "shares_too_much": ["a multiprocessor holds 3 blocks, not 4"],
        "states_no_bounds": ["does not state its threads and blocks"],
        "states_no_blocks": ["does not state its threads and blocks"],
    }


@pytest.mark.slow
def test_a_cuda_kernel_spills_or_does_not_fit_its_multiprocessor(built):
    kernels = built.kernels
    assert {kernel.architecture for kernel in kernels} == {"sm_80", "sm_90a"}
    complaints = [
        f"{kernel.name} for {kernel.architecture}: {complaint}"
        for kernel in kernels
        for complaint in kernel.complaints()
    ]
    assert not complaints, "\n".join(complaints)


@pytest.mark.slow
def test_a_kernel_that_ptxas_overrules_passes(tmp_path):
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "broken_hopper_kernels.cu", folder)
    shutil.copy(ROOT / "csrc" / "cuda" / "primitives.cuh", folder)
    found = overruled(build(tmp_path, tmp_path / "built", architectures="9.0a", link=False).log)
    *products, registers = ([x for x in found if re.search(text, x)] for text in OVERRULED)
    assert all(products)
    assert all("10serialised" in line for lines in products for line in lines), found
    assert len(registers) == 1  # ptxas does not say of which kernel


@pytest.mark.slow
def test_hoppers_products_are_serialised_or_its_registers_do_not_add_up(built):
    assert not overruled(built.log)
    kernels = [
        kernel
        for kernel in built.kernels
        if kernel.architecture == "sm_90a" and "_hopper" in kernel.name
    ]
    # Of two types. The forward, the pass over the queries and that over the keys at five widths,
    # with options and without; but in the backward of 256 none with options, and two over the keys.
    assert len(kernels) == 2 * (3 * 5 * 2 - 2 + 1)
    for kernel in kernels:
        assert kernel.threads == 384
        # What a thread has until its warpgroup gives or takes: all of a multiprocessor's.
        assert kernel.used.registers == 65536 // 384 // 8 * 8
    ptx = "".join(path.read_text() for path in built.folder.glob("kept/*.ptx"))
    pairs = {}
    for entry in ptx.split(".entry ")[1:]:
        name = entry.split("(", 1)[0]
        if "_hopper" in name and "setmaxnreg" in entry:
            found = re.findall(r"setmaxnreg\.(dec|inc)\.sync\.aligned\.u32 (\d+)", entry)
            pairs[name] = {what: int(n) for what, n in found}
            assert len(found) == 2, name
    assert set(pairs) == {kernel.name for kernel in kernels}
    for name, pair in pairs.items():
        over_keys = "attention_key_gradient" in name
        assert pair == ({"dec": 40, "inc": 232} if over_keys else {"dec": 24, "inc": 240}), name
        # What the block was launched with: a warpgroup would wait for more without an end.
        assert 128 * pair["dec"] + 256 * pair["inc"] <= 384 * 168, name


def overlapped(sass: str, kernel: str) -> list[int]:
    """Of each of Hopper's kernels of a name that waits for a product while another is under way,
    the exponentials between that wait and the next.
    """
    found = []
    for code in sass.split("Function : ")[1:]:
        parts = re.split(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1", code)
        if f"{kernel}_hopper" in code.split("\n", 1)[0] and len(parts) > 1:
            assert len(parts) == 2
            found.append(parts[1].split("WARPGROUP.DEPBAR")[0].count("MUFU.EX2"))
    return found


@pytest.mark.slow
def test_hoppers_tensor_cores_idle_under_a_softmax(built):
    """A thread has one exponential for each two keys of a tile, and in the forward two of the
    maxima; in the pass over the keys, for each two queries. ptxas once put them behind the wait.
    In the backward those of plain calls only.
    """
    keys = {64: 128, 80: 128, 96: 128, 128: 128, 256: 80}  # by width, in the forward
    disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    for dtype, width in itertools.product(("bfloat16", "float16"), keys):
        path = built.folder / "csrc" / "cuda" / f"attention_{dtype}_{width}.cu.o"
        sass = subprocess.run(
            [disassembler, "-arch", "sm_90a", "-sass", path],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        counts = overlapped(sass, "attention_forward")
        assert len(counts) == 2, path
        assert min(counts) >= keys[width] // 2 + 2, (path, counts)
        assert overlapped(sass, "attention_query_gradient") == [64 if width <= 128 else 32], path
        assert overlapped(sass, "attention_key_gradient") == [32], path


@pytest.mark.slow
def test_the_cuda_sources_are_compiled_with_warnings(built):
    warnings = re.findall(r"^(?!\[).*\bwarning\b.*", built.log, re.M)  # "[" opens a command
    assert not warnings, "\n".join(warnings)


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None, reason="the installed extension is the proof")
def test_the_cuda_extension_lacks_a_symbol_or_an_operator(built):
    """It is loaded beside a torch without CUDA, a stub, and the toolkit's CUDA runtime."""
    code = """
import importlib.machinery, importlib.util, json, sys
import torch, fastgpt
from fastgpt.backends import hopper
path, operators = sys.argv[1], sys.argv[2:]
def kernels():
    return [torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA") for name in operators]
before = kernels()
loader = importlib.machinery.ExtensionFileLoader("fastgpt._cuda", path)
spec = importlib.util.spec_from_file_location("fastgpt._cuda", path, loader=loader)
loader.exec_module(importlib.util.module_from_spec(spec))
hopper.switch({("forward", 64): False})
print(json.dumps([before, kernels()]))
"""
    libraries = [built.folder / "stub", *runtime_folders(toolkit())]
    result = subprocess.run(
        [sys.executable, "-c", code, str(built.extension), *OPERATORS],
        env={
            **os.environ,
            "LD_LIBRARY_PATH": os.pathsep.join(map(str, libraries)),
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    before, after = json.loads(result.stdout)
    assert before == [False] * len(OPERATORS)
    assert dict(zip(OPERATORS, after, strict=True)) == dict.fromkeys(OPERATORS, True)


def runtime_folders(kit: setup.Toolkit) -> list[Path]:
    """Where the toolkit has libcudart: beside the nvcc that a script or a link may stand for."""
    dry = subprocess.run([kit.nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", dry, re.M)[1].strip()
    return [folder for name in ("lib64", "lib") if (folder := Path(top, name)).is_dir()]


@pytest.mark.slow
def test_the_cuda_extension_leaves_the_stable_abis(built):
    def output(*command):
        command = [*command, str(built.extension)]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    dynamic = output("readelf", "-d")
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= set(needed)
    assert [name for name in needed if name.startswith("libcudart.so.")]
    assert not [name for name in needed if "python" in name or "libc10" in name]
    assert "RUNPATH" not in dynamic
    assert "RPATH" not in dynamic
    symbols = re.findall(r" U (\S+)", output("nm", "-D"))
    cplusplus = [name for name in symbols if re.match(r"_ZNK?(2at|3c10|5torch)", name)]
    assert not cplusplus, "these are not in torch's stable ABI"
