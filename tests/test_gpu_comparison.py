"""The benchmarks' comparison on a GPU, with a clock and tensors of the CPU in its place."""

import dataclasses
import importlib.util
import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import fastgpt
from benchmarks import UnavailableError, compare, gates, peers, report, roofline, timing
from benchmarks.peers import Provider
from benchmarks.shapes import (
    CUDA_CROSS_ENTROPY,
    CUDA_LINEAR_CROSS_ENTROPY,
    SHAPES,
    AttentionShape,
    CrossEntropyShape,
    LinearCrossEntropyShape,
)


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = time.perf_counter()

    def elapsed_time(self, end):
        return max(end.time - self.time, 1e-6) * 1e3


@pytest.fixture
def fake_cuda(monkeypatch):
    """torch.cuda as far as the comparison uses it; its calls, by name."""
    calls = []
    fakes = {
        "Event": Event,
        "synchronize": lambda: calls.append("synchronize"),
        "_sleep": lambda cycles: calls.append("sleep"),
        "empty_cache": lambda: None,
        "mem_get_info": lambda: (1 << 30, 1 << 30),
        "reset_peak_memory_stats": lambda: None,
        "memory_stats": lambda: {
            "requested_bytes.all.current": 100,
            "requested_bytes.all.peak": 612,
        },
        "current_device": lambda: 0,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1 << 20),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    cache = SimpleNamespace(zero_=lambda: calls.append("cache"))
    monkeypatch.setattr(timing, "_cold_cache", lambda: cache)
    monkeypatch.setattr(timing, "_cycles_per_second", lambda: 1e9)
    return calls


class OnCpu:
    """A shape that says it is on the GPU, with its tensors on the CPU."""

    def inputs(self):
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return type(self).__mro__[2](**{**fields, "device": "cpu"}).inputs()

    def floor(self):
        raise UnavailableError("no GPU")


class Loss(OnCpu, CrossEntropyShape):
    pass


class Attention(OnCpu, AttentionShape):
    pass


class Linear(OnCpu, LinearCrossEntropyShape):
    pass


LOSS = Loss("small", 24, 50, torch.float32, "", device="cuda")
ATTENTION = Attention(
    "small", 2, 4, 2, 20, 20, 8, True, torch.float32, "", fused_qkv=True, device="cuda"
)

LINEAR = Linear("small", 24, 16, 50, torch.float32, "", goal=2.5, ignored=0.5, device="cuda")


class _Destroyer(torch.autograd.Function):
    """Writes the gradient over its input in the forward."""

    @staticmethod
    def forward(ctx, x, target):
        loss = F.cross_entropy(x, target)
        gradient = torch.softmax(x, 1) - F.one_hot(target, x.shape[1])
        x.detach().copy_(gradient / len(x))
        ctx.gradient = x.detach()
        return loss

    @staticmethod
    def backward(ctx, g):
        return ctx.gradient * g, None


def unavailable(shape):
    raise UnavailableError("not installed")


def set_providers(monkeypatch, op, *providers):
    monkeypatch.setitem(peers.PROVIDERS, (op, "cuda"), providers)


def test_a_peer_that_destroys_its_input_spoils_the_others(fake_cuda, monkeypatch):
    set_providers(
        monkeypatch,
        "cross_entropy",
        Provider("destroyer", lambda shape: _Destroyer.apply, destroys=True),
        Provider(peers.FASTGPT, lambda shape: fastgpt.cross_entropy),
        Provider(peers.EAGER, lambda shape: F.cross_entropy),
        Provider("absent", unavailable),
        Provider("wrong", lambda shape: lambda x, t: F.cross_entropy(x, t) * 1.01),
    )
    found = compare.compare(LOSS, budget=0, rounds=(3, 3))
    for name in ("destroyer", peers.FASTGPT, peers.EAGER):
        row = found.row(name)
        assert not row.reason, row
        assert len(row.seconds["full"]) == len(row.host_seconds) == 3
        assert row.peak_bytes == 512
        # Right each time it was gated, and fed each time with the logits and not their gradient.
        assert row.errors["loss"] < 1e-5
    assert found.row("absent").reason == "not installed"
    assert found.row("wrong").red
    assert "cache" in fake_cuda
    assert "sleep" in fake_cuda


def test_the_inputs_that_a_peer_destroyed_stay_destroyed(fake_cuda):
    original = LOSS.inputs()
    own = original.copied()
    losses = []

    def recorded(x, target):
        loss = _Destroyer.apply(x, target)
        losses.append(loss.item())
        return loss

    timing.CudaRunner(recorded, own, lambda: own.restore(original))()
    assert len(losses) > 4
    assert set(losses) == {F.cross_entropy(*original.arguments).item()}


def test_the_gpu_is_timed_while_it_waits_for_python(fake_cuda):
    """It sleeps before the timed calls, and each of those has a cold cache."""
    inputs = LOSS.inputs()
    runner = timing.CudaRunner(F.cross_entropy, inputs, seconds=1e-9)
    runner()
    fake_cuda.clear()
    forward, backward, host = runner()
    assert fake_cuda == ["synchronize", "synchronize", "sleep", "cache", "synchronize"]
    assert min(forward, backward, host) > 0


def test_the_tables_and_files_of_a_gpu_are_not_written(fake_cuda, monkeypatch, tmp_path, capsys):
    set_providers(
        monkeypatch,
        "attention",
        Provider(peers.FASTGPT, lambda shape: fastgpt.scaled_dot_product_attention),
        Provider(peers.EAGER, lambda shape: F.scaled_dot_product_attention),
        Provider("SDPA flash", unavailable),
    )
    found = compare.compare(ATTENTION, budget=0, rounds=(3, 3))
    header, _, *rows = compare.markdown(found).splitlines()
    assert header.endswith("| host |")
    assert len({row.count("|") for row in (header, *rows)}) == 1
    assert any(row.startswith("| SDPA flash | not installed |") for row in rows)
    where = {"device": "cuda", "gpu": "Some GPU", "driver": "1", "triton": "3.6", "torch": "2.11"}
    report._write("attention", [found], where, tmp_path)
    suffixes = {path.suffix: path for path in tmp_path.iterdir()}
    assert set(suffixes) == {".json", ".png"}
    assert all(path.stem.endswith("-attention-cuda") for path in suffixes.values())
    (comparison,) = json.loads(suffixes[".json"].read_text())["comparisons"]
    assert comparison["shape"]["device"] == "cuda"

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    report._write("attention", [found], where, tmp_path / "bare")
    assert [path.suffix for path in (tmp_path / "bare").iterdir()] == [".json"]
    assert "no chart: matplotlib is not installed" in capsys.readouterr().out


def install(monkeypatch, package, module, **functions):
    """A package as a peer has it, of such functions."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name if name == package else find(name)
    )
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**functions))


def test_a_peer_of_linear_cross_entropy_is_called_otherwise_than_it_is_written(
    fake_cuda, monkeypatch, capsys
):
    """All providers of a GPU on the CPU, with packages that take arguments as Liger's and Apple's
    do; one of them leaves the small gradients out, as Apple's does by default.
    """

    def liger(input, weight, target, bias=None, ce_weight=None, ignore_index=-100):
        return F.cross_entropy(input @ weight.t(), target, ce_weight, ignore_index=ignore_index)

    def apple(e, c, targets, bias=None, ignore_index=-100, impl="cce"):
        assert ignore_index == -100
        logits = e @ c.t()
        if impl == "cce":
            logits.register_hook(lambda g: g.where(g.abs() > 0.005, 0))
        else:
            assert impl == "cce_exact"
        return F.cross_entropy(logits, targets)

    functional = "liger_kernel.transformers.functional"
    install(monkeypatch, "liger_kernel", functional, liger_fused_linear_cross_entropy=liger)
    install(monkeypatch, "cut_cross_entropy", "cut_cross_entropy", linear_cross_entropy=apple)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    found = compare.compare(LINEAR, budget=0, rounds=(3, 3))
    for provider in peers.CUDA_LINEAR_CROSS_ENTROPY:
        row = found.row(provider.name)
        if provider.name == "Apple CCE":
            assert row.red
            assert row.errors["others' weight"] > 1e-3
        elif provider.name == peers.CHUNKED and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            assert "has none" in row.reason
        else:
            assert not row.reason, row
            assert len(row.seconds["full"]) == 3
    assert "÷ fastgpt: " in compare.headline(found)
    assert "goal 2.5" in compare.headline(found)
    header, _, *rows = compare.markdown(found).splitlines()
    assert len({row.count("|") for row in (header, *rows)}) == 1
    json.dumps(found.as_json())


def test_the_better_of_torchs_two_is_the_worse(fake_cuda, monkeypatch):
    def slow(*arguments):
        time.sleep(0.02)
        return peers.matmul_cross_entropy(*arguments)

    own = [
        Provider(peers.FASTGPT, lambda shape: fastgpt.linear_cross_entropy),
        Provider(peers.EAGER, lambda shape: slow),
        Provider(peers.CHUNKED, lambda shape: peers.matmul_cross_entropy),
    ]
    set_providers(monkeypatch, "linear_cross_entropy", *own)
    found = compare.compare(LINEAR, budget=0, rounds=(3, 3))
    assert found.better_of_torch() == (peers.CHUNKED, found.ratio(peers.CHUNKED, "full"))
    # Without the chunked op, the whole one is the better.
    own[2] = Provider(peers.CHUNKED, unavailable)
    set_providers(monkeypatch, "linear_cross_entropy", *own)
    found = compare.compare(LINEAR, budget=0, rounds=(3, 3))
    assert found.better_of_torch()[0] == peers.EAGER


def test_a_loss_alone_is_timed_or_gated_with_its_gradients(fake_cuda, monkeypatch):
    shape = dataclasses.replace(LINEAR, training=False)
    set_providers(
        monkeypatch,
        "linear_cross_entropy",
        Provider(peers.FASTGPT, lambda shape: fastgpt.linear_cross_entropy),
        Provider(peers.RECOMPUTE, peers._recompute),
        Provider(peers.EAGER, lambda shape: peers.matmul_cross_entropy),
        Provider("wrong", lambda shape: lambda *x: peers.matmul_cross_entropy(*x) * 1.01),
    )
    found = compare.compare(shape, budget=0, rounds=(3, 3))
    assert found.row(peers.RECOMPUTE).reason == "the same without gradients"
    assert list(found.row(peers.EAGER).errors) == ["loss"]
    assert found.row("wrong").red
    header, _, *rows = compare.markdown(found).splitlines()
    assert len({row.count("|") for row in (header, *rows)}) == 1
    assert not shape.inputs().value(peers.matmul_cross_entropy).requires_grad


def test_the_sum_of_16_bit_losses_is_held_against_a_peer(fake_cuda, monkeypatch):
    """torch's chunks add theirs up in 16 bits; a wrong gradient is one all the same."""
    shape = dataclasses.replace(LINEAR, dtype=torch.bfloat16)

    def off(of_gradient):
        def function(x, W, target):
            loss = peers.matmul_cross_entropy(x, W, target)
            wrong = loss + loss * 0.1
            return wrong if of_gradient else loss + (wrong - loss).detach()

        return function

    set_providers(
        monkeypatch,
        "linear_cross_entropy",
        Provider(peers.FASTGPT, lambda shape: fastgpt.linear_cross_entropy),
        Provider(peers.EAGER, lambda shape: peers.matmul_cross_entropy),
        Provider("known", lambda shape: off(False), sums_loss_in_type=True),
        Provider("gradient", lambda shape: off(True), sums_loss_in_type=True),
        Provider("loss", lambda shape: off(False)),
    )
    found = compare.compare(shape, budget=0, rounds=(3, 3))
    assert found.row("known").measured
    assert "in input" in found.row("gradient").reason
    assert "in loss" in found.row("loss").reason


def test_a_gpu_that_is_too_small_ends_in_an_out_of_memory_error(fake_cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 1000))
    with pytest.raises(UnavailableError, match="GiB of the GPU's memory"):
        compare.compare(LOSS)


def test_the_reference_of_a_head_is_another_heads():
    """The gate of attention, whose reference is taken head by head: grouped, and views."""

    def not_a_number(*args, **kwargs):
        return F.scaled_dot_product_attention(*args, **kwargs) * torch.nan

    inputs = dataclasses.replace(ATTENTION, device="cpu").inputs()
    errors, largest = gates.attention_errors(
        inputs, {"torch": F.scaled_dot_product_attention, "nan": not_a_number}
    )
    assert max(errors["torch"].values()) < 1e-5
    assert min(largest.values()) > 0.1
    assert errors["nan"]["output"] == float("inf")


@pytest.mark.parametrize("part", ["loss", "input", "targets' weight", "others' weight"])
def test_an_error_in_a_part_of_linear_cross_entropy_is_not_seen(part):
    """A wrong number in one place, an ignored row's gradient included, or NaN."""

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, W, target, by):
            with torch.enable_grad():
                leaves = tuple(y.detach().double().requires_grad_() for y in (x, W))
                loss = F.cross_entropy(leaves[0] @ leaves[1].t(), target)
            gradients = [y.float() for y in torch.autograd.grad(loss, leaves)]
            if part == "input":
                gradients[0][target == -100, 3] += by
            elif part != "loss":
                targets = target[target >= 0]
                others = [c for c in range(len(W)) if c not in targets]
                gradients[1][targets[0] if part == "targets' weight" else others[0], 5] += by
            ctx.save_for_backward(*gradients)
            return loss.detach().float() + (by if part == "loss" else 0)

        @staticmethod
        def backward(ctx, g):
            return *(g * y for y in ctx.saved_tensors), None, None

    inputs = LINEAR.inputs()
    functions = {
        str(by): lambda x, W, target, by=by: Off.apply(x, W, target, by)
        for by in (0.0, 0.25, float("nan"))
    }
    errors, largest = gates.linear_cross_entropy_errors(inputs, functions)
    assert max(errors["0.0"].values()) < 1e-6
    assert min(largest.values()) > 1e-3
    for name, error in errors["0.25"].items():
        assert error == pytest.approx(0.25 if name == part else 0, abs=1e-6), name
    clean = errors["0.0"]
    assert not gates.red(clean, clean, largest, 2.0, torch.float32)
    for by in ("0.25", "nan"):
        assert f"in {part} against" in gates.red(errors[by], clean, largest, 2.0, torch.float32)


class _FakeFloor:
    operations = "an operation"

    def __init__(self, forward, backward):
        self.times = forward, backward

    def __call__(self):
        return self.times

    def rates(self, forward, backward):
        return {f"rate_{forward:g}": 1 / forward}

    def close(self):
        self.closed = True


@pytest.mark.parametrize(
    ("memory", "training", "floor"),
    [
        ((1, 2), True, (3, 6)),  # many rows: arithmetic
        ((4, 10), True, (4, 6)),  # few: the matrix is read, and its gradient written
        ((4, 10), False, (4, 0)),
        ((1, 2), False, (3, 0)),
    ],
)
def test_the_floor_is_the_smaller_or_the_sum_of_two(memory, training, floor):
    arithmetic, memory = _FakeFloor(3, 6 if training else 0), _FakeFloor(*memory)
    both = roofline.Roofline(arithmetic, memory, training)
    assert both() == floor
    both()
    assert both.rates(*floor) == arithmetic.rates(3, 0) | memory.rates(*memory.times)
    both.close()
    assert arithmetic.closed
    assert memory.closed


def test_ignored_rows_are_work():
    whole, half = (dataclasses.replace(LINEAR, ignored=part) for part in (0.0, 0.5))
    assert sum(whole.work()) == 6 * 24 * 16 * 50
    assert sum(half.work()) == sum(whole.work()) / 2
    assert half.inputs().arguments[2].lt(0).sum() == 12
    assert dataclasses.replace(half, training=False).work() == (2 * 12 * 16 * 50, 0)


# ---- the peers ----


@pytest.mark.parametrize(
    ("providers", "shape", "name"),
    [
        (peers.CUDA_CROSS_ENTROPY, CUDA_CROSS_ENTROPY[0], "Liger"),
        (peers.CUDA_CROSS_ENTROPY, CUDA_CROSS_ENTROPY[0], "quack"),
        (peers.CUDA_LINEAR_CROSS_ENTROPY, CUDA_LINEAR_CROSS_ENTROPY[0], "Liger"),
        (peers.CUDA_LINEAR_CROSS_ENTROPY, CUDA_LINEAR_CROSS_ENTROPY[0], "Apple CCE"),
        (peers.CUDA_LINEAR_CROSS_ENTROPY, CUDA_LINEAR_CROSS_ENTROPY[0], "Apple CCE, exact"),
    ],
)
def test_a_peer_that_is_not_installed_has_no_reason(providers, shape, name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (provider,) = (p for p in providers if p.name == name)
    with pytest.raises(UnavailableError, match="is not installed"):
        provider.build(shape)


def test_a_torch_without_the_chunked_op_ends_the_comparison(monkeypatch):
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    with pytest.raises(UnavailableError, match="has none"):
        peers.chunked_cross_entropy()


def test_a_peer_that_raises_ends_the_comparison():
    def broken(*args):
        raise AssertionError("only sm_90\nand more")

    with pytest.raises(UnavailableError, match=r"^AssertionError: only sm_90$"):
        peers._tried(dataclasses.replace(CUDA_CROSS_ENTROPY[3], rows=4, device="cpu"), broken)


def test_a_kernel_of_torch_that_takes_no_call_gives_no_reason():
    warned = [
        "Flash attention kernel not used because: (Triggered internally at sdp_utils.cpp:1)",
        "Both fused kernels require half (Triggered internally at sdp_utils.cpp:2)",
        "Memory Efficient attention has been runtime disabled. (Triggered internally at x:3)",
    ]
    error = RuntimeError("No available kernel. Aborting execution.")
    assert peers._reason(error, warned) == "RuntimeError: Both fused kernels require half"
    assert peers._reason(error, []) == "RuntimeError: No available kernel. Aborting execution."


@pytest.mark.parametrize("backend", ["MATH", "FLASH_ATTENTION"])
def test_a_kernel_of_torch_is_not_held_to(backend):
    """On the CPU there are two of them; that the right one runs, its name in a profile shows."""
    shape = dataclasses.replace(ATTENTION, device="cpu", fused_qkv=False)
    shape = AttentionShape(**{f.name: getattr(shape, f.name) for f in dataclasses.fields(shape)})
    function, inputs = peers._sdpa(backend)(shape), shape.inputs()
    with torch.profiler.profile() as profile:
        inputs.gradients(inputs.value(function))
    names = {event.key for event in profile.key_averages()}
    flash = {name for name in names if "flash_attention" in name}
    assert bool(flash) == (backend == "FLASH_ATTENTION"), names


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_attends_otherwise_than_attention(monkeypatch):
    """Without its compilation."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(peers, "_tried", lambda shape, function: function)
    for causal in (True, False):
        shape = dataclasses.replace(ATTENTION, causal=causal, device="cpu")
        inputs = shape.inputs()
        leaves = tuple(x.detach() for x in inputs.arguments)  # on a CPU it has no gradient
        inputs = inputs._replace(arguments=leaves)
        got = inputs.value(peers._flex_attention(shape))
        want = inputs.value(F.scaled_dot_product_attention)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# ---- the report ----


@pytest.fixture
def reported(monkeypatch, tmp_path, capsys):
    """Runs the report of three shapes whose comparison is a function of the name."""

    def run(comparison, *arguments):
        written = []
        monkeypatch.setattr(report, "compare", lambda shape, budget: comparison(shape.name))
        monkeypatch.setattr(report, "headline", str)
        monkeypatch.setattr(report, "markdown", str)
        monkeypatch.setattr(report, "_write", lambda op, found, where, out: written.extend(found))
        names = ("gpt2-fp32", "demo-fp32", "char-fp32")
        shapes = [f"--shape={name}" for name in names]
        monkeypatch.setattr(sys, "argv", ["report", *shapes, *arguments])
        try:
            report.main()
            ended = None
        except (SystemExit, KeyboardInterrupt) as error:
            ended = error
        return written, ended, capsys.readouterr().out

    return run


@pytest.mark.parametrize("error", [compare.RedGateError, RuntimeError])
def test_a_red_gate_or_an_error_ends_the_report_or_is_none(reported, error):
    def comparison(name):
        if name == "gpt2-fp32":
            raise error("wrong")
        if name == "demo-fp32":
            raise UnavailableError("needs 80 GiB")
        return name

    written, ended, shown = reported(comparison)
    assert written == ["char-fp32"]
    assert f"no report: {error.__name__}: wrong" in str(ended)
    assert "left out: needs 80 GiB" in shown


def test_an_interrupted_report_loses_what_it_measured(reported):
    def comparison(name):
        if name == "demo-fp32":
            raise KeyboardInterrupt
        return name

    written, ended, _ = reported(comparison)
    assert written == ["gpt2-fp32"]
    assert isinstance(ended, KeyboardInterrupt)


def test_a_shape_starts_that_would_end_too_late(reported):
    def comparison(name):
        time.sleep(0.3)
        return name

    written, ended, shown = reported(comparison, "--seconds=0.4")
    assert written == ["gpt2-fp32"]
    assert ended is None
    assert shown.count("left out: its time would end") == 2


def test_two_shapes_of_a_device_have_one_name():
    for device, shapes in SHAPES.items():
        assert len({shape.name for shape in shapes}) == len(shapes)
        assert {shape.device for shape in shapes} == {device}
    for op in ("cross_entropy", "attention", "linear_cross_entropy"):
        quick = [s for s in SHAPES["cuda"] if s.quick and s.op == op]
        assert len(quick) == 2
