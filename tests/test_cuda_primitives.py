"""The primitives of csrc/cuda: in the host twin, and as the instructions that nvcc makes."""

import re
import subprocess
from pathlib import Path

import pytest
import triton
import twin

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "tests/cuda_primitives.cpp"
# As the program includes them: what a GPU runs too, and what must fail in the host twin.
SOURCES = [
    PROGRAM,
    *(
        ROOT / "tests" / name
        for name in (
            "cuda_primitives_hopper.h",
            "cuda_primitives_broken.h",
            "cuda_primitives_hopper_broken.h",
        )
    ),
]
CASES = [
    name
    for path in SOURCES
    for name in re.findall(r"^CASE\((\w+)\)", path.read_text(), re.MULTILINE)
]

# The toolkit may lack one.
DISASSEMBLER = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def outcomes_of(folder, *flags):
    """What the host program says of each case, by the case's name."""
    # -Og: a third of -O1's time where the sanitizers put their checks in.
    run = twin.run_program(PROGRAM, folder, "-Og", "-g1", "-pthread", *flags)
    # 1: a case failed. Anything else is a crash, or a sanitizer's report.
    assert run.returncode in (0, 1), run.stdout + run.stderr
    assert not run.stderr, run.stderr
    return dict(line.split(": ", 1) for line in run.stdout.splitlines())


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return outcomes_of(tmp_path_factory.mktemp("twin"), "-Wall", "-Wextra", "-Werror")


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
    outcomes = outcomes_of(tmp_path, *flags)
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
# From 9.0a on only, with its instructions in the machine code, to see that ptxas has left none out.
BOX = r"cp\.async\.bulk\.tensor\.{rank}d\.{direction} "
LOAD = r"shared::cluster\.global\.mbarrier::complete_tx::bytes"
STORE = r"global\.shared::cta\.bulk_group"
HOPPER_INSTRUCTIONS = {
    "Barriers::init": (r"mbarrier\.init\.shared::cta\.b64", r"SYNCS\.EXCH"),
    "Barriers::arrive": (r"mbarrier\.arrive\.shared::cta\.b64", r"SYNCS\.ARRIVE\.TRANS64"),
    "Barriers::arrive_expecting": (
        r"mbarrier\.arrive\.expect_tx\.shared::cta\.b64",
        r"SYNCS\.ARRIVE\.TRANS64",
    ),
    "Barriers::wait": (
        r"mbarrier\.try_wait\.parity\.shared::cta\.b64",
        r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT",
    ),
    "fence_barriers": (r"fence\.mbarrier_init\.release\.cluster", r"."),
    "fence_asynchronous": (r"fence\.proxy\.async\.shared::cta", r"FENCE\.VIEW\.ASYNC"),
    "named_barrier_sync": (r"bar(rier)?\.sync(\.aligned)? %r\d+, %r\d+", r"BAR\.SYNC"),
    "named_barrier_arrive": (r"bar(rier)?\.arrive(\.aligned)? %r\d+, %r\d+", r"BAR\.ARV"),
    "elect_one": (r"elect\.sync _\|p, 0xffffffff", r"ELECT"),
    "give_registers": (r"setmaxnreg\.dec\.sync\.aligned\.u32 24", r"USETMAXREG\.DEALLOC"),
    "take_registers": (r"setmaxnreg\.inc\.sync\.aligned\.u32 232", r"USETMAXREG\.TRY_ALLOC"),
    "prefetch_tensor_map": (r"prefetch\.tensormap", r"UTMACCTL\.PF"),
    "copy_tensor, 4": (BOX.format(rank=4, direction=LOAD), r"UTMALDG\.4D"),
    "copy_tensor, 5": (BOX.format(rank=5, direction=LOAD), r"UTMALDG\.5D"),
    "store_tensor, 4": (BOX.format(rank=4, direction=STORE), r"UTMASTG\.4D"),
    "store_tensor, 5": (BOX.format(rank=5, direction=STORE), r"UTMASTG\.5D"),
    "store_tensor_commit": (r"cp\.async\.bulk\.commit_group", r"UTMACMDFLUSH"),
    "store_tensor_wait_read": (r"cp\.async\.bulk\.wait_group\.read 0", r"DEPBAR"),
    "store_tensor_wait": (r"cp\.async\.bulk\.wait_group 0", r"DEPBAR"),
    "warpgroup_fence": (r"wgmma\.fence\.sync\.aligned", r"WARPGROUP\.ARRIVE"),
    "warpgroup_commit": (r"wgmma\.commit_group\.sync\.aligned", r"."),
    "warpgroup_wait": (r"wgmma\.wait_group\.sync\.aligned 0", r"WARPGROUP\.DEPBAR"),
    **{
        f"warpgroup_multiply {ptx} of {columns} columns": (
            rf"wgmma\.mma_async\.sync\.aligned\.m64n{columns}k16\.f32\.{ptx}\.{ptx}",
            rf"HGMMA\.64x{columns}x16\.F32{sass}",
        )
        for columns in (64, 80, 96, 128, 256)
        for ptx, sass in (("bf16", r"\.BF16"), ("f16", ""))
    },
}


@pytest.fixture(scope="module", params=["80", "90a"])
def compiled(request, tmp_path_factory):
    """(architecture, PTX, what ptxas reports, machine code), compiled as the extension is."""
    toolkits = twin.setup().find_toolkits()
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
    [cubin] = folder.glob("*.cubin")
    sass = subprocess.run(
        [DISASSEMBLER, "-sass", cubin], check=True, capture_output=True, text=True
    ).stdout
    return request.param, ptx.read_text(), build.stdout + build.stderr, sass


def test_primitives_are_the_instructions_meant(compiled):
    architecture, ptx, _, _ = compiled
    missing = [name for name, text in INSTRUCTIONS.items() if not re.search(text, ptx)]
    assert not missing
    found = {name for name, text in CLUSTER_INSTRUCTIONS.items() if re.search(text, ptx)}
    assert found == (set(CLUSTER_INSTRUCTIONS) if architecture == "90a" else set())


def test_hoppers_primitives_are_the_instructions_meant(compiled):
    architecture, ptx, _, sass = compiled
    found = {name for name, (text, _) in HOPPER_INSTRUCTIONS.items() if re.search(text, ptx)}
    assert found == (set(HOPPER_INSTRUCTIONS) if architecture == "90a" else set())
    if architecture == "90a":
        instructions = {
            name for name, (_, text) in HOPPER_INSTRUCTIONS.items() if re.search(text, sass)
        }
        assert instructions == set(HOPPER_INSTRUCTIONS)


def test_kernels_need_no_local_memory(compiled):
    _, _, report, _ = compiled
    assert "warning" not in report
    used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", report)
    kernels = re.findall(r"Compiling entry function '(\w+)'", report)
    assert len(used) == len(kernels) > 30
    assert set(used) == {("0", "0", "0")}, report
