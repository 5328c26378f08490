"""The primitives of csrc/cuda: in the host twin, and as the instructions that nvcc makes."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "tests/cuda_primitives.cpp"
BROKEN = ROOT / "tests/cuda_primitives_broken.h"
CASES = re.findall(r"^CASE\((\w+)\)", PROGRAM.read_text() + BROKEN.read_text(), re.MULTILINE)

spec = importlib.util.spec_from_file_location("fastgpt_setup", ROOT / "setup.py")
setup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup)


def compiler():
    command = shlex.split(os.environ.get("CXX", "c++"))
    if not shutil.which(command[0]):
        pytest.skip(f"there is no C++ compiler {command[0]}")
    return command


def run_program(folder, *flags):
    """What the host program says of each case, by the case's name."""
    program = folder / "primitives"
    flags = ["-std=c++17", "-O1", "-g", "-pthread", *flags]
    build = subprocess.run(
        [*compiler(), *flags, str(PROGRAM), "-o", str(program)], capture_output=True, text=True
    )
    assert build.returncode == 0, build.stderr
    run = subprocess.run([str(program)], capture_output=True, text=True)
    # 1: a case failed. Anything else is a crash, or a sanitizer's report.
    assert run.returncode in (0, 1), run.stdout + run.stderr
    assert not run.stderr, run.stderr
    return dict(line.split(": ", 1) for line in run.stdout.splitlines())


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return run_program(tmp_path_factory.mktemp("twin"), "-Wall", "-Wextra", "-Werror")


@pytest.mark.parametrize("case", CASES)
def test_twin(outcomes, case):
    assert outcomes[case] == "passed"


def test_every_case_is_known_here(outcomes):
    assert list(outcomes) == CASES


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["-fsanitize=undefined", "-fno-sanitize-recover=all"],
        ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
        ["-DFASTGPT_TWIN_UCONTEXT"],
    ],
    ids=["undefined", "address", "ucontext"],
)
def test_twin_is_sound_itself(tmp_path, flags):
    outcomes = run_program(tmp_path, *flags)
    assert outcomes == dict.fromkeys(CASES, "passed")


# --- on a GPU -------------------------------------------------------------------------------------

# What the PTX must hold, as regular expressions, on every architecture and from 9.0 on only.
INSTRUCTIONS = {
    "load_vector": r"ld\.global\.L1::no_allocate\.v4\.b32",
    "store_vector": r"st\.global\.cs\.v4\.b32",
    "exp2_approximate": r"ex2\.approx\.ftz\.f32",
    "narrow bfloat16": r"cvt\.rn\.bf16\.f32",
    "narrow_vector bfloat16": r"cvt\.rn\.bf16x2\.f32",
    "narrow_vector float16": r"cvt\.rn\.f16x2\.f32",
    "shuffle_xor": r"shfl\.sync\.bfly\.b32",
    "shuffle": r"shfl\.sync\.idx\.b32",
    "any": r"vote\.sync\.any\.pred",
    "all": r"vote\.sync\.all\.pred",
    "warp_barrier": r"bar\.warp\.sync",
    "block_barrier": r"(bar|barrier)\.sync\s+0",
    "copy_async": r"cp\.async\.cg\.shared\.global \[%r\d+\], \[%rd\d+\], 16",
    "copy_async_if": r"cp\.async\.cg\.shared\.global \[%r\d+\], \[%rd\d+\], 16, %r\d+",
    "copy_async_commit": r"cp\.async\.commit_group",
    "narrow_pair": r"cvt\.rn\.bf16x2\.f32",
    "dynamic memory": r"// dynamic shared memory: 100352",
    "copy_async_wait": r"cp\.async\.wait_group 1",
    "load_matrices": r"ldmatrix\.sync\.aligned\.m8n8\.x4\.shared\.b16",
    "load_matrices_transposed": r"ldmatrix\.sync\.aligned\.m8n8\.x4\.trans\.shared\.b16",
    "multiply_add bfloat16": r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32",
    "multiply_add float16": r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32",
    "require": r"__assert_?fail",
}
CLUSTER_INSTRUCTIONS = {
    "cluster_rank": r"%cluster_ctarank",
    "cluster_blocks": r"%cluster_nctarank",
    "load_from": r"mapa\.shared::cluster\.u32",
    "load_from, 1 byte": r"ld\.shared::cluster\.u8",
    "load_from, 2 bytes": r"ld\.shared::cluster\.u16",
    "load_from, 4 bytes": r"ld\.shared::cluster\.u32",
    "load_from, 8 bytes": r"ld\.shared::cluster\.u64",
    "cluster_barrier arrives": r"barrier\.cluster\.arrive\.release",
    "cluster_barrier waits": r"barrier\.cluster\.wait\.acquire",
}


@pytest.fixture(scope="module", params=["80", "90a"])
def compiled(request, tmp_path_factory):
    """(architecture, PTX, what ptxas reports) of the kernels, compiled as the extension is."""
    toolkits = setup.find_toolkits()
    if not toolkits:
        pytest.skip("there is no nvcc in CUDA_HOME, in CUDA_PATH, on PATH or in /usr/local/cuda")
    folder = tmp_path_factory.mktemp(request.param)
    target = f"arch=compute_{request.param},code=sm_{request.param}"
    build = subprocess.run(
        [
            *(toolkits[0].nvcc, "-gencode", target, "-O3", "-DNDEBUG"),
            *("-Xcompiler", "-Wall,-Wextra,-Werror", "-Xptxas", "-v"),
            *("--keep", "--keep-dir", str(folder), "-x", "cu", "-c", str(PROGRAM)),
            *("-o", str(folder / "primitives.o")),
        ],
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stdout + build.stderr
    [ptx] = folder.glob("*.ptx")
    return request.param, ptx.read_text(), build.stdout + build.stderr


def test_primitives_are_the_instructions_meant(compiled):
    architecture, ptx, _ = compiled
    missing = [name for name, text in INSTRUCTIONS.items() if not re.search(text, ptx)]
    assert not missing
    found = {name for name, text in CLUSTER_INSTRUCTIONS.items() if re.search(text, ptx)}
    assert found == (set(CLUSTER_INSTRUCTIONS) if architecture == "90a" else set())


def test_kernels_need_no_local_memory(compiled):
    _, _, report = compiled
    assert "warning" not in report
    used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", report)
    kernels = re.findall(r"Compiling entry function '(\w+)'", report)
    assert len(used) == len(kernels) > 30
    assert set(used) == {("0", "0", "0")}, report
