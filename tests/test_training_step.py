"""The benchmark of a training step: that it measures what its table says."""

import functools
import json

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import training_step
from benchmarks.compare import RedGateError
from benchmarks.memory import peak_bytes
from benchmarks.training_step import (
    ALLOWED,
    ATTENTION,
    COMPILED,
    EAGER,
    HEAD,
    LAYERS,
    OURS,
    RECOMPUTING,
    Case,
    Trainee,
    breakdown,
    breakdown_table,
    measure,
    page,
    part_of,
    table,
    within,
)
from fastgpt.gpt import GPTConfig

# Where the logits weigh as much as in GPT-2.
CONFIG = GPTConfig(vocab_size=8192, block_size=64, n_layer=2, n_head=2, n_embd=64)


@pytest.fixture(autouse=True)
def without_the_compiler(monkeypatch):
    """Its variant takes half a minute, and is compared by the gate as the others are."""
    monkeypatch.setattr(training_step, "VARIANTS", (OURS, RECOMPUTING, EAGER))
    monkeypatch.setattr(training_step, "multiply_adds", lambda dtype: 1e11)


def case(mode="float32", config=CONFIG, B=4):
    return Case("tiny", config, B, mode, seconds=0)


class Executed(TorchDispatchMode):
    """The names of the operators that run inside the block, not of those a checkpoint has kept."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_gradients_are_counted_or_what_is_freed_is_not_given_back():
    kept = []

    def call():
        first = torch.empty(1000, dtype=torch.uint8)
        kept.append(torch.empty(5000, dtype=torch.uint8))
        del first
        return torch.empty(700, dtype=torch.uint8)

    assert peak_bytes(call) == 6000
    assert peak_bytes(call, beside=lambda: kept) == 1000


def test_a_temporary_at_the_address_of_a_gradient_goes_uncounted():
    kept = []

    def call():
        for _ in range(3):  # the allocator gives the same block again
            temporary = torch.empty(1 << 20, dtype=torch.uint8)
            del temporary
        kept.append(torch.empty(1 << 20, dtype=torch.uint8))

    assert peak_bytes(call, beside=lambda: kept) == 1 << 20


@pytest.mark.parametrize("mode", ALLOWED)
def test_the_variants_compute_different_things_or_are_not_what_they_are_called(mode):
    trainee = Trainee(case(mode))
    assert trainee.gate() == {}
    parts = {v: breakdown(trainee, v) for v in (OURS, RECOMPUTING, EAGER)}
    for found in parts.values():
        assert min(found[part] for part in (LAYERS, HEAD, ATTENTION)) > 0
    activities = [torch.profiler.ProfilerActivity.CPU]
    for variant in parts:
        with torch.profiler.profile(activities=activities) as profile:
            trainee.step(variant)
        names = {event.name() for event in profile.profiler.kineto_results.events()}
        fused = {name for name in names if name.startswith("fastgpt::")}
        assert bool(fused) == (variant is not EAGER)
        assert ("aten::_log_softmax" in names) == (variant is EAGER)


def test_recomputing_repeats_products_or_saves_nothing():
    config = GPTConfig(vocab_size=256, block_size=128, n_layer=3, n_head=2, n_embd=64)
    trainee = Trainee(case(config=config))
    products, peaks = {}, {}
    for variant in (OURS, RECOMPUTING):
        with Executed() as executed:
            trainee.step(variant)
        wanted = ("aten.mm.default", "aten.addmm.default", "fastgpt.attention_forward.default")
        products[variant] = [executed.names.count(name) for name in wanted]
        trainee.optimizer.zero_grad()
        peaks[variant] = peak_bytes(
            functools.partial(trainee.step, variant),
            beside=lambda: [p.grad for p in trainee.parameters],
        )
    assert min(products[OURS]) > 0
    assert products[OURS] == products[RECOMPUTING]
    assert peaks[RECOMPUTING] < 0.8 * peaks[OURS]


@pytest.mark.parametrize("wrong", ["loss", "gradients", "nan"])
def test_a_variant_that_is_wrong_is_reported(wrong, monkeypatch):
    def loss_fn(x, weight, targets):
        loss = F.cross_entropy(x @ weight.t(), targets)
        if wrong == "loss":
            return loss + 1e-3
        return loss + (x - x.detach()).sum() * (1e-3 if wrong == "gradients" else torch.nan)

    def loss_function(name, found=training_step.loss_function):
        return loss_fn if name == OURS.loss else found(name)

    monkeypatch.setattr(training_step, "loss_function", loss_function)
    with pytest.raises(RedGateError, match="fastgpt is not torch eager"):
        Trainee(case()).gate()


@pytest.mark.parametrize("fails", [True, False])
def test_a_compiler_that_fails_or_is_wrong_takes_the_report_with_it(fails, monkeypatch):
    def compile(function, **options):
        def run(x, y):
            if fails:
                raise RuntimeError("no compiler\nand more")
            return 2 * function(x, y)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(training_step, "VARIANTS", (OURS, EAGER, COMPILED))
    measured = measure(case(), least=2)
    assert list(measured.seconds) == [OURS.name, EAGER.name]
    row = table([measured])[-1]
    assert row.startswith("| torch.compile | ")
    assert ("RuntimeError: no compiler | |" in row) == fails
    assert ("the gradients are off by 1 of their norm" in row) != fails


def test_the_table_gives_other_numbers_than_the_rounds():
    measured = measure(case(), least=2)
    assert measured.ratio(OURS.name) == [1, 1, 1]
    for name in measured.seconds:
        assert len(measured.step(name)) == 2
    measured.seconds[OURS.name] = {"forward": [1, 2], "backward": [2, 3], "AdamW": [1, 1]}
    measured.seconds[EAGER.name] = {"forward": [2, 4], "backward": [4, 6], "AdamW": [4, 4]}
    measured.peaks = {OURS.name: 2 << 20, RECOMPUTING.name: 1 << 20, EAGER.name: 4 << 20}
    assert measured.ratio(EAGER.name) == pytest.approx([2.375, 2.4166667, 2.4583333])
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in table([measured])}
    assert rows["torch eager"][1:] == [
        "1.2e+04 ms", "2.42 [2.38, 2.46]", "2.00 [2.00, 2.00]", "2.00 [2.00, 2.00]",
        "3e+03, 5e+03, 4e+03", "4", "1.00 |",
    ]  # fmt: skip
    assert rows["fastgpt"][-2:] == ["2", "0.50 |"]
    json.dumps(measured.as_json())
    gradients_and_states = 4 * CONFIG.n_embd * CONFIG.vocab_size * 4
    assert measured.fixed_bytes > gradients_and_states
    where = {"cpu": "a", "threads": 1, "isa": "b", "torch": "c", "commit": "d", "load_average": 0}
    assert "\n".join(breakdown_table(measured)) in page([measured], where)
    text = breakdown_table(measured)
    whole = measured.breakdowns[OURS.name]
    assert sum(whole.values()) > 0
    assert f"{whole[HEAD] / sum(whole.values()):.0%}" in next(r for r in text if HEAD in r)


@pytest.mark.parametrize(
    ("name", "shapes", "part"),
    [
        ("aten::mm", [[64, 256], [256, 8192]], HEAD),
        ("aten::addmm", [[192], [64, 64], [64, 192], [], []], LAYERS),
        ("fastgpt::linear_cross_entropy_reduced_backward", [], HEAD),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", [], ATTENTION),
        ("aten::_fused_adamw_", [], "AdamW"),
        ("Optimizer.step#AdamW.step", [], "AdamW"),
        ("aten::native_layer_norm_backward", [], "layer norm"),
        ("aten::gelu_backward", [], "GELU"),
        ("aten::embedding_dense_backward", [], "embeddings"),
        ("aten::add_", [], "additions, casts, copies"),
        ("Torch-Compiled Region: 0/0", [], "the compiler's code"),
        ("autograd::engine::evaluate_function: GeluBackward0", [], "Python and autograd"),
    ],
)
def test_an_operators_time_is_given_to_another_part(name, shapes, part):
    assert part_of(name, shapes, 8192) == part


def test_a_case_is_begun_that_cannot_end_in_time(capsys):
    cases = (case(), case("bfloat16"))
    assert list(within(cases, seconds=60)) == list(cases)
    assert list(within(cases, seconds=-1)) == []
    assert capsys.readouterr().out.count("left out") == 2
