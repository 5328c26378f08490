"""Which backend runs a call: preferences, environment, explanations, and a missing extension."""

import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import interpreter
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import fastgpt
from fastgpt import dispatch
from fastgpt.backends import cuda, extensions, hopper, measured, native
from fastgpt.backends.measured import Measurement
from fastgpt.ops import cross_entropy as cross_entropy_op
from fastgpt.ops import cross_entropy_direct

LOGITS = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.5, -1.0]])
TARGET = torch.tensor([2, 0])


def chosen(**options) -> str:
    return fastgpt.explain(fastgpt.cross_entropy, LOGITS, TARGET, **options).backend


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter that finds the package under test."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FASTGPT_")}
    inherited["PYTHONPATH"] = str(Path(fastgpt.__file__).parent.parent)
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_native_extension_is_not_built():
    """Without it every other test of a kernel would test nothing."""
    assert native.extension is not None, native._reason
    assert native.isa() == native.isas()[-1] or os.environ.get("FASTGPT_CPU_ISA")
    assert native.isas()[0] == "scalar"


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is installed on Linux only")
def test_triton_is_off_where_it_can_run():
    """Without it the tests of its kernels are skipped."""
    for op in ("cross_entropy", "scaled_dot_product_attention"):
        assert dispatch.lookup(op, "triton", "cpu" if interpreter.ON else "cuda").reason == ""


# ---- fastgpt.backend ----


def test_the_fastest_backend_is_not_the_default():
    assert chosen() == os.environ.get("FASTGPT_BACKEND", "native")


def test_preferences_do_not_nest():
    default = chosen()
    with fastgpt.backend("eager"):
        assert chosen() == "eager"
        with fastgpt.backend("native"):
            assert chosen() == "native"
            with fastgpt.backend("eager"):
                assert chosen() == "eager"
            assert chosen() == "native"
        assert chosen() == "eager"
    assert chosen() == default


def test_a_preference_outlives_an_exception():
    default = chosen()
    with pytest.raises(KeyError), fastgpt.backend("eager"):
        raise KeyError(chosen())
    assert chosen() == default


def test_a_preference_reaches_another_thread():
    default, seen = chosen(), []
    with fastgpt.backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
    assert seen == [default]


@pytest.mark.parametrize("name", ["Native", "cuda", "", None])
def test_an_unknown_backend_is_accepted(name):
    with pytest.raises(ValueError, match="expected one of 'native', 'triton', 'eager'"):  # noqa: SIM117
        with fastgpt.backend(name):
            pass
    assert chosen() == "native"


def test_an_unavailable_backend_is_accepted_or_gives_no_reason(monkeypatch):
    cell = dispatch.Cell("cross_entropy", "triton", "cuda", "no GPU in this machine")
    for key in [key for key in dispatch.TABLE if key[1] == "triton"]:
        monkeypatch.delitem(dispatch.TABLE, key)
    with pytest.raises(RuntimeError, match=r"'triton' is off: not implemented.*fastgpt\.info"):  # noqa: SIM117
        with fastgpt.backend("triton"):
            pass
    monkeypatch.setitem(dispatch.TABLE, ("cross_entropy", "triton", "cuda"), cell)
    with pytest.raises(RuntimeError, match="no GPU in this machine"):  # noqa: SIM117
        with fastgpt.backend("triton"):
            pass
    assert chosen() == "native"


# ---- explain ----


def test_explain_hides_a_decision():
    with fastgpt.backend("eager"):
        explanation = fastgpt.explain(fastgpt.cross_entropy, LOGITS, TARGET)
    text = str(explanation)
    assert text.startswith("cross_entropy on cpu runs on eager")
    assert "native: the backend 'eager' was asked for" in text
    assert [d.backend for d in explanation.decisions] == list(dispatch.BACKENDS)
    assert explanation.decisions[-1].reason == ""
    assert str(fastgpt.explain(fastgpt.cross_entropy, LOGITS, TARGET)) == (
        "cross_entropy on cpu runs on native"
    )


def test_explain_knows_fewer_functions_than_it_says():
    sequence = torch.zeros(2, 4, 8)
    for function in (fastgpt.cross_entropy, F.cross_entropy):
        assert fastgpt.explain(function, LOGITS, TARGET).op == "cross_entropy"
    for module in (fastgpt.CrossEntropyLoss(), torch.nn.CrossEntropyLoss()):
        assert fastgpt.explain(module, LOGITS, TARGET).backend == "native"
    everything = fastgpt.CrossEntropyLoss(weight=torch.ones(3), label_smoothing=0.1)
    assert fastgpt.explain(everything, LOGITS, TARGET).backend == "native"
    mistaken = fastgpt.CrossEntropyLoss(weight=torch.ones(4))
    with pytest.raises(RuntimeError, match="weight tensor"):
        fastgpt.explain(mistaken, LOGITS, TARGET)
    for function in (fastgpt.scaled_dot_product_attention, F.scaled_dot_product_attention):
        explanation = fastgpt.explain(function, sequence, sequence, sequence)
        assert explanation.op == "scaled_dot_product_attention"
        assert explanation.backend == "native"
        explanation = fastgpt.explain(function, sequence, sequence[:, :0], sequence[:, :0])
        assert "native: an empty key" in str(explanation)
    with pytest.raises(TypeError, match="expected cross_entropy"):
        fastgpt.explain(torch.softmax, LOGITS, 1)


def test_explain_accepts_what_the_call_would_refuse():
    with pytest.raises(ValueError, match="batch_size"):
        fastgpt.explain(fastgpt.cross_entropy, LOGITS, TARGET[:1])
    with pytest.raises(TypeError):
        fastgpt.explain(fastgpt.cross_entropy, LOGITS)


@pytest.mark.parametrize(
    ("logits", "target", "rule"),
    [
        (torch.zeros(2, 3, 4, 8)[..., ::2].mT, torch.zeros(2, 4, 4).long(), "strides"),
        (torch.zeros(2, 0), torch.full((2,), -100), "no classes"),
        (LOGITS, LOGITS.softmax(1).double(), "probabilities of type torch.float64"),
        (LOGITS.to(torch.float8_e4m3fn), TARGET, "logits of type torch.float8_e4m3fn"),
    ],
)
def test_a_rule_is_not_named(logits, target, rule):
    explanation = fastgpt.explain(fastgpt.cross_entropy, logits, target)
    assert explanation.backend == "eager"
    assert f"native: {rule}" in str(explanation)


def test_explain_runs_the_kernel():
    """It answers from shapes and types: a target out of range is no concern of it."""
    assert fastgpt.explain(fastgpt.cross_entropy, LOGITS, TARGET + 50).backend == "native"


@pytest.mark.skipif(not interpreter.ON, reason="Triton compiles its kernels on this machine")
def test_the_interpreter_runs_unasked_or_explain_does_not_say_so():
    tokens = torch.zeros(1, 2, 3, 4)
    for function, call, probabilities in (
        (fastgpt.cross_entropy, (LOGITS, TARGET), (LOGITS, LOGITS.softmax(1).double())),
        (fastgpt.scaled_dot_product_attention, (tokens,) * 3, (tokens, tokens, tokens[..., :0])),
    ):
        explanation = fastgpt.explain(function, *probabilities)
        assert explanation.backend == "eager"
        reasons = dict(explanation.decisions)
        assert reasons["triton"] == (
            "its interpreter runs only when asked for, by fastgpt.backend('triton')"
        )
        with fastgpt.backend("triton"):
            assert fastgpt.explain(function, *call).backend == "triton"
            assert fastgpt.explain(function, *probabilities).backend == "eager"
        assert fastgpt.explain(function, *call).backend == "native"


# ---- instruction sets ----


def test_an_unknown_instruction_set_is_accepted():
    before = native.isa()
    with pytest.raises(ValueError, match="cannot run the instruction set 'mmx'"):
        native.extension.set_isa("mmx")
    with pytest.raises(TypeError):
        native.extension.set_isa(3)
    assert native.isa() == before


def test_instruction_sets_disagree():
    """Not bit by bit: their registers differ in width, so their sums differ in order."""
    logits = torch.randn(9, 1000, generator=torch.Generator().manual_seed(0))
    target = torch.arange(9)
    previous, losses = native.isa(), []
    try:
        for isa in native.isas():
            native.extension.set_isa(isa)
            assert native.isa() == isa
            losses.append(fastgpt.cross_entropy(logits, target, reduction="none"))
    finally:
        native.extension.set_isa(previous)
    for loss in losses:
        torch.testing.assert_close(loss, losses[0], rtol=1e-6, atol=0)


# ---- the environment ----

SHOW = """
import torch, fastgpt
from fastgpt.backends import cuda, measured, native
from fastgpt.backends.measured import Measurement
from fastgpt.ops import cross_entropy as cross_entropy_op
from fastgpt.ops import cross_entropy_direct
explanation = fastgpt.explain(fastgpt.cross_entropy, torch.zeros(2, 3), torch.zeros(2).long())
loss = fastgpt.cross_entropy(torch.zeros(2, 3), torch.zeros(2).long())
assert abs(loss.item() - 1.0986123) < 1e-6
print(explanation.backend, native.isa())
"""


def test_fastgpt_backend_is_ignored_or_final():
    """It is the default; a `with` block comes before it."""
    inside = "with fastgpt.backend('native'):\n" + textwrap.indent(SHOW, "    ")
    shown = python(SHOW + inside, FASTGPT_BACKEND="eager")
    assert shown.returncode == 0, shown.stderr
    default, preferred = shown.stdout.splitlines()
    assert default.split()[0] == "eager"
    assert preferred.split()[0] == "native"


@pytest.mark.parametrize(
    ("value", "error"),
    [("cuda", "ValueError: FASTGPT_BACKEND: expected one of"),
     ("triton", "RuntimeError: FASTGPT_BACKEND: the backend 'triton' is off")],
)  # fmt: skip
def test_a_fastgpt_backend_that_cannot_run_is_ignored(value, error):
    if value == "triton" and not interpreter.ON:
        pytest.skip("triton runs on this machine")
    shown = python(SHOW, FASTGPT_BACKEND=value)
    assert shown.returncode != 0
    assert error in shown.stderr


def test_fastgpt_cpu_isa_is_ignored():
    for isa in {native.isas()[0], native.isas()[-1]}:
        shown = python(SHOW, FASTGPT_CPU_ISA=isa)
        assert shown.returncode == 0, shown.stderr
        assert shown.stdout.split() == ["native", isa]


def test_an_unknown_fastgpt_cpu_isa_is_ignored():
    shown = python(SHOW, FASTGPT_CPU_ISA="sse9")
    assert shown.returncode != 0
    assert "ValueError: FASTGPT_CPU_ISA: expected one of 'scalar'" in shown.stderr


def test_fastgpt_backend_does_not_reach_the_interpreter():
    pytest.importorskip("triton")
    shown = python(SHOW, FASTGPT_BACKEND="triton", TRITON_INTERPRET="1")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.split()[0] == "triton"


# ---- without Triton, or without what it needs ----

CHANGES = {
    "nothing": "",
    "no triton": "hidden = 'triton'",
    "no numpy": "hidden = 'numpy'",
    "an old triton": "versions = {'triton': '3.5.1'}",
    "an old pytorch-triton": "versions = {'pytorch-triton': '3.5.1+git', 'triton': None}",
    "CUDA": "cuda = '13.0'",
}
PRETEND = """
import importlib.machinery, importlib.metadata, json, warnings
hidden, versions, cuda = None, {{}}, None
{change}
find, version = importlib.machinery.PathFinder.find_spec, importlib.metadata.version
def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] == hidden else find(name, path, target)
def pretended_version(name):
    if name in versions and versions[name] is None:
        raise importlib.metadata.PackageNotFoundError(name)
    return versions.get(name) or version(name)
importlib.machinery.PathFinder.find_spec = find_spec
importlib.metadata.version = pretended_version
warnings.filterwarnings("ignore", "Failed to initialize NumPy")
import torch
torch.version.cuda = cuda
import fastgpt
implemented = ("cross_entropy", "scaled_dot_product_attention")
cells = [c for c in fastgpt.info().cells if c["backend"] == "triton" and c["op"] in implemented]
loss = fastgpt.cross_entropy(torch.zeros(2, 3), torch.zeros(2).long())
assert abs(loss.item() - 1.0986123) < 1e-6
refused = ""
try:
    with fastgpt.backend("triton"):
        pass
except RuntimeError as error:
    refused = str(error)
print(json.dumps({{
    "reasons": {{d: [c["reason"] for c in cells if c["device"] == d] for d in ("cpu", "cuda")}},
    "refused": refused,
    "text": str(fastgpt.info()),
}}))
"""
ASK = "Triton runs on a CPU only in its interpreter, for tests: set TRITON_INTERPRET=1"
UNSET = "TRITON_INTERPRET is set, and the interpreter is slower than eager: unset it"
MISSING = "Triton is not installed: run `pip install triton`"
OLD = "Triton {} is older than 3.6: run `pip install -U triton`"


@pytest.mark.parametrize(
    ("change", "interpreted", "cpu", "cuda"),
    [
        ("nothing", False, ASK, f"torch {torch.__version__} is a build without CUDA and ROCm"),
        ("nothing", True, "", UNSET),
        ("CUDA", False, ASK, ""),
        ("no triton", False, MISSING, MISSING),
        ("no triton", True, MISSING, MISSING),
        ("no numpy", False, ASK, f"torch {torch.__version__} is a build without CUDA and ROCm"),
        ("no numpy", True, "Triton's interpreter needs NumPy: run `pip install numpy`", UNSET),
        ("an old triton", True, OLD.format("3.5.1"), OLD.format("3.5.1")),
        ("an old pytorch-triton", False, OLD.format("3.5.1+git"), OLD.format("3.5.1+git")),
    ],
)
def test_the_reason_why_triton_is_off_is_wrong_or_not_told(change, interpreted, cpu, cuda):
    if change not in ("no triton", "nothing"):
        pytest.importorskip("triton")
    environment = {"TRITON_INTERPRET": "1"} if interpreted else {}
    shown = python(PRETEND.format(change=CHANGES[change]), **environment)
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert found["reasons"] == {"cpu": [cpu] * 2, "cuda": [cuda] * 2}
    if cpu and cuda:
        assert cpu in found["refused"]
        assert cuda in found["refused"]
    else:
        assert not found["refused"]
    assert all(reason in found["text"] for reason in (cpu, cuda))


# ---- without the extension ----

HIDE = """
import sys, importlib.abc
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "fastgpt._C":
            raise {error}
sys.meta_path.insert(0, Hide())
"""
AFTER = """
import json
import torch, fastgpt
x, t = torch.randn(4, 5, requires_grad=True), torch.arange(4)
loss = fastgpt.cross_entropy(x, t)
loss.backward()
assert torch.allclose(loss, torch.nn.functional.cross_entropy(x, t))
with fastgpt.drop_in():
    torch.nn.functional.cross_entropy(x, t)
try:
    with fastgpt.backend("native"):
        raise SystemExit("native was accepted")
except RuntimeError as error:
    refused = str(error)
information = fastgpt.info()
cells = {(c["op"], c["backend"], c["device"]): c for c in information.cells}
print(json.dumps({
    "backend": fastgpt.explain(fastgpt.cross_entropy, x, t).backend,
    "why": str(fastgpt.explain(fastgpt.cross_entropy, x, t)),
    "cell": cells["cross_entropy", "native", "cpu"],
    "isa": information.isa,
    "refused": refused,
    "text": str(information),
}))
"""


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("ModuleNotFoundError('hidden', name=name)", "the extension has not been built"),
        (
            "ImportError('undefined symbol: aoti_torch_x')",
            "the extension does not load (undefined symbol: aoti_torch_x)",
        ),
    ],
)
def test_the_package_does_not_work_without_its_extension(error, reason):
    shown = python(HIDE.format(error=error) + AFTER)
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert found["backend"] == "eager"
    assert not found["cell"]["available"]
    assert found["isa"] is None
    for text in (found["why"], found["refused"], found["text"], found["cell"]["reason"]):
        assert reason in text


def test_the_reason_of_a_failed_build_is_lost():
    """The installation records why; the record, not the guess, is what `info` shows."""
    record = """
from pathlib import Path
original = Path.read_text
def read_text(self, *args, **kwargs):
    if self.name == "_build.json":
        return '{"C": {"reason": "no C++ compiler: install g++"}}'
    return original(self, *args, **kwargs)
Path.read_text = read_text
"""
    shown = python(record + AFTER)
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert found["backend"] == "eager"
    assert found["cell"]["reason"] == "no C++ compiler: install g++"
    assert "no C++ compiler: install g++" in found["refused"]


# ---- the CUDA kernels, on GPUs that are not there ----

H200 = (9, 0)
ASK = "runs on {} only when asked for, by fastgpt.backend('native'): "
UNMEASURED = "no stored measurement says that it is faster there than Triton"


def measurement(chip="sm_90", ratio=1.2, date="2026-11-24", op="cross_entropy"):
    return Measurement(op, chip, "a GPU", date, "db4a743", ratio, [])


@pytest.fixture
def gpu(monkeypatch):
    """Make such a GPU device 0, and the CUDA kernels and Triton's available on it."""

    def make(*stored, capability=H200, triton=True, reason=""):
        monkeypatch.setattr(cuda, "capability", lambda device: capability)
        for name, its in (
            ("native", cuda.cell(reason, stored)),
            ("triton", dispatch.Cell("cross_entropy", "triton", "cuda", "" if triton else "gone")),
        ):
            monkeypatch.setitem(dispatch.TABLE, ("cross_entropy", name, "cuda"), its)

    return make


def explain_on_gpu(shape=(2, 3), dtype=torch.bfloat16):
    with FakeTensorMode():
        logits = torch.empty(shape, device="cuda", dtype=dtype)
        target = torch.empty(shape[:1] + shape[2:], device="cuda", dtype=torch.int64)
        explanation = fastgpt.explain(fastgpt.cross_entropy, logits, target)
    return explanation.backend, dict(explanation.decisions)["native"]


@pytest.mark.parametrize(
    ("stored", "capability", "reason"),
    [
        ([], H200, ASK.format("sm_90") + UNMEASURED),
        ([measurement(op="linear_cross_entropy")], H200, ASK.format("sm_90") + UNMEASURED),
        ([measurement("sm_80")], H200, ASK.format("sm_90") + UNMEASURED),
        ([measurement("sm_80")], (8, 6), ASK.format("sm_86") + UNMEASURED),
        ([measurement()], None, ASK.format("a GPU that is not there") + UNMEASURED),
        (
            [measurement(ratio=1.0)],
            H200,
            ASK.format("sm_90") + "measured there it takes 1 times Triton's time (2026-11-24)",
        ),
        (
            [measurement(ratio=0.77, date="2026-11-25"), measurement()],
            H200,
            ASK.format("sm_90") + "measured there it takes 1.3 times Triton's time (2026-11-25)",
        ),
    ],
)
def test_a_cuda_kernel_runs_unasked_where_it_was_not_measured_faster(
    gpu, stored, capability, reason
):
    gpu(*stored, capability=capability)
    assert explain_on_gpu() == ("triton", reason)
    with fastgpt.backend("native"):
        assert explain_on_gpu() == ("native", "")
    with fastgpt.backend("eager"):
        assert explain_on_gpu() == ("eager", "the backend 'eager' was asked for")


def test_a_faster_cuda_kernel_must_be_asked_for(gpu):
    gpu(measurement(ratio=0.5, date="2026-11-23"), measurement(ratio=1.01))
    assert explain_on_gpu() == ("native", "")
    assert explain_on_gpu((2, 3, 4)) == ("native", "")
    with fastgpt.backend("triton"):
        assert explain_on_gpu()[0] == "triton"


def test_the_environment_does_not_ask_for_a_cuda_kernel(gpu, monkeypatch):
    gpu()
    monkeypatch.setattr(dispatch, "_default", "native")
    assert explain_on_gpu() == ("native", "")


def test_a_kernel_that_has_never_run_replaces_a_missing_triton(gpu):
    gpu(triton=False)
    assert explain_on_gpu() == ("eager", ASK.format("sm_90") + UNMEASURED)


def test_a_slower_kernel_is_passed_over_for_eager(gpu, monkeypatch):
    gpu(measurement(ratio=0.5), triton=False)
    assert explain_on_gpu() == ("native", "")
    rows_only = dispatch.Cell("cross_entropy", "triton", "cuda", "", lambda call: "strides")
    monkeypatch.setitem(dispatch.TABLE, ("cross_entropy", "triton", "cuda"), rows_only)
    assert explain_on_gpu() == ("native", "")


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((7, 5), torch.bfloat16, "its compute capability, 7.5, is older than 8.0"),
        ((8, 0), torch.bfloat16, ""),
        ((12, 0), torch.bfloat16, ""),
        (None, torch.bfloat16, ""),
        (H200, torch.float8_e4m3fn, "logits of type torch.float8_e4m3fn"),
    ],
)
def test_a_cuda_kernel_is_asked_for_what_it_can_not_do(gpu, capability, dtype, reason):
    gpu(measurement(), capability=capability)
    with fastgpt.backend("native"):
        assert explain_on_gpu(dtype=dtype) == ("eager" if reason else "native", reason)


def test_a_missing_cuda_extension_is_not_explained(gpu):
    gpu(measurement(), reason="nvcc is on fire")
    assert explain_on_gpu() == ("triton", "nvcc is on fire")


ATTENTION = "scaled_dot_product_attention"


@pytest.fixture
def attention_explained(monkeypatch):
    """What `explain` says of a call on such a GPU, with these measurements stored."""

    def explain(
        *stored, capability=H200, dtype=torch.bfloat16, head_dim=64, value_dim=64, **options
    ):
        monkeypatch.setattr(cuda, "capability", lambda device: capability)
        triton = dispatch.Cell(ATTENTION, "triton", "cuda", "")
        cells = {"native": cuda.cell("", stored, ATTENTION), "triton": triton}
        for name, its in cells.items():
            monkeypatch.setitem(dispatch.TABLE, (ATTENTION, name, "cuda"), its)
        with FakeTensorMode():
            columns = (head_dim, head_dim, value_dim)
            inputs = [torch.empty(1, 2, 5, n, device="cuda", dtype=dtype) for n in columns]
            options = {name: make() for name, make in options.items()}
            return fastgpt.explain(fastgpt.scaled_dot_product_attention, *inputs, **options)

    return explain


@pytest.fixture
def attention_on_gpu(attention_explained):
    """The backend, and why it is not the native one."""

    def explain(*stored, **options):
        found = attention_explained(*stored, **options)
        return found.backend, dict(found.decisions)["native"]

    return explain


def test_cuda_attention_runs_unasked_where_it_was_not_measured_faster(attention_on_gpu):
    refusal = ("triton", ASK.format("sm_90") + UNMEASURED)
    assert attention_on_gpu() == refusal
    assert attention_on_gpu(measurement()) == refusal  # of cross-entropy
    assert attention_on_gpu(measurement(op=ATTENTION)) == ("native", "")
    with fastgpt.backend("native"):
        assert attention_on_gpu() == ("native", "")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, ""),
        ({"dtype": torch.float16, "head_dim": 80, "value_dim": 33}, ""),
        ({"head_dim": 256, "value_dim": 256}, ""),
        ({"dtype": torch.float32}, "query of type torch.float32: only bfloat16 and float16"),
        ({"head_dim": 257}, "a head_dim of 257 in query, above 256"),
        ({"value_dim": 264}, "a head_dim of 264 in value, above 256"),
        ({"attn_mask": lambda: torch.empty(5, 5, device="cuda", dtype=torch.bool)}, "an attn_mask"),
        ({"is_causal": lambda: True, "softcap": lambda: 30.0, "window": lambda: (3, -1)}, ""),
    ],
)
def test_cuda_attention_is_asked_for_what_it_can_not_do(attention_on_gpu, changed, reason):
    with fastgpt.backend("native"):
        backend, said = attention_on_gpu(**changed)
    assert (backend == "native", said) == (not reason, reason)


SLOWER = measurement(op=hopper.entry("forward", 64), ratio=0.8)
NEWEST = "by Hopper's kernels (not compared with Ampere's)"
UNCOMPARED = f"forward {NEWEST}, backward {NEWEST}"
WIDE = {"head_dim": 136, "value_dim": 136}
NO_ROOM = "backward by Ampere's kernels (Hopper's take no options at width 256)"


@pytest.mark.parametrize(
    ("stored", "options", "kernels"),
    [
        ([], {}, UNCOMPARED),
        ([SLOWER], {"head_dim": 128}, UNCOMPARED),
        (
            [SLOWER],
            {},
            "forward by Ampere's kernels (Hopper's take 1.25 times their time, 2026-11-24), "
            f"backward {NEWEST}",
        ),
        ([SLOWER._replace(chip="sm_80")], {}, UNCOMPARED),
        ([], {"capability": (8, 0)}, "by Ampere's kernels, the only ones on sm_80"),
        ([], {"capability": (10, 0)}, "by Ampere's kernels, the only ones on sm_100"),
        ([], {"value_dim": 33}, "by Ampere's kernels: TMA copies no rows of 33 columns"),
        ([], {"head_dim": 12}, "by Ampere's kernels: TMA copies no rows of 12 columns"),
        ([], WIDE, UNCOMPARED),
        ([], {**WIDE, "softcap": lambda: 30.0}, f"forward {NEWEST}, {NO_ROOM}"),
        ([], {**WIDE, "scale": lambda: -1.0}, f"forward {NEWEST}, {NO_ROOM}"),
        ([], {"softcap": lambda: 30.0}, UNCOMPARED),
        ([], {"capability": None}, ""),
    ],
)
def test_the_generation_of_attentions_kernels_is_explained_as_another(
    attention_explained, monkeypatch, stored, options, kernels
):
    monkeypatch.setattr(cuda, "built_for_hopper", lambda: True)
    with fastgpt.backend("native"):
        found = attention_explained(*stored, **options)
    assert found.kernels == kernels
    assert str(found) == f"{ATTENTION} on cuda runs on native{', ' * bool(kernels)}{kernels}"


def test_the_generation_of_one_backend_is_told_of_another(attention_explained):
    assert attention_explained().backend == "triton"
    assert attention_explained().kernels == ""


def test_a_build_without_hoppers_code_is_said_to_run_it(attention_explained, monkeypatch):
    record = {"cuda_targets": ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a"]}
    monkeypatch.setattr(extensions, "build_record", lambda: record)
    with fastgpt.backend("native"):
        assert attention_explained().kernels == UNCOMPARED
        record["cuda_targets"] = ["arch=compute_80,code=compute_80", "arch=compute_90,code=sm_90"]
        told = "by Ampere's kernels: built without code for 9.0a"
        assert attention_explained().kernels == told
        record.clear()
        assert attention_explained().kernels == told


def test_a_stored_measurement_chooses_no_generation_at_import():
    """With an extension that only notes what its operator is told."""
    stored = [
        measurement(op=hopper.entry("forward", 64), ratio=0.8),
        measurement(op=hopper.entry("backward", 128), ratio=0.9, date="2026-11-23"),
        measurement(op=hopper.entry("backward", 128), ratio=1.2),
        measurement("sm_80", op=hopper.entry("forward", 128), ratio=0.5),
    ]
    files = {"measured.json": json.dumps([m._asdict() for m in stored]), "_build.json": "{}"}
    code = f"""
import sys, types
from pathlib import Path
import torch
original = Path.read_text
files = {files!r}
Path.read_text = lambda self, *a, **k: files.get(self.name) or original(self, *a, **k)
sys.modules["fastgpt._cuda"] = types.ModuleType("fastgpt._cuda")
told = {{}}
name, kind = "hopper_passes", "CompositeExplicitAutograd"
library = torch.library.Library("fastgpt_settings", "DEF")
library.define(name + "(int width, bool forward, bool backward) -> ()")
library.impl(name, lambda width, *on: told.update({{width: on}}), kind)
import fastgpt
print(told)
"""
    shown = python(code)
    assert shown.returncode == 0, shown.stderr
    on = dict.fromkeys(hopper.WIDTHS, (True, True))
    assert shown.stdout.strip() == str(on | {64: (False, True)})


def test_a_gpu_that_is_not_there_is_asked_for_its_capability():
    absent = torch.device("cuda", torch.cuda.device_count())
    assert cuda.capability(absent) is None
    assert cuda.unserved(absent) == ""


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_the_rule_of_the_cuda_kernels_breaks_a_compiled_graph(gpu, compiled, ratio):
    gpu(measurement(ratio=ratio), triton=False)
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits = torch.empty(2, 3, device="cuda")
        target = torch.empty(2, device="cuda", dtype=torch.int64)
        assert compiled(fastgpt.cross_entropy)(logits, target).device == logits.device


def test_the_stored_measurements_do_not_parse():
    generations = {hopper.entry(*key) for key in hopper.NONE}
    for stored in measured.read():
        assert stored.op in {"cross_entropy", "scaled_dot_product_attention", *generations}
        assert re.fullmatch(r"sm_\d+", stored.chip)
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", stored.date)
        assert stored.ratio > 0
        assert stored.gpu
        assert stored.commit
        assert stored.shapes


# ---- the native backend's operators ----


@pytest.fixture(scope="module")
def recorder():
    """A namespace whose kernels are fastgpt's, and the names of those that have run."""
    namespace, ran = "fastgpt_recorder", []
    launcher = cross_entropy_op.define(namespace)
    cross_entropy_direct.define(namespace)

    def register(name):
        def kernel(*arguments):
            ran.append(name)
            return getattr(torch.ops.fastgpt, name)(*arguments)

        torch.library.impl(f"{namespace}::{name}", "CPU", kernel)

    for which in ("forward", "backward", "backward_in_place", "reduced", "reduced_backward"):
        register(f"cross_entropy_{which}")
    return launcher, ran


@pytest.mark.parametrize(
    ("options", "forward", "backward"),
    [
        ({}, "reduced", "reduced_backward"),  # the shortcut
        ({"label_smoothing": 0.1}, "reduced", "reduced_backward"),
        ({"softcap": 5.0}, "forward", "backward"),
        ({"inplace_backward": True}, "forward", "backward_in_place"),
    ],
    ids=str,
)
def test_a_native_call_leaves_the_namespace_of_its_launcher(
    recorder, monkeypatch, options, forward, backward
):
    launcher, ran = recorder
    logits = LOGITS.clone().requires_grad_()
    expected = fastgpt.cross_entropy(logits * 1, TARGET, **options)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    monkeypatch.setitem(cross_entropy_op.LAUNCHERS, "native", launcher)
    ran.clear()
    loss = fastgpt.cross_entropy(logits * 1, TARGET, **options)
    assert ran == [f"cross_entropy_{forward}"]
    if forward == "reduced":  # the backward stays where its forward was
        monkeypatch.undo()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert ran == [f"cross_entropy_{forward}", f"cross_entropy_{backward}"]
    assert torch.equal(loss, expected)
    assert torch.equal(gradient, expected_gradient)


def test_the_second_derivative_leaves_the_namespace_of_the_launcher(recorder, monkeypatch):
    launcher, ran = recorder
    monkeypatch.setitem(cross_entropy_op.LAUNCHERS, "native", launcher)
    ran.clear()
    logits = LOGITS.clone().requires_grad_()
    loss = fastgpt.cross_entropy(logits, TARGET)
    torch.autograd.grad(loss, logits, create_graph=True)
    assert ran == ["cross_entropy_reduced", "cross_entropy_backward"]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_fake_tensors_have_no_native_kernel(reduction):
    target = torch.zeros(2, 4).long()
    with FakeTensorMode() as mode:
        logits = torch.zeros(2, 3, 4).mT.contiguous().mT.bfloat16().requires_grad_()
        loss = fastgpt.cross_entropy(logits, mode.from_tensor(target), reduction=reduction)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.shape == (target.shape if reduction == "none" else ())
    assert (loss.dtype, gradient.dtype) == (torch.bfloat16,) * 2
    assert (gradient.shape, gradient.stride()) == (logits.shape, logits.stride())
