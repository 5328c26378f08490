"""`make gpu` where no GPU is: its refusal, and its stages with commands of other kinds."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, gpu_check
from benchmarks.gpu import Outcome, Stage
from fastgpt import dispatch

ROOT = Path(__file__).parent.parent
MEMCHECK = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "device")))


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def code(text: str) -> tuple[str, ...]:
    return (sys.executable, "-c", text)


@pytest.fixture(autouse=True)
def capability(monkeypatch):
    """Of a GPU that is not asked: each time would be a process that loads torch."""
    asked = gpu._capability
    monkeypatch.setattr(gpu, "_capability", lambda: (9, 0))
    return asked


# ---- the check ----


def test_a_machine_without_a_gpu_is_not_told_so():
    ended = python("-m", "benchmarks.gpu", "--quick", CUDA_VISIBLE_DEVICES="")
    assert ended.returncode != 0
    assert "no GPU to test on: torch" in ended.stderr
    assert "summary" not in ended.stdout


def test_a_torch_for_cpus_is_blamed_on_the_driver(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert "build for the CPU only" in gpu_check.missing()


def test_a_missing_driver_is_blamed_on_torch(monkeypatch):
    def init():
        raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: None)
    reason = gpu_check.missing()
    assert "sees no GPU: Found no NVIDIA driver" in reason
    assert "nvidia-smi" in reason
    assert "\n" not in reason


def test_a_gpu_that_torch_was_not_built_for_is_accepted(monkeypatch):
    def ones(*args, **kwargs):
        raise RuntimeError("CUDA error: no kernel image is available")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90"])
    monkeypatch.setattr(torch, "ones", ones)
    assert re.search(
        "GPU is there, but .* sm_90, can't run on it: .*no kernel", gpu_check.missing()
    )


# ---- the stages ----


def test_a_failed_or_cut_stage_stops_the_later_ones(tmp_path):
    start = time.monotonic()
    outcomes = gpu.run(
        [
            Stage("slow", 3, (code("import time; time.sleep(100)"),)),
            Stage("bad", 60, (code("print('why it failed'); raise SystemExit(3)"),)),
            Stage("absent", 0, (code(""),), left_out="its tool is not there"),
            Stage("hopeless", 0, (code(""),), unable="pytest is not installed"),
            Stage("good", 60, (code("print('it ran')"),)),
        ],
        tmp_path,
    )
    assert time.monotonic() - start < 30
    states = ["cut", "failed", "left out", "unable", "passed"]
    assert [outcome.state for outcome in outcomes] == states
    assert "it ran" in (tmp_path / "good.log").read_text()
    text = gpu.summary(outcomes)
    for shown in ("why it failed", "status 3", "its tool is not there", "pytest is not installed"):
        assert shown in text, shown
    assert "not good: slow, bad, hopeless" in text
    assert [outcome.good for outcome in outcomes] == [False, False, True, False, True]


def test_a_cut_stage_leaves_processes_or_loses_its_report(tmp_path):
    """What it started is ended too; what it prints when it is interrupted is kept."""
    child = tmp_path / "child"
    text = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
open({str(child)!r}, "w").write(str(child.pid))
try:
    time.sleep(100)
except KeyboardInterrupt:
    print("what there is")
    raise SystemExit(1)
"""
    (outcome,) = gpu.run([Stage("slow", 4, (code(text),))], tmp_path)
    assert outcome.state == "cut"
    assert outcome.seconds < 20
    assert "what there is" in (tmp_path / "slow.log").read_text()
    process = Path(f"/proc/{child.read_text()}/stat")
    time.sleep(0.2)
    assert not process.exists() or process.read_text().split()[2] == "Z"


def test_time_that_a_stage_leaves_is_lost(tmp_path, capsys):
    gpu.run([Stage("short", 30, (code(""),)), Stage("next", 30, (code(""),))], tmp_path)
    limits = re.findall(r"at most (\d+) s", capsys.readouterr().out)
    assert limits[0] == "30"
    assert int(limits[1]) > 50


def test_a_stage_runs_beyond_the_deadline(tmp_path):
    start = time.monotonic()
    sleep = (code("import time; time.sleep(100)"),)
    outcomes = gpu.run([Stage("a", 100, sleep), Stage("b", 100, sleep)], tmp_path, start + 6)
    assert [outcome.state for outcome in outcomes] == ["cut", "cut"]
    # Each stage may take twice its grace to end, interrupted and then killed.
    assert time.monotonic() - start < 6 + 4 * gpu.GRACE


def test_commands_of_a_stage_run_one_after_another(tmp_path):
    waiting = code("import time; time.sleep(8)")
    (outcome,) = gpu.run([Stage("both", 90, (waiting, waiting))], tmp_path)
    assert outcome.state == "passed"
    assert outcome.seconds < 16  # one after the other would take longer
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both-1.log", "both-2.log"]


def test_a_stage_runs_in_the_users_settings(tmp_path, monkeypatch):
    for name in gpu.UNSET:
        monkeypatch.setenv(name, "1")
    text = f"import os; print([n for n in {gpu.UNSET} if n in os.environ], os.environ['MINE'])"
    gpu.run([Stage("env", 30, (code(text),), {"MINE": "yes"})], tmp_path)
    assert "[] yes" in (tmp_path / "env.log").read_text()


def test_what_pytest_skipped_or_failed_is_not_in_the_summary(tmp_path):
    (tmp_path / "test_some.py").write_text(
        """
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2
def test_absent(): pytest.skip("needs two GPUs")
"""
    )
    command = next(gpu.TestFile(str(tmp_path / "test_some.py")).commands(quick=False))
    (outcome,) = gpu.run([Stage("tests", 60, (command,))], tmp_path)
    assert outcome.state == "failed"
    text = gpu.summary([outcome])
    assert "1 failed, 1 passed, 1 skipped" in text
    assert "needs two GPUs" in text
    assert "test_bad" in text


def test_no_stage_that_failed_makes_the_command_fail(monkeypatch, tmp_path, capsys):
    def fake(state):
        return lambda stages, deadline: [Outcome(Stage("s", 1), state, 0.1)]

    check = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(gpu.subprocess, "run", lambda *a, **k: check)
    for state, status in (("passed", 0), ("left out", 0), ("failed", 1), ("cut", 1), ("unable", 1)):
        monkeypatch.setattr(gpu, "run", fake(state))
        assert gpu.main([]) == status, state
        assert state.upper() in capsys.readouterr().out


# ---- what the stages are ----


def test_the_budgets_exceed_ten_or_three_minutes():
    """With some seconds for the check before them."""
    assert sum(stage.budget for stage in gpu.stages(quick=False)) <= 580
    assert sum(stage.budget for stage in gpu.stages(quick=True)) <= 174


def test_a_missing_package_is_not_mentioned(monkeypatch):
    monkeypatch.setattr(gpu, "_has", lambda module: False)
    for name in gpu.OPTIONAL:
        assert f"{name} is not installed: " in gpu.absent()
    tests = [stage for stage in gpu.stages(quick=False) if "tests" in stage.name]
    assert len(tests) == 2
    assert all(stage.unable == "pytest is not installed" for stage in tests)

    monkeypatch.setattr(gpu, "_has", lambda module: module != "hypothesis")
    monkeypatch.setattr(gpu, "_imports", lambda path, module: path.name == "test_attention.py")
    ordinary = gpu.stages(quick=False)[3]
    assert "tests/test_attention.py left out: hypothesis is not installed" in ordinary.notes
    run = {argument for command in ordinary.commands for argument in command}
    assert "tests/test_attention.py" not in run
    assert "tests/test_cross_entropy.py" in run


def test_a_missing_sanitizer_is_a_failure_or_silent(monkeypatch):
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: None)
    (stage,) = (stage for stage in gpu.stages(quick=False) if stage.name == "sanitizers")
    assert stage.left_out == "compute-sanitizer is not on PATH"


def test_the_sanitizers_check_too_little(monkeypatch, tmp_path):
    """Memory of both backends, races of CUDA's own; what either finds is a failure and shown."""
    tool = tmp_path / "compute-sanitizer"
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: str(tool))
    (stage,) = (stage for stage in gpu.stages(quick=False) if stage.name == "sanitizers")
    checked = {
        (command[command.index("--tool") + 1], command[command.index("--backend") + 1])
        for command in stage.commands
    }
    assert checked == {("memcheck", "triton"), ("memcheck", "native"), ("racecheck", "native")}
    for command in stage.commands:
        assert command[command.index("--error-exitcode") + 1] == "1"
        assert Path(command[command.index(sys.executable) + 1]).exists()
    tool.write_text(
        """#!/bin/sh
case "$2" in memcheck) echo "========= ERROR SUMMARY: 0 errors"; exit 0;; esac
echo "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"
exit 1
"""
    )
    tool.chmod(0o755)
    (outcome,) = gpu.run([stage], tmp_path / "logs")
    assert outcome.state == "failed"
    assert "RACECHECK SUMMARY: 1 hazard displayed" in gpu.summary([outcome])
    (stage,) = (stage for stage in gpu.stages(quick=True) if stage.name == "sanitizers")
    assert stage.left_out == "not in the quick run"


# ---- the install ----


def test_the_install_takes_another_architecture_than_the_gpus(monkeypatch):
    for found, wanted in {
        (8, 0): "8.0",
        (8, 6): "8.0",
        (8, 9): "8.0",
        (9, 0): "9.0a",
        (10, 0): "8.0+PTX",
        (12, 0): "8.0+PTX",
    }.items():
        monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
        monkeypatch.setattr(gpu, "_capability", lambda found=found: found)
        install = gpu.stages(quick=False)[0]
        assert install.environment == {
            "FASTGPT_CUDA": "1",
            "FASTGPT_FORCE_BUILD": "1",
            "TORCH_CUDA_ARCH_LIST": wanted,
        }
        assert f"CUDA kernels for {wanted}" in install.notes
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a")
        asked = gpu.stages(quick=False)[0].environment["TORCH_CUDA_ARCH_LIST"]
        assert asked == "8.0;9.0a", "what the user asked for is not built"


def test_a_torch_without_cuda_is_asked_for_its_kernels(monkeypatch):
    """ROCm's has a GPU, too."""
    monkeypatch.setattr(gpu, "_capability", lambda: None)
    install = gpu.stages(quick=False)[0]
    assert "FASTGPT_CUDA" not in install.environment
    assert install.notes == ("without CUDA kernels",)


def test_the_gpu_is_not_asked_what_it_is(capability, monkeypatch):
    """In a process of its own, whose torch here is a fake or has no GPU to see."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert capability() is None

    def answering(text):
        def run(command, **options):
            assert options["capture_output"]
            return subprocess.CompletedProcess(command, 0 if text else 1, stdout=text)

        return run

    for text, found in (("8 9\n", (8, 9)), ("", None), ("\n", None), (None, None)):
        monkeypatch.setattr(gpu.subprocess, "run", answering(text))
        assert capability() == found


def test_the_reason_why_the_cuda_part_was_not_built_is_not_in_the_summary(tmp_path):
    """pip indents what the build printed, and ends with lines that say nothing."""
    lines = [
        "  Building editable for fastgpt (pyproject.toml): finished with status 'error'",
        "      error: FASTGPT_CUDA=1 could not be met. No CUDA toolkit was found.",
        "      [end of output]",
        *[f"  note: {number}" for number in range(6)],
    ]
    failed = code(f"print({chr(10).join(lines)!r}); raise SystemExit(1)")
    (outcome,) = gpu.run([Stage("install in place", 30, (failed,))], tmp_path)
    assert outcome.state == "failed"
    assert "error: FASTGPT_CUDA=1 could not be met. No CUDA toolkit" in gpu.summary([outcome])


def test_a_file_of_device_tests_is_run_by_no_stage():
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "tests/device").glob("test_*.py")}
    assert {test.path for test in gpu.DEVICE_TESTS} == files
    assert all((ROOT / test.path).exists() for test in gpu.ORDINARY_TESTS)


@pytest.mark.slow
def test_a_run_takes_nothing_of_a_file():
    """Of each -k expression, whether it holds for any test of its file."""
    files = gpu.DEVICE_TESTS + gpu.ORDINARY_TESTS
    command = ("-m", "pytest", "--collect-only", "-q", "-m", "not slow")
    listed = python(*command, *(tests.path for tests in files)).stdout.splitlines()

    def holds(expression: str, name: str) -> bool:
        word = r"\b(?!(?:and|or|not)\b)\w+"
        return eval(re.sub(word, lambda found: str(found[0].lower() in name.lower()), expression))

    for tests in files:
        names = [line for line in listed if line.startswith(f"{tests.path}::")]
        for expression in filter(None, (tests.full, tests.quick)):
            assert any(holds(expression, name) for name in names), tests
    assert next(gpu.DEVICE_TESTS[0].commands(quick=True))[-2:] == ("-m", "not slow")


# ---- the tests of the device, without one ----


def test_device_tests_vanish_silently_or_can_not_be_imported():
    ended = python("-m", "pytest", "-q", "tests/device", CUDA_VISIBLE_DEVICES="")
    assert ended.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, ended.stdout
    (count,) = re.findall(r"(\d+) device tests were left out: torch sees no GPU", ended.stdout)
    assert f"{count} deselected" in ended.stdout
    listed = python("-m", "pytest", "-q", "tests/device", "--collect-only", CUDA_VISIBLE_DEVICES="")
    assert listed.returncode == 0, listed.stdout
    assert f"{count} tests collected" in listed.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "choice"),
    [
        (
            "cross_entropy",
            "strides or ignored or (smoothing and 130) or (exact and 1025) or in_place",
        ),
        ("attention", "group or hidden or (exact and bfloat16 and 80) or (mask and bool)"),
        ("cuda_attention", "bfloat16 and (64 or 33) or layout or view"),
        ("execution", "eager"),
        ("large", "wrong"),
    ],
)
def test_a_device_test_that_needs_only_its_kernels_fails(file, choice):
    """In the interpreter, so only its own mistakes and the kernels' arithmetic show."""
    ended = python(
        *("-m", "pytest", "-q", f"tests/device/test_device_{file}.py"),
        *("-k", choice, "-m", "not slow"),
        FASTGPT_TEST_DEVICE="cpu",
        TRITON_INTERPRET="1",
        CUDA_VISIBLE_DEVICES="",
    )
    assert ended.returncode == 0, ended.stdout
    assert re.search(r"\d+ passed", ended.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_the_script_for_the_memory_checker_is_broken(backend):
    """On the CPU, where `native` has other kernels of the same names."""
    code = f"import memcheck; memcheck.main('cpu', ['{backend}'])"
    interpret = {"TRITON_INTERPRET": "1"} if backend == "triton" else {}
    ended = python("-c", code, PYTHONPATH=MEMCHECK, **interpret)
    assert ended.stdout.strip() == f"the kernels of {backend} ran", ended.stderr


def test_the_memory_checker_checks_another_backend_than_it_says():
    """Not only of an op that is asked for: here Triton runs nothing without its interpreter."""
    code = "import memcheck; memcheck.rows('triton', 'cpu')"
    ended = python("-c", code, PYTHONPATH=MEMCHECK, CUDA_VISIBLE_DEVICES="")
    assert ended.returncode != 0
    assert "AssertionError: cross_entropy on cpu runs on native" in ended.stderr


def test_a_gpu_without_the_native_kernels_skips_their_tests(tmp_path):
    """With a torch that says there is a GPU, and a build that has left them out. The reason is in
    the summary.
    """
    test = code(
        """
import pytest, torch
torch.cuda.is_available = lambda: True
from fastgpt import dispatch
key = ("cross_entropy", "native", "cuda")
dispatch.register(dispatch.Cell(*key, "it was not built"))
choice = "(native and (bits or leaks)) or (columns_lead and 65 and matrix and bfloat16)"
file = "tests/device/test_device_cross_entropy.py"
raise SystemExit(pytest.main(["-q", "-rsfE", "-p", "no:cacheprovider", file, "-k", choice]))
"""
    )
    (outcome,) = gpu.run([Stage("tests", 120, (test,), {"CUDA_VISIBLE_DEVICES": ""})], tmp_path)
    text = gpu.summary([outcome])
    assert outcome.state == "failed"
    assert "3 errors" in text
    assert text.count("Failed: cross_entropy is off on native: it was not built") >= 3, text


# ---- the backends of the ordinary tests ----


@pytest.mark.parametrize(
    ("gpu", "reason", "found"), [(True, "", True), (True, "off", False), (False, "", False)]
)
def test_cudas_kernels_are_in_the_lists_where_they_can_not_run(monkeypatch, gpu, reason, found):
    import backends

    key = ("cross_entropy", "native", "cuda")
    monkeypatch.setitem(dispatch.TABLE, key, dispatch.Cell(*key, reason))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    listed = backends.on_cuda()
    assert [repr(backend) for backend in listed] == (["cuda"] if found else [])
    assert all((b.name, b.device) == ("native", "cuda") for b in listed)


def test_cudas_kernels_are_asked_for_another_op():
    import backends

    def item(file: str, **params: object) -> SimpleNamespace:
        return SimpleNamespace(path=Path(file), callspec=SimpleNamespace(params=params))

    cuda = backends.Backend("native", device="cuda")
    assert backends.limited_as_twin(item("tests/test_attention.py", n=3, kernel=cuda))
    assert not backends.limited_as_twin(item("tests/test_attention.py", kernel=backends.NATIVE[-1]))
    assert not backends.limited_as_twin(item("tests/test_attention.py", kernel=backends.TRITON))
    assert not backends.limited_as_twin(item("tests/test_cross_entropy.py", kernel=cuda))
    assert not backends.limited_as_twin(SimpleNamespace(path=Path("test_info.py")))


def test_a_part_of_the_tests_is_in_no_shard(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n@pytest.mark.parametrize('i', range(5))\ndef test_some(i): pass\n"
    )
    found = []
    for number in (1, 2, 3):
        shard = ("-p", "benchmarks.shard", "--shard", f"{number}/3", "--rootdir", str(tmp_path))
        ended = python("-m", "pytest", "-v", *shard, str(tmp_path / "test_some.py"))
        assert ended.returncode == 0, ended.stdout
        found += re.findall(r"\[(\d)\] PASSED", ended.stdout)
    assert sorted(found) == list("01234")
    shard = ("-p", "benchmarks.shard", "--shard", "6/6", "--rootdir", str(tmp_path))
    ended = python("-m", "pytest", *shard, str(tmp_path / "test_some.py"))
    assert ended.returncode == 0, "a part without a test is no failure"
    ended = python("-m", "pytest", *shard, str(tmp_path / "test_some.py"), "-k", "nothing")
    assert ended.returncode != 0, "a selection without a test is one"
