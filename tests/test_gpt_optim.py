"""Learning rates, steps left out as spikes, and the arithmetic of a step."""

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastgpt
from fastgpt.gpt import GPT, PRESETS, GPTConfig, TrainConfig
from fastgpt.gpt.config import SCHEDULES
from fastgpt.gpt.errors import UsageError
from fastgpt.gpt.flops import PEAKS, flops_per_token, peak_flops, peak_of
from fastgpt.gpt.metrics import read_metrics
from fastgpt.gpt.optim import learning_rate
from fastgpt.gpt.spikes import MOST_IN_A_ROW, WINDOW, Spikes
from fastgpt.gpt.train import load_config, make_trainer, parse_arguments

TEXT = "".join(f"def f{i}(x):\n    return x + {i * 7919 % 1000}\n\n" for i in range(500))


@pytest.fixture
def settings(tmp_path, monkeypatch, threads) -> dict[str, object]:
    monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TEXT)
    return {
        "data": str(tmp_path / "text.txt"), "tokenizer": "byte", "block_size": 8, "batch_size": 2,
        "steps": 6, "warmup": 0, "eval_interval": 100, "eval_batches": 1, "log_interval": 1,
        "device": "cpu", "threads": 1, "out": tmp_path / "run",
    }  # fmt: skip


def rates(**settings: object) -> list[float]:
    config = TrainConfig(lr=1.0, **settings)
    return [learning_rate(step, config) for step in range(config.steps)]


# --- schedules


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_begins_with_the_same_line(schedule):
    line = rates(steps=101, warmup=20, schedule=schedule)[:20]
    assert line == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert rates(steps=101, warmup=20, schedule=schedule)[20] == 1.0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_schedule_of_few_steps_leaves_its_range(schedule, steps):
    for warmup in (0, 1, 5):
        for rate in rates(steps=steps, warmup=warmup, schedule=schedule, min_lr=0.05):
            assert 0.05 <= rate <= 1


def test_cosine_is_half_a_cosine():
    config = {"steps": 101, "warmup": 20, "min_lr": 0.2}
    expected = [0.2 + 0.8 * (1 + math.cos(math.pi * i / 80)) / 2 for i in range(81)]
    assert rates(**config)[20:] == pytest.approx(expected)
    assert rates(**config) == rates(**config, schedule="cosine"), "the default"


def test_step_decay_multiplies_at_its_steps_and_stops_at_the_lowest():
    found = rates(
        steps=50, warmup=10, schedule="step", decay_every=10, decay_factor=0.5, min_lr=0.2
    )
    assert found[10:] == [1.0] * 10 + [0.5] * 10 + [0.25] * 10 + [0.2] * 10


def test_step_decay_without_a_number_comes_at_each_third_of_the_steps():
    found = rates(steps=30, warmup=0, schedule="step", min_lr=0.0)
    assert found == pytest.approx([1.0] * 10 + [0.1] * 10 + [0.01] * 10)


def test_wsd_is_flat_and_then_falls_in_a_line_to_the_lowest_at_the_last_step():
    found = rates(steps=100, warmup=10, schedule="wsd", decay_share=0.2, min_lr=0.1)
    assert found[10:80] == [1.0] * 70
    assert found[80:] == pytest.approx([0.1 + 0.9 * (19 - i) / 20 for i in range(20)])
    assert found[-1] == 0.1
    falls = [a - b for a, b in pairwise(found[79:])]
    assert falls == pytest.approx([0.045] * 20)


def test_wsd_given_more_steps_has_another_stable_part():
    """What the schedule is for: the steps before the decay are those of the longer run."""
    short = rates(steps=100, warmup=10, schedule="wsd", decay_share=0.2)
    long = rates(steps=200, warmup=10, schedule="wsd", decay_share=0.2)
    assert long[:80] == short[:80]
    assert long[80:160] == [1.0] * 80


def test_wsd_of_no_decay_never_falls():
    assert rates(steps=10, warmup=0, schedule="wsd", decay_share=0.0)[:9] == [1.0] * 9


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("schedule", "linear", "schedule must be one of cosine, step, wsd, got 'linear'"),
        ("decay_factor", 0.0, r"decay_factor must be in \(0, 1\], got 0.0"),
        ("decay_share", 1.5, r"decay_share must be in \[0, 1\], got 1.5"),
        ("decay_every", 0, "decay_every must be at least 1, got 0"),
        ("keep", 0, "keep must be at least 1, got 0"),
        ("skip_spikes", -1.0, "skip_spikes must be at least 0, got -1.0"),
    ],
)
def test_a_setting_out_of_range_is_taken(setting, value, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig(**{setting: value})


def test_options_that_are_switches_can_be_switched_off_when_resuming():
    for name in ("fsdp", "tensor_parallel", "compile", "checkpoint_activations", "keep_products"):
        option = name.replace("_", "-")
        assert vars(parse_arguments([f"--{option}"])) == {name: True}
        assert vars(parse_arguments([f"--no-{option}"])) == {name: False}
    assert vars(parse_arguments(["--skip-spikes"])) == {"skip_spikes": 6.0}
    assert vars(parse_arguments(["--skip-spikes", "4"])) == {"skip_spikes": 4.0}
    assert vars(parse_arguments([])) == {}


# --- spikes


def filled(threshold: float = 4.0) -> Spikes:
    """After a window of losses of mean 3 and deviation 0.1, and norms of mean 1 and 0.05."""
    spikes = Spikes(threshold)
    for i in range(WINDOW):
        sign = 1 if i % 2 else -1
        assert spikes.check(3 + 0.1 * sign, 1 + 0.05 * sign) is None
    return spikes


def test_a_spike_is_what_lies_so_many_deviations_above_the_mean():
    assert filled().check(3.39, 1.0) is None
    assert filled().check(3.0, 1.19) is None
    assert "loss 3.41, 4.1 standard deviations above the mean 3" in filled().check(3.41, 1.0)
    assert "gradient norm 1.21, 4.2 standard deviations" in filled().check(3.0, 1.21)


def test_what_lies_far_below_is_no_spike():
    assert filled().check(0.5, 0.01) is None


def test_before_the_window_is_full_only_what_is_not_finite_is_a_spike():
    spikes = Spikes(4.0)
    for i in range(WINDOW - 1):
        assert spikes.check(3.0 * 2 ** (i % 5), 1.0) is None
    assert spikes.check(math.nan, 1.0) == "loss nan"
    assert spikes.check(1.0, math.inf) == "gradient norm inf"
    assert spikes.skipped == 2


def test_a_spike_raises_the_mean_that_the_next_one_is_measured_by():
    spikes = filled()
    for _ in range(5):
        assert spikes.check(5.0, 1.0)
    assert spikes.check(3.41, 1.0), "the window holds no spikes"
    assert spikes.skipped == spikes.in_a_row == 6
    assert spikes.check(3.0, 1.0) is None
    assert (spikes.skipped, spikes.in_a_row) == (6, 0)


def test_a_run_that_stays_on_another_level_skips_steps_for_ever():
    spikes = filled()
    for _ in range(MOST_IN_A_ROW - 1):
        assert spikes.check(9.0, 1.0)
    with pytest.raises(UsageError, match=r"64 steps in a row.*loss 9.*has diverged"):
        spikes.check(9.0, 1.0)


def test_what_a_checkpoint_keeps_of_spikes_decides_alike():
    spikes = filled()
    spikes.check(9.0, 1.0)
    copy = Spikes(4.0)
    copy.restore(spikes.tensors())
    assert copy.tensors().keys() == spikes.tensors().keys()
    for name, tensor in spikes.tensors().items():
        assert torch.equal(copy.tensors()[name], tensor), name
    assert copy.check(3.41, 1.0) == spikes.check(3.41, 1.0)
    copy.restore({})  # of a checkpoint from before
    assert copy.skipped == 2


def test_a_step_with_a_spike_is_applied_or_not_counted(settings):
    trainer = make_trainer({**settings, "skip_spikes": 5.0, "diagnostics": 1})
    loss_fn, seen = trainer.loss_fn, []
    trainer.loss_fn = lambda *tensors: (
        loss_fn(*tensors) * (math.nan if trainer.model.training and trainer.step in (2, 3) else 1)
    )
    train_step = trainer.train_step

    def step_and_look():
        before = [p.detach().clone() for p in trainer.model.parameters()]
        train_step()
        same = map(torch.equal, before, trainer.model.parameters())
        seen.append(all(same))
        assert all(p.grad is None for p in trainer.model.parameters())

    trainer.train_step = step_and_look
    assert trainer.run() == 0
    assert seen == [False, False, True, True, False, False]
    rows = read_metrics(trainer.metrics.path)
    assert rows == trainer.metrics.rows
    assert [row.skipped for row in rows] == [0, 0, 0, 1, 2, 2, 2]
    assert [row.train_loss is None for row in rows] == [
        True,
        False,
        False,
        True,
        True,
        False,
        False,
    ]
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert int(next(iter(trainer.optimizer.state.values()))["step"]) == 4


def test_a_skipped_step_goes_unsaid(settings, capsys):
    trainer = make_trainer({**settings, "skip_spikes": 5.0})
    clip = trainer.parallel.clip_gradients
    trainer.parallel.clip_gradients = lambda limit: (
        clip(limit) * (math.inf if trainer.step == 1 else 1)
    )
    trainer.run()
    out = capsys.readouterr().out
    assert "step      2 left out: gradient norm inf" in out
    assert "1 skipped" in out.splitlines()[-1]


def test_spike_skipping_that_finds_none_changes_the_run(settings, tmp_path):
    plain = make_trainer({**settings, "out": tmp_path / "plain"})
    plain.run()
    watched = make_trainer({**settings, "skip_spikes": 1e6})
    watched.run()
    for a, b in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_count_of_skipped_steps_is_lost_by_a_resumed_run(settings):
    trainer = make_trainer({**settings, "skip_spikes": 5.0})
    trainer.parallel.clip_gradients = lambda limit: torch.tensor(
        math.nan if trainer.step == 2 else 1.0
    )
    trainer.run()
    resumed = make_trainer({"resume": settings["out"], "steps": 8})
    assert load_config(Path(str(settings["out"]))).skip_spikes == 5.0
    assert resumed.spikes.skipped == 1
    resumed.run()
    assert resumed.metrics.rows[-1].skipped == 1


# --- arithmetic


@pytest.mark.parametrize("name", ["tiny", "gpt2"])
def test_the_parameters_that_multiply_are_all_but_the_positions(name):
    config = PRESETS[name]
    with torch.device("meta"):
        model = GPT(config)
    N = model.num_parameters() - model.transformer.wpe.weight.numel()
    attention = 12 * config.n_layer * config.n_embd * config.block_size
    assert flops_per_token(config) == 6 * N + attention


def test_flops_of_gpt2_are_what_the_formula_of_palm_gives():
    """124M parameters, of which 0.8M are positions: 0.855 GFLOP a token at a context of 1024."""
    assert flops_per_token(PRESETS["gpt2"]) == pytest.approx(8.55e8, rel=1e-3)


def test_the_operations_torch_counts_are_another_number():
    """Those of the matrices and of the attention, forward and backward; biases and gains aside."""
    from torch.utils.flop_counter import FlopCounterMode

    config = GPTConfig(vocab_size=512, block_size=64, n_layer=2, n_head=2, n_embd=64)
    model = GPT(config)
    model.use_attention(explicit_attention)
    idx = torch.zeros(1, 64, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        loss = torch.nn.functional.cross_entropy(model(idx)[0].flatten(0, 1), idx.flatten())
        loss.backward()
    vectors = sum(p.numel() for p in model.parameters() if p.dim() < 2)
    assert counter.get_total_flops() == 64 * (flops_per_token(config) - 6 * vectors)


def explicit_attention(q, k, v, dropout_p, is_causal):
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100 80GB PCIe", "tf32", 156),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.5),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H100 NVL", "bfloat16", 835.5),
        ("NVIDIA H200", "float32", 67),
        ("NVIDIA GH200 480GB", "bfloat16", 989.5),
        ("NVIDIA B200", "bfloat16", 2250),
        ("NVIDIA A10", "bfloat16", 125),
        ("NVIDIA L40S", "bfloat16", 362),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA GeForce RTX 4090", "float16", 165.2),
        ("Tesla V100-SXM2-16GB", "float16", 125),
        ("AMD Instinct MI300X", "bfloat16", 1307.4),
    ],
)
def test_a_devices_peak_is_another_ones(name, precision, tflops):
    assert peak_flops(name, precision) == tflops * 1e12


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("NVIDIA A10G", "bfloat16"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16"),
        ("NVIDIA GeForce RTX 4090 D", "no such"),
        ("Tesla V100-SXM2-16GB", "bfloat16"),
        ("NVIDIA GB200", "bfloat16"),
        ("cpu", "float32"),
    ],
)
def test_an_unknown_device_has_a_peak(name, precision):
    assert peak_flops(name, precision) is None


def test_the_table_of_peaks_mixes_up_dense_and_sparse_or_precisions():
    for name, peaks in PEAKS:
        half = peaks.get("bfloat16", peaks["float16"])
        assert peaks["float16"] == half, name
        assert half >= 2 * peaks["float32"] or "RTX 3090" in name, name
        if "tf32" in peaks:
            assert half / peaks["tf32"] == pytest.approx(2, rel=0.02), name


def test_float32_is_measured_by_the_precision_that_torch_multiplies_in(monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    precision = "highest"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    assert peak_of(device, "float32") == (19.5e12, "float32 on NVIDIA A100-SXM4-40GB")
    precision = "high"
    assert peak_of(device, "float32") == (156e12, "tf32 on NVIDIA A100-SXM4-40GB")
    assert peak_of(device, "bfloat16")[0] == 312e12
    assert peak_of(torch.device("cpu"), "float32") == (None, "float32 on cpu")


def test_mfu_is_the_share_of_the_peak_and_empty_where_none_is_known(settings, tmp_path, capsys):
    trainer = make_trainer({**settings, "steps": 2})
    trainer.run()
    assert all(row.mfu is None for row in trainer.metrics.rows)
    assert "MFU" not in capsys.readouterr().out
    trainer = make_trainer({**settings, "steps": 2, "out": tmp_path / "known"})
    trainer.peak = 1e12
    trainer.run()
    row = trainer.metrics.rows[-1]
    assert row.mfu == pytest.approx(row.tokens_per_s * flops_per_token(trainer.model.config) / 1e12)
    assert f"MFU {row.mfu:.1%}" in capsys.readouterr().out
    assert read_metrics(trainer.metrics.path) == trainer.metrics.rows


# --- activation checkpointing


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradients_differ_when_activations_are_computed_again(dropout):
    config = replace(PRESETS["tiny"], vocab_size=64, block_size=16, n_layer=2, dropout=dropout)
    torch.manual_seed(0)
    model = GPT(config)
    x, y = torch.randint(64, (2, 3, 16))
    gradients = []
    for enabled, keep_products in ((False, False), (True, False), (True, True)):
        model.checkpoint_activations(enabled, keep_products=keep_products)
        torch.manual_seed(1)
        model(x, y)[1].backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    assert all(map(torch.equal, gradients[0], gradients[1]))
    assert all(map(torch.equal, gradients[0], gradients[2]))


class Counted(TorchDispatchMode):
    """Counts the operators inside it."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.calls[operator.name()] += 1
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_products_that_were_kept_are_formed_again(backend):
    """And the rest not, or by another backend than the forward had."""
    model = GPT(replace(PRESETS["tiny"], vocab_size=64, block_size=16, dropout=0.1))
    x, y = torch.randint(64, (2, 3, 16))
    calls = []
    for enabled, keep_products in ((False, False), (True, False), (True, True)):
        model.checkpoint_activations(enabled, keep_products=keep_products)
        with fastgpt.backend(backend):
            loss = model(x, y)[1]
        with Counted() as counted:
            loss.backward()
        calls.append(counted.calls)
    plain, again, kept = calls
    attention = "fastgpt::attention_forward" if backend == "native" else "aten::bmm"
    for name in ("aten::addmm", attention):
        assert again[name] > plain[name] == kept[name]
    assert again["aten::gelu"] == kept["aten::gelu"] > plain["aten::gelu"] == 0
    assert bool(again["fastgpt::attention_forward"]) == (backend == "native")


@pytest.mark.slow
def test_a_compiled_step_that_keeps_products_has_other_gradients():
    model = GPT(replace(PRESETS["tiny"], vocab_size=64, block_size=16))
    x, y = torch.randint(64, (2, 3, 16))
    model(x, y)[1].backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.checkpoint_activations(keep_products=True)
    torch.compile(model, fullgraph=True, backend="aot_eager")(x, y)[1].backward()
    for found, want in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(found.grad, want)


def test_products_are_kept_of_nothing():
    message = "keep_products must be False without checkpoint_activations, got True"
    with pytest.raises(UsageError, match=message):
        TrainConfig(keep_products=True)


def test_checkpointed_blocks_keep_more_than_their_inputs():
    model = GPT(replace(PRESETS["tiny"], vocab_size=64, block_size=16))
    x, y = torch.randint(64, (2, 3, 16))

    def saved() -> int:
        sizes: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model.transformer(x)
        return sum(sizes.values())

    plain = saved()
    model.checkpoint_activations()
    assert saved() < plain / 2
    with torch.no_grad():
        assert torch.equal(model(x, y)[1], model(x, y)[1])
