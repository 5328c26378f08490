"""The chips, and the Triton kernels compiled ahead of time for them: no test here needs a GPU.

What compiles runs in a process of its own: this one may interpret, and then can't compile.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from once import made_once

import fastgpt
from fastgpt.backends import triton as package
from fastgpt.backends.triton import aot, chips, report
from fastgpt.backends.triton.chips import CHIPS, RELATIVES

ROOT = Path(fastgpt.__file__).parent.parent
DOCUMENT = ROOT / "docs" / "triton.md"


def python(*arguments, path=(), timeout=1800, **variables):
    """Run Python without an interpreter of Triton's, and with this package."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    inherited["PYTHONPATH"] = os.pathsep.join([*map(str, path), str(ROOT)])
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=inherited | variables,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


# ---- chips ----


@pytest.fixture
def gpu(monkeypatch):
    """Make device 0 a GPU with such properties."""

    def make(hip=None, **properties):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.version, "hip", hip)
        properties = SimpleNamespace(**properties)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        chips._chip_of.cache_clear()
        return torch.device("cuda", 0)

    yield make
    chips._chip_of.cache_clear()


@pytest.mark.parametrize(
    ("capability", "name", "shared_kib"),
    [
        ((8, 0), "sm_80", 163),
        ((8, 6), "sm_80", 99),
        ((8, 7), "sm_80", 163),
        ((8, 9), "sm_80", 99),
        ((9, 0), "sm_90", 227),
        ((10, 0), "sm_100", 227),
        ((10, 3), "sm_100", 227),
        ((11, 0), "sm_100", 227),
        ((12, 0), "sm_80", 99),
        ((12, 1), "sm_80", 99),
    ],
)
def test_a_gpu_gets_tiles_that_do_not_fit_it(gpu, capability, name, shared_kib):
    major, minor = capability
    device = gpu(major=major, minor=minor, shared_memory_per_block_optin=shared_kib * 1024)
    chip = chips.chip_of(device)
    assert (chip.name, chip.shared_memory) == (name, shared_kib * 1024)
    assert chip.arch == 10 * major + minor
    assert chip.descriptors == CHIPS[name].descriptors
    assert chips.unserved(device) == ""
    assert chip == {c.arch: c for c in (*CHIPS.values(), *RELATIVES.values())}[chip.arch]


def test_a_gpu_is_taken_to_have_more_shared_memory_than_it_says(gpu):
    device = gpu(major=8, minor=8, shared_memory_per_block_optin=99 * 1024)
    assert chips.chip_of(device) == replace(RELATIVES["sm_86"], arch=88)
    device = gpu(major=13, minor=0, shared_memory_per_block_optin=80 * 1024)
    assert chips.chip_of(device).name == "sm_80"
    assert chips.chip_of(device).shared_memory == 80 * 1024


@pytest.mark.parametrize(
    ("arch", "shared_kib"),
    [("gfx942:sramecc+:xnack-", 64), ("gfx90a:sramecc+:xnack-", 64), ("gfx950", 160)],
)
def test_an_amd_gpu_gets_tiles_that_do_not_fit_it(gpu, arch, shared_kib):
    chip = chips.chip_of(gpu(hip="7.0", gcnArchName=arch))
    assert (chip.name, chip.shared_memory) == ("gfx942", shared_kib * 1024)
    assert chip.arch == arch.partition(":")[0]


@pytest.mark.parametrize(
    ("properties", "reason"),
    [
        ({"major": 7, "minor": 5}, "its compute capability, 7.5, is older than 8.0"),
        (
            {"hip": "7.0", "gcnArchName": "gfx1100"},
            "no tiles are stored for gfx1100, only for gfx90a, gfx942, gfx950",
        ),
    ],
)
def test_a_gpu_without_tiles_is_covered(gpu, properties, reason):
    device = gpu(**properties)
    assert chips.unserved(device) == reason
    assert package._covers_device(device) == reason
    with pytest.raises(RuntimeError, match=f"can't run on cuda:0: {reason}"):
        chips.chip_of(device)


def test_fake_tensors_of_a_missing_gpu_need_the_gpu():
    assert chips.unserved(torch.device("cuda", torch.cuda.device_count())) == ""


def test_the_interpreter_has_no_chip():
    assert chips.chip_of(torch.device("cpu")) == CHIPS["sm_90"]
    assert chips.unserved(torch.device("cpu")) == ""


def test_asking_for_the_chip_breaks_a_compiled_graph(compiled):
    def f(x):
        chip = chips.chip_of(x.device)
        return x * chip.shared_memory if not chips.unserved(x.device) else x

    x = torch.ones(2)
    assert torch.equal(compiled(f)(x), x * CHIPS["sm_90"].shared_memory)


# ---- what is read of a compilation ----

PTXAS = """\
ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized \
due to insufficient register resources for the wgmma pipeline in the function 'f'
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'f' for 'sm_90a'
ptxas info    : Function properties for f
    4096 bytes stack frame, 2052 bytes spill stores, 2048 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 4096 bytes cumulative stack size
"""

AMDGCN = """\
    .amdhsa_next_free_vgpr 96
  - .agpr_count:     4
    .group_segment_fixed_size: 0
    .private_segment_fixed_size: 20
    .sgpr_count:     38
    .sgpr_spill_count: 2
    .vgpr_count:     132
    .vgpr_spill_count: 3
"""


def test_what_ptxas_says_is_misread():
    used = aot.parse_ptxas(PTXAS)
    assert (used.registers, used.stack) == (168, 4096)
    assert (used.spill_stores, used.spill_loads) == (2052, 2048)
    [warning] = used.warnings
    assert warning.startswith("wgmma.mma_async instructions are serialized due to insufficient")
    with pytest.raises(ValueError, match="no registers"):
        aot.parse_ptxas("ptxas info    : 0 bytes gmem")


def test_amds_metadata_is_misread():
    used = aot.parse_amdgcn(AMDGCN)
    assert (used.registers, used.stack, used.spill_stores) == (132, 20, 12)
    assert used.warnings == ("scalar registers spill into vector registers",)
    assert (
        aot.parse_amdgcn(AMDGCN.replace("sgpr_spill_count: 2", "sgpr_spill_count: 0")).warnings
        == ()
    )
    with pytest.raises(ValueError, match="vgpr_count"):
        aot.parse_amdgcn(AMDGCN.replace(".vgpr_count", ".other"))


@pytest.mark.parametrize(
    ("chip", "registers", "shared_kib", "threads", "blocks"),
    [
        ("sm_80", 32, 0, 256, 8),  # all 2048 threads
        ("sm_80", 33, 0, 256, 6),  # 40 registers at a time
        ("sm_80", 128, 0, 256, 2),
        ("sm_80", 255, 0, 512, 0),
        ("sm_80", 32, 0, 32, 32),
        ("sm_80", 32, 54, 32, 2),  # with 1 KiB for each block
        ("sm_90", 168, 113, 384, 1),
        ("sm_90", 64, 113, 256, 2),
        ("gfx942", 128, 0, 256, 4),
        ("gfx942", 129, 0, 256, 3),
        ("gfx942", 512, 0, 256, 1),
        ("gfx942", 64, 32, 256, 2),
        ("gfx942", 32, 0, 2048, 0),
    ],
)
def test_occupancy_is_miscounted(chip, registers, shared_kib, threads, blocks):
    found = aot.occupancy(CHIPS[chip], registers, shared_kib * 1024, threads)
    assert found == blocks


def test_tensor_memory_is_left_out_of_the_occupancy():
    assert aot.occupancy(CHIPS["sm_100"], 32, 0, 128) == 16
    assert aot.occupancy(CHIPS["sm_100"], 32, 0, 128, tensor_memory=256) == 2


FITS = aot.Resources(64, 0, 0, 0, 1024, 0, 128, 8, {"mma": 4}, ())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"spill_stores": 8, "spill_loads": 4}, "spills registers: 8 bytes stored, 4 loaded"),
        ({"stack": 16}, "uses 16 bytes of stack"),
        ({"shared_memory": 232449}, "needs 232449 bytes of shared memory, of 232448"),
        ({"tensor_memory": 1024}, "needs 1024 columns of tensor memory, of 512"),
        ({"blocks": 0}, "does not fit: no multiprocessor can hold one block"),
        ({"instructions": {"mma": 0}}, "has no mma: nothing matches 'mma'"),
    ],
)
def test_a_broken_kernel_passes(change, complaint):
    compilation = aot.Compilation("kernel", None, {}, {}, (), {}, {"mma": "mma"}, "")
    assert aot.check(FITS, compilation, CHIPS["sm_90"]) == []
    complaints = aot.check(FITS._replace(**change), compilation, CHIPS["sm_90"])
    assert complaints == [f"kernel: {complaint}"]


# ---- compiling ----


@pytest.fixture(scope="module")
def broken_kernels(tmp_path_factory):
    """What `aot` finds in each kernel of broken_kernels.py, for each chip."""

    def make(folder):
        result = python(ROOT / "tests" / "broken_kernels.py", "compile")
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        (folder / "found.json").write_text(result.stdout)

    folder = made_once(tmp_path_factory, "broken-triton-kernels", make)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["sm_90", "gfx942"])
def test_compiling_finds_nothing_wrong_or_everything(broken_kernels, chip):
    found = broken_kernels[chip]
    for name in ("good", "vectors"):
        assert found[name]["complaints"] == []
        assert found[name]["registers"] > 0
        assert found[name]["blocks"] > 0
        assert all(found[name]["instructions"].values())
    assert "spills: spills registers" in found["spills"]["complaints"][0]
    assert "bytes of shared memory" in found["too large"]["complaints"][-1]
    assert "has no 128-bit loads" in found["no vectors"]["complaints"][0]
    assert "no_such_name is not defined" in found["untranslatable"]["error"]
    assert "mistaken in ['BLOCK', 'out', 'shift']" in found["mistaken"]["error"]
    assert "mistaken in ['columns']" in found["mistyped"]["error"]


@pytest.mark.slow
def test_the_report_succeeds_with_a_broken_kernel_or_fails_with_a_good_one():
    script = ROOT / "tests" / "broken_kernels.py"
    good = python(script, "report", "good", "--chip", "sm_80", "--chip", "gfx90a")
    assert good.returncode == 0, good.stderr
    assert "\n2 kernels compiled" in good.stdout
    assert good.stdout.rstrip().endswith(", 0 complaints")
    broken = python(script, "report", "broken", "--chip", "sm_80")
    assert broken.returncode == 1, broken.stderr
    assert "sm_80: spills: spills registers" in broken.stdout
    assert "sm_80: untranslatable: does not compile: " in broken.stdout


@pytest.mark.slow
def test_interpreted_kernels_are_compiled_or_refused_without_a_reason():
    result = python("-m", "fastgpt.backends.triton.report", TRITON_INTERPRET="1")
    assert result.returncode == 2
    assert "TRITON_INTERPRET is set" in result.stderr
    code = (
        "from fastgpt.backends.triton import aot, cross_entropy\n"
        "from fastgpt.backends.triton.chips import CHIPS\n"
        "aot.compile(next(iter(cross_entropy.compilations(CHIPS['sm_90']))), CHIPS['sm_90'])"
    )
    result = python("-c", code, TRITON_INTERPRET="1")
    assert "RuntimeError: TRITON_INTERPRET makes Triton's functions uncompilable" in result.stderr


# ---- the report ----


def test_the_roofline_miscounts():
    limits = {(limit.path, limit.shape): limit for limit in report.roofline()}
    forward = limits["cross-entropy forward", "2048 x 50304 bfloat16"]
    assert forward.amount == 2048 * 50304 * 2
    assert forward.seconds == pytest.approx(47.9e-6, rel=1e-3)
    backward = limits["cross-entropy backward", "16384 x 128256 float32"]
    assert backward.amount == 2 * 16384 * 128256 * 4
    products = limits["linear cross-entropy", "(8192, 4096) x 128256 bfloat16"]
    assert products.amount == 6 * 8192 * 4096 * 128256
    again = limits["linear cross-entropy in slices", "(8192, 4096) x 128256 bfloat16"]
    assert again.seconds == pytest.approx(products.seconds * 4 / 3)
    shape = "(1, 8, 4096, 128) causal bfloat16"
    forward = limits["attention forward", shape].amount
    assert forward == 4 * 8 * 4096**2 * 128 / 2
    passes = [limits[f"attention {which} gradient", shape] for which in ("query", "key")]
    assert sum(limit.amount for limit in passes) == forward * 7 / 2
    assert sum(limit.seconds for limit in passes) == pytest.approx(152.2e-6, rel=1e-3)


def test_the_document_does_not_list_its_rows():
    used = FITS._replace(warnings=("it is slow",))._asdict()
    rows = [
        report.Row("sm_90", "attention forward", "m 128, n 64, 8 warps", "4 L S D", used, []),
        report.Row("gfx942", "attention forward", "m 64, n 64, 4 warps", "4 L S D", used, []),
        report.Row("gfx942", "attention backward", "m 64, 4 warps", "6 L S D", None, ["oh"]),
    ]
    document = report.document(rows, "3.7.1")
    assert "Triton 3.7.1" in document
    assert "| attention forward | m 128, n 64, 8 warps | 64 | 1 | 8 (50%) | 4 mma |" in document
    assert "sm_90: it is slow, in 1 of these kernels, as attention forward." in document
    assert report.listed(document) == {row[:3] for row in rows}


@pytest.fixture(scope="module")
def whole_report(tmp_path_factory):
    """(The command's exit status, the kernels)."""

    def make(folder):
        result = python("-m", "fastgpt.backends.triton.report", "--json", folder / "report.json")
        assert result.stderr == ""
        (folder / "status").write_text(str(result.returncode))

    folder = made_once(tmp_path_factory, "triton-report", make)
    report = json.loads((folder / "report.json").read_text())
    return int((folder / "status").read_text()), report["kernels"]


@pytest.mark.slow
def test_a_stored_kernel_spills_does_not_fit_or_lacks_its_instructions(whole_report):
    status, kernels = whole_report
    complaints = "\n".join(complaint for kernel in kernels for complaint in kernel["complaints"])
    assert status == 0, complaints
    assert complaints == ""


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    "path",
    [
        "cross-entropy forward",
        "cross-entropy backward",
        "linear cross-entropy backward",
        "attention forward",
        "attention query gradient",
        "attention key gradient",
        "attention mask gradient",
    ],
)
def test_a_path_of_some_type_is_not_compiled_ahead_of_time(whole_report, chip, path):
    names = [kernel["kernel"] for kernel in whole_report[1] if kernel["chip"] == chip]
    for dtype in ("bfloat16", "float32", "float64"):
        assert any(name.startswith(f"{path} {dtype}") for name in names), (dtype, names)


@pytest.mark.slow
def test_the_document_is_not_of_todays_kernels(whole_report):
    today = {(k["chip"], k["kernel"], k["configuration"]) for k in whole_report[1]}
    assert report.listed(DOCUMENT.read_text()) == today, (
        "run `python -m fastgpt.backends.triton.report --markdown docs/triton.md`"
    )


@pytest.mark.slow
def test_oldest_triton(tmp_path):
    if os.environ.get("FASTGPT_TEST_OLDEST_TRITON") != "1":
        pytest.skip("FASTGPT_TEST_OLDEST_TRITON=1 downloads Triton 3.6")
    folder = tmp_path / "packages"
    install = ["-m", "pip", "install", "--no-deps", "--target", folder, "triton==3.6.0"]
    result = python(*install)
    assert result.returncode == 0, result.stderr
    result = python("-m", "fastgpt.backends.triton.report", "--chip", "sm_90", path=[folder])
    assert result.returncode == 0, result.stdout + result.stderr
    assert "compiled with Triton 3.6.0, 0 complaints" in result.stdout
