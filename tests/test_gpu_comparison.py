"""The benchmarks' comparison on a GPU, with a clock and tensors of the CPU in its place."""

import dataclasses
import functools
import importlib.util
import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import twin
from backends import TWIN, activate

import fastgpt
from benchmarks import UnavailableError, compare, defaults, gates, peers, report, roofline, timing
from benchmarks.peers import Provider
from benchmarks.shapes import (
    CUDA_ATTENTION,
    CUDA_CROSS_ENTROPY,
    CUDA_LINEAR_CROSS_ENTROPY,
    SHAPES,
    AttentionShape,
    CrossEntropyShape,
    LinearCrossEntropyShape,
)
from fastgpt.backends import hopper
from fastgpt.backends.measured import Measurement
from fastgpt.ops.cross_entropy import CrossEntropyBackward


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


# ---- the backends of fastgpt ----


def held_row(backend):
    name = {"native": peers.CUDA, "triton": peers.TRITON}[backend]
    (provider,) = (p for p in peers.CUDA_CROSS_ENTROPY if p.name == name)
    return provider


def test_a_row_is_of_another_backend_than_its_name_says(fake_cuda, monkeypatch):
    """On the CPU, where the native kernels are those that can be had: forward and backward."""
    chosen, run = [], []
    choose, launch = fastgpt.dispatch.choose, CrossEntropyBackward.forward

    def recorded(*arguments):
        decisions = choose(*arguments)
        chosen.append(decisions[-1].backend)
        return decisions

    def launched(*arguments):
        run.append(arguments[-1])
        return launch(*arguments)

    function = held_row("native").build(dataclasses.replace(LOSS, name="held"))
    monkeypatch.setattr(fastgpt.dispatch, "choose", recorded)
    monkeypatch.setattr(CrossEntropyBackward, "forward", launched)
    inputs = LOSS.inputs()
    loss = functools.partial(function, z_loss=1e-3)  # by the way that GPUs take
    with fastgpt.backend("eager"):  # what is outside of the call does not matter
        inputs.gradients(inputs.value(loss))
    assert chosen == ["native"]
    assert run == ["native"]


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_row_whose_backend_is_off_runs_on_another_or_gives_no_reason(
    fake_cuda, monkeypatch, backend
):
    cell = fastgpt.dispatch.Cell("cross_entropy", backend, "cpu", "it was not built")
    monkeypatch.setitem(fastgpt.dispatch.TABLE, ("cross_entropy", backend, "cpu"), cell)
    with pytest.raises(UnavailableError, match="it was not built"):
        held_row(backend).build(LOSS)
    for key, other in list(fastgpt.dispatch.TABLE.items()):  # ... and with nothing else to run
        if other.backend == backend:
            off = dataclasses.replace(other, reason="it was not built")
            monkeypatch.setitem(fastgpt.dispatch.TABLE, key, off)
    with pytest.raises(UnavailableError, match="it was not built"):
        held_row(backend).build(LOSS)


# Several tiles, so that the generations differ in their roundings.
WIDE_HEADS = Attention("heads", 1, 2, 1, 256, 256, 64, True, torch.bfloat16, "", device="cuda")


@pytest.fixture
def on_hopper(fake_cuda, monkeypatch):
    """The CUDA kernels' host twin in the place of a GPU of Hopper's."""
    twin.load()
    settings = torch.ops.fastgpt_twin_settings
    switch = hopper.switch
    monkeypatch.setattr(hopper, "switch", lambda on: switch(on, settings))
    settings.hopper(True)
    yield from activate(TWIN)
    settings.hopper(False)
    switch(hopper.ALL, settings)


def attention_row(name):
    (provider,) = (p for p in peers.CUDA_ATTENTION if p.name == name)
    return provider


def passes(function, shape=WIDE_HEADS):
    inputs = shape.inputs()
    value = inputs.value(function)
    return value, *inputs.gradients(value)


def same(a, b):
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("ratio", [None, 0.8, 1.2])
def test_a_row_is_of_another_generation_than_its_name_says(on_hopper, monkeypatch, ratio):
    """That of the user is as stored, whichever ran before."""
    name = hopper.entry("forward", 64)
    stored = (
        [Measurement(name, "sm_90", "GPU", "2026-12-01", "db4a743", ratio, [])] if ratio else []
    )
    monkeypatch.setattr(peers.measured, "read", lambda: stored)
    monkeypatch.setattr(peers.cuda, "extension", "of a GPU")
    rows = {
        name: attention_row(name).build(WIDE_HEADS)
        for name in (peers.AMPERE, peers.HOPPER, peers.FASTGPT)
    }
    chosen = hopper.chosen(stored)
    assert bool(chosen) == (ratio is not None)
    truth = {}
    for name, on in (
        (peers.AMPERE, hopper.NONE),
        (peers.HOPPER, hopper.ALL),
        (peers.FASTGPT, chosen),
    ):
        hopper.switch(on)
        truth[name] = passes(fastgpt.scaled_dot_product_attention)
    assert not same(truth[peers.AMPERE], truth[peers.HOPPER])
    assert same(truth[peers.FASTGPT], truth[peers.HOPPER]) == (ratio != 0.8)
    for before in rows:
        for name, row in rows.items():
            passes(rows[before])
            assert same(passes(row), truth[name]), (before, name)


def test_a_gpu_without_hoppers_kernels_has_a_row_of_theirs(on_hopper):
    build = attention_row(peers.HOPPER).build
    torch.ops.fastgpt_twin_settings.hopper(False)
    with pytest.raises(UnavailableError, match="its forward has the bits of Ampere's"):
        build(WIDE_HEADS)


def test_the_generations_are_not_gated_or_not_timed_in_one_run(on_hopper, monkeypatch, tmp_path):
    """And what the run leaves is what the switch is set by."""
    own = (peers.FASTGPT, peers.AMPERE, peers.HOPPER, peers.EAGER)
    rows = [attention_row(name) for name in own]
    rows.append(Provider(peers.TRITON, lambda shape: F.scaled_dot_product_attention))
    set_providers(monkeypatch, "attention", *rows)
    found = compare.compare(WIDE_HEADS, budget=0, rounds=(2, 2))
    assert found.kernel.startswith("native")
    for name in (peers.AMPERE, peers.HOPPER):
        row = found.row(name)
        assert set(row.errors) == {"output", "grad_query", "grad_key", "grad_value"}
        assert [len(row.seconds[which]) for which in hopper.PASSES] == [2, 2]
    where = {"device": "cuda", "gpu": "Some GPU", "capability": "9.0", "commit": "0123"}
    monkeypatch.setattr(report, "draw", lambda comparisons, where, path: path.touch())
    report._write("attention", [found], where, tmp_path)
    (path,) = tmp_path.glob("*.json")
    defaults.main([str(path), "--write"], tmp_path / "measured.json")
    stored = [Measurement(**e) for e in json.loads((tmp_path / "measured.json").read_text())]
    ratios = {
        hopper.entry(which, 64): found.row(peers.AMPERE).median(which)
        / found.row(peers.HOPPER).median(which)
        for which in hopper.PASSES
    }
    _, *generations = sorted(stored, key=lambda m: m.op in ratios)
    assert {m.op: m.ratio for m in generations} == pytest.approx(ratios, abs=1e-3)
    assert len(hopper.chosen(stored)) == len(ratios)


def test_a_wrong_generation_is_left_out_unnoticed(on_hopper, monkeypatch):
    def wrong(shape):
        function = attention_row(peers.HOPPER).build(shape)
        return lambda *x, **keywords: function(*x, **keywords) * 1.1

    own = (peers.FASTGPT, peers.AMPERE, peers.EAGER)
    rows = [*(attention_row(name) for name in own), Provider(peers.HOPPER, wrong)]
    set_providers(monkeypatch, "attention", *rows)
    found = compare.compare(WIDE_HEADS, budget=0, rounds=(2, 2))
    (told,) = found.wrong()
    assert told.startswith(f"{peers.HOPPER}: error")


def test_the_generations_are_compared_on_too_few_shapes():
    causal = {(s.D, s.L) for s in CUDA_ATTENTION if s.causal and s.dtype == torch.bfloat16}
    assert causal >= {(D, L) for D in (64, 128) for L in (8192, 16384)}
    assert {s.D for s in CUDA_ATTENTION if s.quick} == {64, 128}
    names = {provider.name for provider in peers.CUDA_ATTENTION}
    assert names >= {peers.AMPERE, peers.HOPPER, peers.TRITON, "SDPA flash", "SDPA cuDNN"}


def test_what_a_backend_does_not_cover_is_its_row(fake_cuda, monkeypatch):
    cell = fastgpt.dispatch.Cell("cross_entropy", "native", "cpu", "", lambda call: "strides: odd")
    monkeypatch.setitem(fastgpt.dispatch.TABLE, ("cross_entropy", "native", "cpu"), cell)
    with pytest.raises(UnavailableError, match=r"^strides: odd$"):
        held_row("native").build(LOSS)


def test_a_wrong_kernel_of_our_own_is_left_out_unnoticed(fake_cuda, monkeypatch):
    def wrong(shape):
        return lambda x, t: F.cross_entropy(x, t) * 1.01

    set_providers(
        monkeypatch,
        "cross_entropy",
        Provider(peers.FASTGPT, lambda shape: fastgpt.cross_entropy),
        Provider(peers.CUDA, wrong),
        Provider(peers.TRITON, unavailable),
        Provider(peers.EAGER, lambda shape: F.cross_entropy),
        Provider("Liger", wrong),
    )
    found = compare.compare(LOSS, budget=0, rounds=(3, 3))
    (told,) = found.wrong()
    assert told.startswith("fastgpt, CUDA: error")
    assert found.row(peers.EAGER).measured


def test_the_share_of_the_copy_rate_is_not_that_of_the_bytes(fake_cuda, monkeypatch):
    """A forward is a read, a forward and backward two reads and a write."""

    class Floored(OnCpu, CrossEntropyShape):
        def floor(self):
            return roofline.CudaCopyFloor(self.logits_bytes)

    shape = Floored("small", 24, 50, torch.float32, "", device="cuda")
    rate = 1e6  # bytes copied a second, read and written together

    def copied(run):
        return 2 * shape.logits_bytes / rate

    ones = torch.ones
    monkeypatch.setattr(roofline, "cuda_seconds", copied)
    monkeypatch.setattr(torch, "ones", lambda *size, device=None, **kw: ones(*size, **kw))
    set_providers(
        monkeypatch,
        "cross_entropy",
        Provider(peers.FASTGPT, lambda shape: fastgpt.cross_entropy),
        Provider(peers.EAGER, lambda shape: F.cross_entropy),
        Provider("absent", unavailable),
    )
    found = compare.compare(shape, budget=0, rounds=(3, 3))
    row = found.row(peers.EAGER)
    want = {"forward": 1, "full": 3}
    for which, times in want.items():
        share = times * shape.logits_bytes / row.median(which) / rate
        assert found.share(peers.EAGER, which) == pytest.approx(share)
        (plain,) = (r for r in found.as_json()["rows"] if r["provider"] == peers.EAGER)
        assert plain["share_of_floor"][which] == pytest.approx(share)
        assert f"({share:.0%})" in compare.markdown(found)
    shown = ", ".join(f"{found.share(peers.EAGER, which):.0%}" for which in want)
    header, _, line = compare.shares([found]).splitlines()
    assert header == "| forward, both ÷ memory floor | fastgpt | torch eager | absent |"
    assert line.startswith("| float32 24x50 | ")
    assert line.endswith(f" | {shown} |  |")
    assert compare.shares([compare.compare(LOSS, budget=0, rounds=(3, 3))]) == ""


def test_logits_by_columns_are_rows_or_other_numbers(fake_cuda, monkeypatch):
    whole = dataclasses.replace(LOSS, rows=24, sequence=6)
    columns = dataclasses.replace(whole, columns=True)
    (x, t), (y, u) = (shape.inputs().arguments for shape in (whole, columns))
    assert y.is_contiguous()
    assert not x.is_contiguous()
    assert x.shape == y.shape == (4, 50, 6)
    assert torch.equal(x, y)
    assert torch.equal(t, u)
    set_providers(
        monkeypatch,
        "cross_entropy",
        Provider(peers.FASTGPT, lambda shape: fastgpt.cross_entropy),
        Provider(peers.EAGER, lambda shape: F.cross_entropy),
        Provider("wrong", lambda shape: lambda x, t: F.cross_entropy(x * 1.01, t)),
    )
    found = compare.compare(columns, budget=0, rounds=(3, 3))
    assert found.row("wrong").red
    assert "by columns" in str(columns)


def test_a_gpus_losses_are_of_too_few_kinds():
    """The targets are for wide rows of both types; small ones and other layouts are beside them."""
    wide = {(s.classes, s.dtype) for s in CUDA_CROSS_ENTROPY if s.classes >= 32000}
    assert {(50304, d) for d in (torch.bfloat16, torch.float32)} <= wide
    assert {c for c, _ in wide} >= {50257, 50304, 128256, 262144}
    assert {s.classes for s in CUDA_CROSS_ENTROPY} >= {65, 256, 1000}
    assert {(bool(s.sequence), s.columns) for s in CUDA_CROSS_ENTROPY} == {
        (False, False),
        (True, False),
        (True, True),
    }
    for shape in CUDA_CROSS_ENTROPY:
        assert shape.bytes_needed(len(peers.CUDA_CROSS_ENTROPY)) < 75e9, shape.name


# ---- which of them is the default ----


def result(**changes):
    """A result file of the report: two shapes on which CUDA is faster, one where it can't run."""

    def row(provider, seconds=None, reason="", red=False):
        plain = {"provider": provider, "reason": reason, "red": red}
        return plain if seconds is None else {**plain, "median_seconds": {"full": seconds}}

    def shape(name, cuda, triton):
        rows = [row(peers.FASTGPT, 9.0), row(peers.CUDA, **cuda), row(peers.TRITON, **triton)]
        return {"shape": {"name": name}, "rows": rows}

    return {
        "date": "2027-01-02T03:04:05+00:00",
        "op": "cross_entropy",
        "machine": {
            "device": "cuda",
            "gpu": "NVIDIA H100",
            "capability": "9.0",
            "commit": "0123456789ab",
        },
        "failed": [],
        "comparisons": [
            shape("a", {"seconds": 2.0}, {"seconds": 3.0}),
            shape("b", {"seconds": 1.0}, {"seconds": 1.3}),
            shape("c", {"reason": "not implemented"}, {"seconds": 1.0}),
        ],
        **changes,
    }


def test_the_default_is_not_the_faster_of_the_two():
    (entry,) = defaults.entries(result())
    assert entry == {
        "op": "cross_entropy",
        "chip": "sm_90",
        "gpu": "NVIDIA H100",
        "date": "2027-01-02",
        "commit": "0123456789ab",
        "ratio": 1.4,
        "shapes": ["a", "b"],
    }


def attention_result(*shapes, **changes):
    """Of shapes by name and D, with the seconds (forward, backward) of Ampere's kernels, Hopper's
    and Triton's, or the reason why there are none.
    """

    def row(provider, found):
        if isinstance(found, str):
            return {"provider": provider, "reason": found, "red": False}
        seconds = dict(zip((*hopper.PASSES, "full"), (*found, sum(found)), strict=True))
        return {"provider": provider, "reason": "", "red": False, "median_seconds": seconds}

    names = (peers.AMPERE, peers.HOPPER, peers.TRITON)
    comparisons = [
        {"shape": {"name": name, "D": D}, "rows": list(map(row, names, rows))}
        for name, D, *rows in shapes
    ]
    return result(op="attention", comparisons=comparisons, **changes)


def test_the_generation_of_attention_is_not_the_faster_one_of_the_pass_and_width():
    absent = "it was not built"
    found = defaults.entries(
        attention_result(
            ("a", 64, (3.0, 8.0), (2.0, 9.0), (5.0, 5.0)),
            ("b", 128, (2.0, 8.0), (4.0, 2.0), (4.0, 4.0)),
            ("c", 128, (2.0, 8.0), (4.0, 4.0), (3.0, 3.0)),
            ("d", 80, (1.0, 1.0), absent, (1.0, 2.0)),
            ("e", 128, absent, absent, (1.0, 2.0)),
        )
    )
    assert {e["op"]: (e["ratio"], e["shapes"]) for e in found} == {
        # On the faster of each pass: 10 / (2 + 8), 8 / (2 + 2), 6 / (2 + 4), 3 / 2.
        "scaled_dot_product_attention": (1.25, ["a", "b", "c", "d"]),
        "attention_forward_hopper_64": (1.5, ["a"]),
        "attention_backward_hopper_64": (0.889, ["a"]),
        "attention_forward_hopper_128": (0.5, ["b", "c"]),
        "attention_backward_hopper_128": (3.0, ["b", "c"]),
    }
    assert {(e["chip"], e["date"]) for e in found} == {("sm_90", "2027-01-02")}


def test_a_chip_without_hoppers_kernels_has_no_default_of_attention():
    machine = {**result()["machine"], "capability": "8.0"}
    absent = "its forward has the bits of Ampere's"
    shape = ("a", 64, (3.0, 8.0), absent, (10.0, 12.0))
    (entry,) = defaults.entries(attention_result(shape, machine=machine))
    assert (entry["chip"], entry["ratio"]) == ("sm_80", 2.0)
    assert (entry["op"], "native", "cuda") in fastgpt.dispatch.TABLE


def test_a_wrong_generation_makes_a_default():
    record = attention_result(("a", 64, (3.0, 8.0), (2.0, 9.0), (5.0, 5.0)))
    record["comparisons"][0]["rows"][1] = {"provider": peers.HOPPER, "red": True, "reason": "off"}
    with pytest.raises(defaults.UnfitError, match="a gate failed: fastgpt, CUDA, Hopper on a: off"):
        defaults.entries(record)


def test_the_stored_generations_replace_each_other_or_their_op(tmp_path, capsys):
    path, stored = tmp_path / "result.json", tmp_path / "measured.json"
    for hoppers in ((6.0, 9.0), (2.0, 9.0)):
        shapes = [("a", 64, (3.0, 8.0), hoppers, (5.0, 5.0)), ("b", 128, *3 * [(1.0, 1.0)])]
        path.write_text(json.dumps(attention_result(*shapes)))
        defaults.main([str(path), "--write"], stored)
    found = {e["op"]: e["ratio"] for e in json.loads(stored.read_text())}
    assert found["attention_forward_hopper_64"] == 1.5
    assert set(found) >= {"scaled_dot_product_attention", "attention_forward_hopper_128"}
    shown = capsys.readouterr().out
    assert "Hopper is the faster in attention_forward_hopper_64 on sm_90, over 1 shapes" in shown
    assert "Ampere is the faster in attention_forward_hopper_128 on sm_90, over 1 shapes" in shown


def without(name):
    return {key: value for key, value in result()["machine"].items() if key != name}


def changed(name, **changes):
    comparisons = result()["comparisons"]
    for comparison in comparisons:
        for row in comparison["rows"]:
            if row["provider"] == name:
                row.pop("median_seconds", None)
                row.update({"reason": "off", **changes})
    return comparisons


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"op": "linear_cross_entropy"},
            "expected a result of cross_entropy or attention, got one of linear_cross_entropy",
        ),
        ({"machine": {"device": "cpu"}}, "expected a result from a GPU, got one from a cpu"),
        ({"machine": without("gpu")}, "does not say its gpu"),
        ({"machine": without("capability")}, "does not say its capability"),
        ({"machine": {**without(""), "commit": None}}, "does not say its commit"),
        ({"date": ""}, "does not say its date"),
        ({"failed": ["gpt2-bf16: no report: wrong"]}, "a gate failed: gpt2-bf16: no report: wrong"),
        ({"comparisons": changed(peers.CUDA, red=True)}, "a gate failed: fastgpt, CUDA on a: off"),
        ({"comparisons": changed(peers.CUDA)}, "no shape has both .*a: fastgpt, CUDA: off"),
        ({"comparisons": changed(peers.TRITON)}, "no shape has both .*a: fastgpt, Triton: off"),
        ({"comparisons": changed(peers.TRITON, provider="x")}, "Triton: it has no such row"),
        ({"comparisons": []}, "there are none"),
    ],
)
def test_a_result_that_proves_nothing_makes_a_default(changes, message):
    with pytest.raises(defaults.UnfitError, match=message):
        defaults.entries(result(**changes))


def test_a_result_of_an_older_report_makes_a_default():
    record = result()
    del record["failed"]
    with pytest.raises(defaults.UnfitError, match="of an older report"):
        defaults.entries(record)


def test_the_stored_defaults_are_lost_or_kept_twice(tmp_path, capsys):
    path, measured = tmp_path / "result.json", tmp_path / "backends" / "measured.json"
    path.write_text(json.dumps(result()))
    defaults.main([str(path)], measured)
    assert not measured.exists()
    shown = capsys.readouterr().out
    assert '"ratio": 1.4' in shown
    assert "CUDA is the faster in cross_entropy on sm_90, over 2 shapes" in shown

    defaults.main([str(path), "--write"], measured)
    a100 = result(machine={**result()["machine"], "capability": "8.0"})
    slower = result(comparisons=[*result()["comparisons"][1:2]], date="2027-02-02")
    slower["comparisons"][0]["rows"][1]["median_seconds"]["full"] = 2.6
    for record in (a100, slower):
        path.write_text(json.dumps(record))
        defaults.main([str(path), "--write"], measured)
    stored = json.loads(measured.read_text())
    assert [(e["chip"], e["ratio"]) for e in stored] == [("sm_80", 1.4), ("sm_90", 0.5)]
    assert stored[1]["date"] == "2027-02-02"
    assert (
        "Triton is the faster in cross_entropy on sm_90, over 1 shapes" in capsys.readouterr().out
    )
    assert list(measured.parent.iterdir()) == [measured], "a temporary file was left"


def test_a_result_that_is_not_there_is_a_traceback(tmp_path):
    with pytest.raises(SystemExit, match="No such file"):
        defaults.main([str(tmp_path / "absent.json")], tmp_path / "measured.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(SystemExit, match=r"bad.json: Expecting"):
        defaults.main([str(tmp_path / "bad.json")], tmp_path / "measured.json")


# What `entries` reads is what `as_json` and `_write` write.
def test_a_file_of_the_report_can_not_be_read(fake_cuda, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    set_providers(
        monkeypatch,
        "cross_entropy",
        Provider(peers.FASTGPT, lambda shape: fastgpt.cross_entropy),
        Provider(peers.CUDA, lambda shape: fastgpt.cross_entropy),
        Provider(peers.TRITON, lambda shape: F.cross_entropy),
        Provider(peers.EAGER, lambda shape: F.cross_entropy),
    )
    found = compare.compare(LOSS, budget=0, rounds=(3, 3))
    where = {"device": "cuda", "gpu": "Some GPU", "capability": "9.0", "commit": "0123"}
    report._write("cross_entropy", [found], where, tmp_path)
    (path,) = tmp_path.iterdir()
    defaults.main([str(path), "--write"], tmp_path / "measured.json")
    (stored,) = json.loads((tmp_path / "measured.json").read_text())
    ratio = found.row(peers.TRITON).median("full") / found.row(peers.CUDA).median("full")
    assert stored["ratio"] == pytest.approx(ratio, abs=1e-3)
    report._write("cross_entropy", [found], where, tmp_path / "failed", ["it failed"])
    (path,) = (tmp_path / "failed").iterdir()
    with pytest.raises(SystemExit, match="a gate failed: it failed"):
        defaults.main([str(path)], tmp_path / "measured.json")


def test_the_report_does_not_record_what_a_default_needs(monkeypatch):
    properties = SimpleNamespace(
        name="Some GPU", major=9, minor=0, multi_processor_count=1, total_memory=1, L2_cache_size=1
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    where = report.machine("cuda")
    assert (where["gpu"], where["capability"]) == ("Some GPU", "9.0")
    assert where["commit"]


# ---- the report ----


@pytest.fixture
def reported(monkeypatch, tmp_path, capsys):
    """Runs the report of three shapes whose comparison is a function of the name. What the file
    would say has failed is in `failures`.
    """
    failures = []

    def run(comparison, *arguments):
        written, failures[:] = [], []

        class Compared(str):
            shape = property(str)

            def wrong(self):
                return ["fastgpt, CUDA: error 1"] if self == "red" else []

        def write(op, found, where, out, failed):
            written.extend(found)
            failures.extend(failed)

        monkeypatch.setattr(
            report, "compare", lambda shape, budget: Compared(comparison(shape.name))
        )
        for name in ("headline", "markdown", "shares"):
            monkeypatch.setattr(report, name, str)
        monkeypatch.setattr(report, "_write", write)
        names = ("gpt2-fp32", "demo-fp32", "char-fp32")
        shapes = [f"--shape={name}" for name in names]
        monkeypatch.setattr(sys, "argv", ["report", *shapes, *arguments])
        try:
            report.main()
            ended = None
        except (SystemExit, KeyboardInterrupt) as error:
            ended = error
        return written, ended, capsys.readouterr().out

    run.failures = failures
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
    assert len(reported.failures) == 1
    assert f"no report: {error.__name__}: wrong" in reported.failures[0]
    assert "left out: needs 80 GiB" in shown


def test_a_red_gate_of_our_own_is_not_told_or_costs_the_other_rows(reported):
    written, ended, _ = reported(lambda name: "red" if name == "demo-fp32" else name)
    assert written == ["gpt2-fp32", "red", "char-fp32"]
    assert str(ended) == "red: red gate: fastgpt, CUDA: error 1"
    assert reported.failures == [str(ended)]


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
