"""Everything that needs a GPU, in stages with a time budget each: `make gpu`, `make gpu-quick`.

It installs in place without a network, runs the device tests, the kernels' ordinary tests on the
device and NVIDIA's checkers of memory and of races, and measures. A stage that overruns its budget
is cut and reported, and the later ones still run; what a stage leaves of its budget, the next ones
may use. The logs are in build/gpu/, the measurements in benchmarks/results/. It ends with a
summary, and with an error if a stage failed, was cut or could not run.
"""

import argparse
import contextlib
import importlib.util
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOGS = ROOT / "build" / "gpu"
GRACE = 5.0  # of its budget, the seconds that a stage has to end itself when it is cut

# What would make the stages test or measure something else than an ordinary user's run.
UNSET = ("TRITON_INTERPRET", "FASTGPT_BACKEND", "FASTGPT_AUTOTUNE", "FASTGPT_TEST_DEVICE")
# The tests run under torch's deterministic mode, in which cuBLAS wants the first. In the last,
# pytest's lines find room for the reason why a test failed.
SET = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1", "COLUMNS": "250"}

OPTIONAL = {
    "pytest": "no test can run without it",
    "numpy": "tests that compare with NumPy fail without it",
    "hypothesis": "test files that import it are left out",
    "matplotlib": "the charts are left out",
    "liger_kernel": "its rows are left out of the comparison",
    "quack": "its rows are left out of the comparison",
    "cut_cross_entropy": "its rows are left out of the comparison",
}


@dataclass(frozen=True)
class Stage:
    name: str
    budget: float  # seconds
    commands: tuple[tuple[str, ...], ...] = ()  # run side by side
    environment: Mapping[str, str] = field(default_factory=dict)
    left_out: str = ""  # why the stage is not run, which is no failure
    unable: str = ""  # why it can't be run, which is one
    notes: tuple[str, ...] = ()  # what of it is left out
    print_log: bool = False


@dataclass(frozen=True)
class Outcome:
    stage: Stage
    state: str  # "passed", "failed", "cut", "left out" or "unable"
    seconds: float
    details: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        return self.state in ("passed", "left out")


# ---- running ----


def run(stages: Sequence[Stage], logs: Path = LOGS, deadline: float = math.inf) -> list[Outcome]:
    """Run the stages one after another; none beyond the deadline, of time.monotonic()."""
    logs.mkdir(parents=True, exist_ok=True)
    outcomes, saved = [], 0.0
    for stage in stages:
        limit = min(stage.budget + saved, max(0.0, deadline - time.monotonic()))
        if stage.left_out or stage.unable:
            outcome = Outcome(
                stage,
                "unable" if stage.unable else "left out",
                0.0,
                (stage.unable or stage.left_out,),
            )
        else:
            print(f"-- {stage.name} (at most {limit:.0f} s)", flush=True)
            outcome = _run(stage, limit, logs)
        saved = max(0.0, limit - outcome.seconds)
        print(_line(outcome).splitlines()[0], flush=True)
        outcomes.append(outcome)
    return outcomes


def _run(stage: Stage, limit: float, logs: Path) -> Outcome:
    start = time.monotonic()
    environment = {k: v for k, v in os.environ.items() if k not in UNSET}
    environment |= {**SET, **stage.environment}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(ROOT), environment.get("PYTHONPATH")))
    )
    slug = re.sub(r"\W+", "-", stage.name)
    files = [
        logs / (f"{slug}.log" if len(stage.commands) == 1 else f"{slug}-{number}.log")
        for number in range(1, len(stage.commands) + 1)
    ]
    processes = []
    for command, file in zip(stage.commands, files, strict=True):
        with file.open("w") as log:
            log.write(f"$ {shlex.join(command)}\n")
            log.flush()
            processes.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # so that what it started ends with it
                )
            )
    cut = False
    try:
        for process in processes:
            process.wait(max(0.0, start + max(limit - GRACE, limit / 2) - time.monotonic()))
    except subprocess.TimeoutExpired:
        cut = True
    finally:
        _end(processes)
    state = "cut" if cut else "failed" if any(p.returncode for p in processes) else "passed"
    texts = [file.read_text(errors="replace") for file in files]
    details = [*stage.notes, *_counts(texts)]
    for process, file, text in zip(processes, files, texts, strict=True):
        details += _details(process.returncode, file, text.splitlines())
    if stage.print_log:
        print("\n".join(texts), flush=True)
    return Outcome(stage, state, time.monotonic() - start, tuple(dict.fromkeys(details)))


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """Interrupt what still runs, so that it can report what it has; then end it, and whatever any
    of them started and left.
    """
    for process in processes:
        if process.poll() is None:
            _signal(process, signal.SIGINT)
    end = time.monotonic() + 0.8 * GRACE
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen, number: signal.Signals) -> None:
    """To the session that the process leads."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _counts(logs: Sequence[str]) -> list[str]:
    """pytest's counts, of all logs together."""
    total: Counter[str] = Counter()
    for log in logs:
        for line in re.findall(
            r"^[= ]*(\d+ [a-z]+(?:, \d+ [a-z]+)*) in [\d.]+s", log, re.MULTILINE
        ):
            for number, what in re.findall(r"(\d+) ([a-z]+)", line):
                total[what] += int(number)
    del total["deselected"]
    return (
        [", ".join(f"{number} {what}" for what, number in sorted(total.items()))] if total else []
    )


def _details(status: int, log: Path, lines: Sequence[str]) -> list[str]:
    """What a reader of the end must see; on a failure where to look, and the last lines."""
    telling = (
        r"(SKIPPED|FAILED|ERROR|=+ (ERROR|RACECHECK) SUMMARY:) |"
        r".*(: left out: |no report: |red gate: |no chart: )| *error: "
    )
    found = [line for line in lines if re.match(telling, line)]
    found += [line for line in lines if re.fullmatch(r"/.*\.(json|png)", line)]
    if status == 0:
        return found
    where = log.relative_to(ROOT) if log.is_relative_to(ROOT) else log
    if len(found) > 12:
        found = [*found[:12], f"... and {len(found) - 12} more lines"]
    ended = f"status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
    return [*found, f"{where}: {ended}", *(f"  {line}" for line in lines[-6:])]


def _line(outcome: Outcome) -> str:
    return "\n".join(
        [
            f"{outcome.state.upper():8} {outcome.seconds:6.1f} s  {outcome.stage.name}",
            *(f"{'':20}{detail}" for detail in outcome.details),
        ]
    )


def summary(outcomes: Sequence[Outcome]) -> str:
    total = sum(outcome.seconds for outcome in outcomes)
    bad = [outcome.stage.name for outcome in outcomes if not outcome.good]
    verdict = f"not good: {', '.join(bad)}" if bad else "all stages that ran passed"
    return "\n".join(["", "== summary", *map(_line, outcomes), f"{total:.0f} s; {verdict}"])


# ---- the stages ----


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def absent() -> str:
    """Which optional packages are not there, and what is left out for want of them."""
    lines = [f"{name} is not installed: {why}" for name, why in OPTIONAL.items() if not _has(name)]
    return "\n".join(lines) or "every optional package is installed"


@dataclass(frozen=True)
class TestFile:
    """Tests, run in so many processes side by side. `full` and `quick` are -k expressions for what
    either run takes of them: empty for all, None for nothing.
    """

    path: str
    processes: int = 1
    full: str = ""
    quick: str | None = ""

    def commands(self, quick: bool) -> Iterator[tuple[str, ...]]:
        choice = self.quick if quick else self.full
        if choice is None:
            return
        processes = max(1, min(self.processes, (os.cpu_count() or 1) * 2 // 3))
        for number in range(1, processes + 1):
            # Side by side, so without the cache that they would share.
            command = [sys.executable, "-m", "pytest", "-q", "-rsfE", "-p", "no:cacheprovider"]
            command += [argument for known in WARNINGS for argument in ("-W", known)]
            command += ["-p", "benchmarks.shard", "--shard", f"{number}/{processes}"]
            command += [self.path, *(("-k", choice) if choice else ())]
            if quick or "device" not in self.path:
                command += ["-m", "not slow"]
            yield tuple(command)


# The tests make errors of warnings; of the machine's torch, Triton and Python, these are not ours.
WARNINGS = (
    "default::DeprecationWarning",
    "default::FutureWarning",
    "default:Please use the new API settings to control TF32:UserWarning",
    "default:Failed to initialize NumPy:UserWarning",
)

DEVICE_TESTS = (
    TestFile(
        "tests/device/test_device_attention.py",
        10,
        quick="test_an_output_or_gradient and bfloat16 and not 80",
    ),
    TestFile(
        "tests/device/test_device_cuda_attention.py",
        2,
        quick="exact and causal and (64 or 128) and bfloat16 or do_not_run",
    ),
    TestFile(
        "tests/device/test_device_cross_entropy.py",
        5,
        quick="test_a_loss_or_gradient and (1000 or 50257) and (bfloat16 or float32)",
    ),
    TestFile(
        "tests/device/test_device_execution.py",
        3,
        quick="default or graph or stream or waits or eager",
    ),
    TestFile("tests/device/test_device_compile.py", 3, quick="plain_loss"),
    TestFile("tests/device/test_device_memory.py"),
    TestFile("tests/device/test_device_large.py", 2, quick="rows or columns"),
    TestFile("tests/device/test_device_processes.py", quick="out_of_range_is_not and 5000"),
)

# The kernels' own tests, whose Triton cases run on a GPU where there is one, and those of CUDA's
# kernels of cross-entropy. Attention has kernels to compile for each type, head_dim and mask, too
# many for the time: `pytest -k "triton or cuda"` runs all.
ORDINARY_TESTS = (
    TestFile(
        "tests/test_cross_entropy.py",
        5,
        "triton or cuda",
        "(triton or cuda) and error and (1024 or 50257) and (bfloat16 or float32)",
    ),
    TestFile(
        "tests/test_attention.py",
        7,
        "triton and not float32 and (practice or correlated or grouped or masked or hidden)",
        "triton and practice and bfloat16",
    ),
    TestFile(
        "tests/test_cross_entropy_autograd.py",
        2,
        "triton or cuda",
        "(triton or cuda) and second_derivatives",
    ),
    TestFile(
        "tests/test_attention_autograd.py",
        4,
        "triton and (finite_differences or opcheck or second_backward or recompile)",
        None,
    ),
)


def _imports(path: Path, module: str) -> bool:
    return bool(re.search(rf"^(import|from) {module}\b", path.read_text(), re.MULTILINE))


def _tests(name: str, budget: float, files: Sequence[TestFile], quick: bool) -> Stage:
    if not _has("pytest"):
        return Stage(name, budget, unable="pytest is not installed")
    notes = []
    if quick:
        notes.append("the quick run takes a part of them")
    elif any(file.full for file in files):
        notes.append("a part of them; without a limit of time: pytest -k 'triton or cuda'")
    if not _has("hypothesis"):
        left_out = [file for file in files if _imports(ROOT / file.path, "hypothesis")]
        files = [file for file in files if file not in left_out]
        notes += [f"{file.path} left out: hypothesis is not installed" for file in left_out]
    commands = tuple(command for file in files for command in file.commands(quick))
    unable = "" if files else "; ".join(notes)
    return Stage(name, budget, commands, notes=tuple(notes), unable=unable)


def _capability() -> tuple[int, int] | None:
    """Of the GPU; None where torch is no CUDA build. Another process asks, and its memory on the
    GPU is free again.
    """
    code = (
        "import torch; print(*torch.cuda.get_device_capability() if torch.version.cuda and "
        "torch.cuda.is_available() else ())"
    )
    asked = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    found = (asked.stdout or "").split()
    return (int(found[0]), int(found[1])) if len(found) == 2 else None


def _install(budget: float) -> Stage:
    """With CUDA kernels, which must be built, for this GPU alone unless others are asked for."""
    pip = (sys.executable, "-m", "pip", "install", "--no-index", "--no-deps")
    command = (*pip, "--no-build-isolation", "--disable-pip-version-check", "-e", ".")
    capability = _capability()
    if capability is None:
        return Stage("install in place", budget, (command,), notes=("without CUDA kernels",))
    environment = {"FASTGPT_CUDA": "1", "FASTGPT_FORCE_BUILD": "1"}
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST") or _architecture(capability)
    environment["TORCH_CUDA_ARCH_LIST"] = wanted
    notes = (f"CUDA kernels for {wanted}",)
    return Stage("install in place", budget, (command,), environment, notes=notes)


def _architecture(capability: tuple[int, int]) -> str:
    """What the kernels are compiled for to run on it. Code for 9.0a runs on 9.0 only; that of 8.0
    on every 8.x; and of later GPUs' the drivers make their own, from PTX.
    """
    if capability == (9, 0):
        return "9.0a"
    return "8.0" if capability[0] == 8 else "8.0+PTX"


def _sanitizer(quick: bool, budget: float) -> Stage:
    """The memory checker over the kernels of both backends; that of races, which takes longer, over
    CUDA's own.
    """
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    folders = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    tool = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    script = (sys.executable, str(ROOT / "tests" / "device" / "memcheck.py"))

    def command(check: str, *arguments: str) -> tuple[str, ...]:
        options = ("--tool", check, "--error-exitcode", "1")
        where = ("--target-processes", "application-only")
        return (tool or "", *options, *where, *script, *arguments)

    commands = [
        command("memcheck", "--backend", "triton"),
        command("memcheck", "--backend", "native"),
        command("racecheck", "--backend", "native"),
    ]
    left_out = ""
    if quick:
        left_out = "not in the quick run"
    elif tool is None:
        left_out = "compute-sanitizer is not on PATH"
    # Each tensor from the driver: in the allocator's large blocks, one may reach into the next.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Stage("sanitizers", budget, tuple(commands), environment, left_out=left_out)


def _benchmark(op: str, quick: bool, budget: float, a_shape: float) -> Stage:
    """`a_shape`: seconds of rounds for each."""
    report = (sys.executable, "-m", "benchmarks.report", "--device", "cuda", "--op", op)
    # The start and the last file take a few seconds of the budget.
    options = ["--seconds", f"{budget - 10:.0f}", "--budget", f"{a_shape:g}"]
    if not quick:
        options.append("--long")
    name = f"benchmark of {op.replace('_', '-')}"
    return Stage(name, budget, ((*report, *options),), print_log=True)


def stages(quick: bool) -> list[Stage]:
    """Their budgets add up to less than 10 minutes, and to less than 3 for the quick run."""

    def budget(full: float, short: float) -> float:
        return short if quick else full

    return [
        _install(budget(120, 65)),
        Stage(
            "fastgpt.info",
            budget(10, 9),
            ((sys.executable, "-m", "fastgpt.info"),),
            print_log=True,
        ),
        _tests("device tests", budget(120, 31), DEVICE_TESTS, quick),
        _tests("ordinary tests on the GPU", budget(80, 13), ORDINARY_TESTS, quick),
        _sanitizer(quick, budget(40, 0)),
        _benchmark("cross_entropy", quick, budget(100, 20), budget(2.5, 1.5)),
        _benchmark("attention", quick, budget(65, 18), budget(3, 1.5)),
        _benchmark("linear_cross_entropy", quick, budget(45, 18), budget(3, 1.5)),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="in under 3 minutes, not 10")
    quick = parser.parse_args(arguments).quick
    start = time.monotonic()
    check = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check"], cwd=ROOT, stdout=None, stderr=None
    )
    if check.returncode != 0:
        return check.returncode
    print(without := absent())
    outcomes = run(stages(quick), deadline=start + (178 if quick else 598))
    print(summary(outcomes))
    print(f"{without}\n{time.monotonic() - start:.0f} s in all")
    return 0 if all(outcome.good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
