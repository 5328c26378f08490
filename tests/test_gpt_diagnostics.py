"""Diagnostics of training: what is measured, the warnings, and that looking changes nothing."""

import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from fastgpt.gpt import GPT, GPTConfig, TrainConfig
from fastgpt.gpt.charts import some
from fastgpt.gpt.checkpoint import load_checkpoint
from fastgpt.gpt.diagnostics import EDGES, QUERIES, Diagnostics, Observation, histogram
from fastgpt.gpt.errors import CheckpointError, MissingExtraError, UsageError
from fastgpt.gpt.findings import gradient_rms, group_of
from fastgpt.gpt.history import HistoryFile, read_history
from fastgpt.gpt.optim import make_optimizer
from fastgpt.gpt.panels import panels
from fastgpt.gpt.train import make_trainer

TEXT = "".join(f"def f{i}(x):\n    return x + {i * 7919 % 1000}\n\n" for i in range(500))
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models as small as these gain nothing from more
    yield
    torch.set_num_threads(threads)


def tiny(**changes) -> GPT:
    shape = {"vocab_size": 61, "block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32}
    return GPT(GPTConfig(**{**shape, **changes}))


def tokens(model: GPT, sequences: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    config = model.config
    idx = torch.randint(config.vocab_size, (sequences, config.block_size + 1))
    return idx[:, :-1].contiguous(), idx[:, 1:].contiguous()


def look_at_gpt(model: GPT, folder: Path, said=None) -> dict:
    """The record of a first step."""
    optimizer = make_optimizer(model, TrainConfig())
    say = said.append if said is not None else lambda text: None
    diagnostics = Diagnostics(model, optimizer, 1, folder, say=say)
    with diagnostics.observe(1):
        model(*tokens(model))[1].backward()
        optimizer.step()
    return read_history(diagnostics.history.path)[-1]


def look_at(model: nn.Module, x: torch.Tensor, folder: Path) -> tuple[dict, list[str]]:
    """The record of a first step down the mean square of the output, and what was said."""
    said: list[str] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    diagnostics = Diagnostics(model, optimizer, 1, folder, say=said.append)
    with diagnostics.observe(1):
        model(x).square().mean().backward()
        optimizer.step()
    return read_history(diagnostics.history.path)[-1], said


def linear(gain: float, bias: float = 0.0) -> nn.Linear:
    layer = nn.Linear(32, 32)
    nn.init.normal_(layer.weight, std=gain / 32**0.5)
    nn.init.constant_(layer.bias, bias)
    return layer


def stack(depth: int, gain: float, function: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(*(m for _ in range(depth) for m in (linear(gain), function())))


def hooks_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list:
    found = [dict(m._forward_hooks) for m in model.modules() if m._forward_hooks]
    found += [dict(h) for h in (optimizer._optimizer_step_pre_hooks,) if h]
    return found + [dict(h) for h in (optimizer._optimizer_step_post_hooks,) if h]


# --- what is measured


def test_mean_std_dead_and_saturated_are_those_of_the_outputs(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(linear(2), nn.Tanh(), linear(1, bias=-0.4), nn.ReLU())
    with torch.no_grad():
        model[2].bias[:8] = -20.0  # an eighth and more of the units can't become active
    x = torch.randn(40, 3, 32)
    outputs = [model[: i + 1](x) for i in range(4)]
    record, _ = look_at(model, x, tmp_path)
    for name, y in zip("0123", outputs, strict=True):
        seen = record["activations"][name]
        assert seen["mean"] == pytest.approx(y.mean().item(), rel=1e-4, abs=1e-6)
        assert seen["std"] == pytest.approx(y.std(correction=0).item(), rel=1e-4)
    tanh, relu = record["activations"]["1"], record["activations"]["3"]
    assert tanh["saturated"] == pytest.approx((outputs[1].abs() > 0.97).float().mean().item(), 1e-4)
    assert 0.05 < tanh["saturated"] < 0.95
    assert tanh["dead"] == 0
    dead = (outputs[3] == 0).flatten(0, 1).all(0).float().mean().item()
    assert relu["dead"] == pytest.approx(dead)
    assert dead >= 0.25
    assert relu["units"] == 32
    assert "saturated" not in relu, "it has no upper end"


@pytest.mark.parametrize("function", [nn.GELU(approximate="tanh"), nn.GELU(), nn.SiLU(), nn.ELU()])
def test_a_unit_counts_as_dead_where_the_slope_is_nearly_0_and_not_before(function, tmp_path):
    inputs = torch.linspace(-12, 0, 400, requires_grad=True)
    slope = torch.autograd.grad(function(inputs).sum(), inputs)[0].abs()
    limit = inputs[slope < 0.01]  # with the slope's zero in the middle of GELU's dip, not the end
    edge = limit[limit < -2.5].max().item()
    for x, dead in ((edge - 0.2, 1.0), (edge + 0.2, 0.0)):
        model = nn.Sequential(linear(1), function)
        with torch.no_grad():
            model[0].weight.zero_()
            model[0].bias.fill_(x)
        record, _ = look_at(model, torch.randn(4, 32), tmp_path)
        assert record["activations"]["1"]["dead"] == dead, x


def test_micro_batches_are_one_batch_a_unit_alive_in_either_is_alive(tmp_path):
    model = nn.Sequential(nn.ReLU(), linear(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    positive = torch.ones(6, 32)
    positive[:, 16:] = -1.0
    halves = (positive, 3 * torch.ones(2, 32).where(torch.arange(32) % 2 == 0, -1.0))
    observation = Observation(model, optimizer)
    with observation.hooks():
        for half in halves:
            model(half).sum().backward()
        optimizer.step()
    seen = observation.record()["activations"]["0"]
    both = torch.cat(halves).relu()
    assert seen["dead"] == 8 / 32, "those of 16 to 31 that are odd"
    assert seen["mean"] == pytest.approx(both.mean().item(), rel=1e-4)
    assert seen["std"] == pytest.approx(both.std(correction=0).item(), rel=1e-4)


def test_the_update_is_the_parameters_own_change_which_under_adam_is_not_lr_times_gradient(
    tmp_path,
):
    torch.manual_seed(0)
    model = tiny()
    optimizer = make_optimizer(model, TrainConfig(lr=0.01, weight_decay=0.5))
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    diagnostics = Diagnostics(model, optimizer, 1, tmp_path)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with diagnostics.observe(1):
        model(*tokens(model))[1].backward()
        optimizer.step()
    updates = read_history(diagnostics.history.path)[0]["updates"]
    assert updates.keys() == before.keys()
    for name, parameter in model.named_parameters():
        std = before[name].std(correction=0).item()
        if std == 0:
            assert updates[name] is None, "a bias of zeros has no size to compare with"
        else:
            update = (parameter - before[name]).std(correction=0).item()
            assert updates[name] == pytest.approx(math.log10(update / std), abs=1e-3)
    # Adam's first step is about lr in size, whatever the gradient's is: 0.01 to weights of 0.02
    ratio = updates["transformer.h.0.mlp.c_fc.weight"]
    assert ratio == pytest.approx(math.log10(0.01 / 0.02), abs=0.1)


def test_gradients_are_those_before_clipping(tmp_path):
    torch.manual_seed(0)
    model = tiny()
    optimizer = make_optimizer(model, TrainConfig())
    diagnostics = Diagnostics(model, optimizer, 1, tmp_path)
    with diagnostics.observe(1) as observation:
        model(*tokens(model))[1].backward()
        norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
        matrix = model.transformer.h[1].mlp.c_fc.weight.grad.clone()
        observation.gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-4)
        optimizer.step()
    seen = read_history(diagnostics.history.path)[0]["gradients"]
    for name, norm in norms.items():
        assert seen[name]["norm"] == pytest.approx(norm, rel=1e-4)
        assert ("histogram" in seen[name]) == (not name.endswith("bias") and "ln_" not in name)
    assert seen["transformer.h.1.mlp.c_fc.weight"]["histogram"] == histogram(matrix)


def test_each_number_is_in_the_bin_between_whose_edges_it_lies(monkeypatch):
    assert sorted(EDGES) == EDGES
    assert [-edge for edge in reversed(EDGES)] == EDGES
    generator = torch.Generator().manual_seed(0)
    x = 10 ** (14 * torch.rand(5000, generator=generator) - 11)
    x *= torch.randint(0, 2, x.shape, generator=generator) * 2 - 1
    x[:50] = 0.0
    counts = histogram(x)
    assert sum(counts) == len(x)
    edges = torch.tensor([-math.inf, *EDGES, math.inf])
    expected = [int(((x > low) & (x <= high)).sum()) for low, high in pairwise(edges)]
    assert counts == expected
    assert counts[len(EDGES) // 2] >= 50
    monkeypatch.setattr("fastgpt.gpt.diagnostics.CHUNK", 777)
    assert histogram(x.view(50, 100)) == counts, "in pieces"


@pytest.mark.parametrize("length", [1, 5, 32])
def test_attention_entropy_is_that_of_the_weights_that_the_layer_computes(tmp_path, length):
    torch.manual_seed(0)
    model = tiny(block_size=length, vocab_size=211)
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight.mul_(12)  # or it would be ln(visible) everywhere
    weights = {}

    def explicit(q, k, v, **options):
        assert options["is_causal"]
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        weights[len(weights)] = scores.softmax(-1).detach().double()
        return weights[len(weights) - 1].to(v.dtype) @ v

    model.use_attention(explicit)
    record = look_at_gpt(model, tmp_path)
    assert list(record["attention"]) == ["transformer.h.0.attn", "transformer.h.1.attn"]
    for seen, p in zip(record["attention"].values(), weights.values(), strict=True):
        entropy = torch.special.entr(p).sum(-1)  # (B, nh, T)
        rows = sorted({(i + 1) * length // QUERIES - 1 for i in range(QUERIES)} - {-1})
        assert rows[-1] == length - 1
        expected = entropy[:, :, rows].mean((0, 2))
        assert seen["entropy"] == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-6)
        assert seen["limit"] == pytest.approx(sum(math.log(r + 1) for r in rows) / len(rows), 1e-4)
        if length == 32:
            assert max(seen["entropy"]) < 0.95 * seen["limit"], "the weights are not all alike"


def test_attention_entropy_never_has_the_scores_of_all_queries(tmp_path, monkeypatch):
    sizes = []
    softmax = torch.Tensor.log_softmax

    def spy(x, *arguments, **options):
        sizes.append(x.numel())
        return softmax(x, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "log_softmax", spy)
    model = tiny(block_size=256, n_layer=1)
    look_at_gpt(model, tmp_path)
    assert sizes
    assert max(sizes) <= 4 * 2 * QUERIES * 256


def test_parameters_are_grouped_by_the_block_that_they_are_in():
    assert group_of("transformer.h.11.mlp.c_fc.weight") == "transformer.h.11"
    assert group_of("transformer.wte.weight") == "transformer.wte"
    assert group_of("0.weight") == "0"
    assert group_of("scale") == "scale"
    record = {
        "gradients": {
            "h.0.a.weight": {"shape": [2, 3], "norm": 3.0},
            "h.0.b.weight": {"shape": [2, 5], "norm": 4.0},
            "h.0.b.bias": {"shape": [5], "norm": 1e9},
            "h.1.a.weight": {"shape": [2, 3], "norm": None},
        }
    }
    assert gradient_rms(record) == {"h.0": pytest.approx(math.sqrt(25 / 16)), "h.1": None}


# --- warnings, each from a model broken on purpose


def kinds(record: dict) -> set[str]:
    return {finding["text"].partition(":")[0] for finding in record["findings"]}


@pytest.mark.parametrize("n_layer", [1, 2, 12, 36])
def test_a_healthy_gpt_is_not_warned_of_at_its_initialisation(tmp_path, n_layer):
    torch.manual_seed(n_layer)
    assert look_at_gpt(tiny(n_layer=n_layer), tmp_path)["findings"] == []


@pytest.mark.parametrize("lr", [1e-3, 2e-2])
def test_a_healthy_gpt_is_not_warned_of_while_it_learns(tmp_path, lr):
    torch.manual_seed(0)
    model = tiny(n_layer=4)
    optimizer = make_optimizer(model, TrainConfig(lr=lr))
    said = []
    diagnostics = Diagnostics(model, optimizer, 20, tmp_path, say=said.append)
    x, y = tokens(model, 8)
    losses = []
    for step in range(1, 81):
        with diagnostics.observe(step) as observation:
            loss = model(x, y)[1]
            loss.backward()
            observation.gradients()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3, "it learns"
    records = read_history(diagnostics.history.path)
    assert [record["step"] for record in records] == [1, 20, 40, 60, 80]
    assert said == [finding for record in records for finding in record["findings"]] == []


def test_a_warning_is_given_when_the_units_of_a_layer_are_dead(tmp_path):
    torch.manual_seed(0)
    model, said = tiny(n_layer=3), []
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.bias.fill_(-20.0)
    record = look_at_gpt(model, tmp_path, said)
    assert record["activations"]["transformer.h.1.mlp.gelu"]["dead"] == 1
    assert "dead units" in kinds(record)
    (line,) = [line for line in said if "dead" in line]
    assert line.startswith("warning at step 1: dead units: transformer.h.1.mlp.gelu (100% of them)")


def test_a_warning_is_given_when_the_outputs_of_a_function_are_saturated(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(64, 32)
    record, said = look_at(nn.Sequential(linear(10), nn.Tanh(), linear(1)), x, tmp_path)
    assert kinds(record) == {"saturated outputs"}
    assert record["findings"][0]["layers"] == ["1"]
    assert len(said) == 1
    healthy, said = look_at(nn.Sequential(linear(1), nn.Tanh(), linear(1)), x, tmp_path)
    assert healthy["findings"] == said == []


def test_a_warning_is_given_when_the_softmax_of_attention_is_saturated(tmp_path):
    torch.manual_seed(0)
    model = tiny(n_layer=3)
    with torch.no_grad():
        model.transformer.h[2].attn.c_attn.weight.mul_(300)
    record = look_at_gpt(model, tmp_path)
    assert "saturated attention" in kinds(record)
    (found,) = [f for f in record["findings"] if f["kind"] == "saturated"]
    assert found["layers"] == ["transformer.h.2.attn"]


def test_a_warning_is_given_when_the_gradient_vanishes_in_a_deep_plain_stack(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(64, 32)
    record, said = look_at(stack(16, 1.0, nn.Sigmoid), x, tmp_path)
    assert "vanishing gradient" in kinds(record)
    (found,) = [f for f in record["findings"] if f["kind"] == "vanishing"]
    assert found["layers"][0] == "0"
    assert "30" not in found["layers"], "what is near the loss is well"
    assert any("vanishing gradient: 0 (" in line for line in said)
    shallow, _ = look_at(stack(2, 1.0, nn.Sigmoid), x, tmp_path)
    assert shallow["findings"] == []


def test_a_warning_is_given_when_the_gradient_explodes_on_its_way_back(tmp_path):
    torch.manual_seed(0)
    record, _ = look_at(stack(64, 3.0, nn.Tanh), torch.randn(64, 32), tmp_path)
    assert "exploding gradient" in kinds(record)
    (found,) = [f for f in record["findings"] if f["kind"] == "exploding"]
    assert found["layers"][0] == "0"
    assert "126" not in found["layers"], "what is near the loss is well"


@pytest.mark.parametrize(
    ("gain", "kind"), [(4.0, "exploding activations"), (0.3, "vanishing activations")]
)
def test_a_warning_is_given_when_the_signal_grows_or_fades_with_the_depth(tmp_path, gain, kind):
    torch.manual_seed(0)
    model = nn.Sequential(*(linear(gain) for _ in range(12)))
    record, _ = look_at(model, torch.randn(64, 32), tmp_path)
    assert kind in kinds(record)
    # Gradients with respect to the weights of a linear stack are of one size at any depth.
    assert {finding["kind"] for finding in record["findings"]} == {kind.split()[0]}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_warning_is_given_of_what_is_not_finite_and_the_record_is_json_all_the_same(
    tmp_path, bad
):
    model = tiny()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.bias[0] = bad
    record = look_at_gpt(model, tmp_path)
    assert "exploding values" in kinds(record)
    assert record["activations"]["transformer.h.1.mlp.c_fc"]["std"] is None

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    for line in (tmp_path / "diagnostics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    assert panels([record]), "they can be drawn, too"


def test_a_warning_is_given_once_and_again_only_after_it_was_untrue(tmp_path):
    model = nn.Sequential(linear(1), nn.ReLU(), linear(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    said = []
    diagnostics = Diagnostics(model, optimizer, 1, tmp_path, say=said.append)
    for step, bias in enumerate((-20.0, -20.0, 0.0, -20.0), start=1):
        with torch.no_grad():
            model[0].bias.fill_(bias)
        with diagnostics.observe(step):
            model(torch.randn(8, 32)).sum().backward()
            optimizer.step()
    dead = [line.split(":")[0] for line in said if "dead units" in line]
    assert dead == ["warning at step 1", "warning at step 4"]


# --- that looking changes nothing, and leaves nothing


@pytest.mark.parametrize("fails", [False, True], ids=["", "raises"])
def test_no_hook_is_left_behind_and_attention_is_what_it_was(tmp_path, fails):
    model = tiny()
    optimizer = make_optimizer(model, TrainConfig())
    diagnostics = Diagnostics(model, optimizer, 5, tmp_path, say=lambda text: None)
    attention = [block.attn.attention for block in model.transformer.h]

    def step(number: int) -> int:
        with diagnostics.observe(number):
            inside = len(hooks_of(model, optimizer))
            model(*tokens(model))[1].backward()
            optimizer.step()
            if fails:
                raise KeyboardInterrupt
        return inside

    assert fails or step(4) == 0, "not looked at: no hook at all"
    if fails:
        with pytest.raises(KeyboardInterrupt):
            step(5)
    else:
        assert step(5) > 10
    assert hooks_of(model, optimizer) == []
    assert [block.attn.attention for block in model.transformer.h] == attention
    assert len(read_history(tmp_path / "diagnostics.jsonl")) == (not fails)


def test_diagnostics_that_are_off_write_nothing(tmp_path):
    model = tiny()
    optimizer = make_optimizer(model, TrainConfig())
    diagnostics = Diagnostics(model, optimizer, 0, tmp_path / "run")
    diagnostics.start()
    for step in (0, 1, 2):
        with diagnostics.observe(step) as observation:
            assert hooks_of(model, optimizer) == []
            observation.gradients()
    diagnostics.draw()
    assert not (tmp_path / "run").exists()


def test_a_number_of_steps_below_0_is_refused(tmp_path):
    model = tiny()
    with pytest.raises(UsageError, match="at least 0 steps apart, got -1"):
        Diagnostics(model, make_optimizer(model, TrainConfig()), -1, tmp_path)
    with pytest.raises(UsageError, match="diagnostics must be at least 0, got -3"):
        TrainConfig(diagnostics=-3)


def test_a_compiled_model_is_seen_though_it_was_compiled_without_hooks(tmp_path):
    torch._dynamo.reset()
    model = tiny(n_layer=1)
    compiled = torch.compile(model, backend="eager")
    optimizer = make_optimizer(model, TrainConfig())
    x, y = tokens(model)
    compiled(x, y)[1].backward()
    diagnostics = Diagnostics(model, optimizer, 1, tmp_path)
    with diagnostics.observe(1):
        compiled(x, y)[1].backward()
        optimizer.step()
    record = read_history(diagnostics.history.path)[0]
    assert "transformer.h.0.mlp.gelu" in record["activations"]
    assert "transformer.h.0.attn" in record["attention"]
    torch._dynamo.reset()


def test_a_step_that_the_trainer_leaves_out_has_a_record_without_updates(tmp_path):
    model = tiny()
    optimizer = make_optimizer(model, TrainConfig())
    diagnostics = Diagnostics(model, optimizer, 1, tmp_path)
    with diagnostics.observe(1) as observation:
        model(*tokens(model))[1].backward()
        observation.gradients()
    (record,) = read_history(diagnostics.history.path)
    assert record["updates"] == {}
    assert record["gradients"]
    assert panels([record])


# --- in a run


def settings(tmp_path: Path, **changes) -> dict:
    (tmp_path / "text.txt").write_text(TEXT)
    small = {
        "data": str(tmp_path / "text.txt"), "tokenizer": "byte", "block_size": 16, "batch_size": 4,
        "dropout": 0.1, "steps": 9, "warmup": 5, "lr": 3e-3, "eval_interval": 6, "eval_batches": 1,
        "log_interval": 3, "device": "cpu", "threads": 1, "diagnostics": 3, "sample_tokens": 10,
    }  # fmt: skip
    return {**small, **changes}


def test_a_run_computes_the_same_numbers_with_diagnostics_and_samples_as_without(tmp_path):
    results = []
    for name, changes in (
        ("with", {"grad_accum": 2}),
        ("without", {"grad_accum": 2, "diagnostics": 0, "sample_tokens": 0}),
    ):
        trainer = make_trainer(settings(tmp_path, out=tmp_path / name, **changes))
        assert trainer.run() == 0
        results.append(load_checkpoint(tmp_path / name / "latest.safetensors")[0])
    assert results[0].keys() == results[1].keys()
    for key, tensor in results[0].items():
        assert torch.equal(tensor, results[1][key]), key
    records = read_history(tmp_path / "with" / "diagnostics.jsonl")
    assert [record["step"] for record in records] == [1, 3, 6, 9]
    drawn = sorted(file.name for file in (tmp_path / "with" / "diagnostics").iterdir())
    assert drawn == [
        "activations.png", "attention-entropy.png", "gradient-histogram.png", "gradient-norm.png",
        "units.png", "update-ratio.png",
    ]  # fmt: skip
    for file in (tmp_path / "with" / "diagnostics").iterdir():
        assert file.read_bytes().startswith(PNG)
    left = {file.name for file in (tmp_path / "without").iterdir()}
    assert not left & {"diagnostics.jsonl", "diagnostics", "samples.jsonl", "tensorboard"}


def test_a_resumed_run_does_not_repeat_what_no_checkpoint_kept(tmp_path):
    run = tmp_path / "run"
    make_trainer(settings(tmp_path, steps=6, out=run)).run()
    before = [read_history(run / name) for name in ("diagnostics.jsonl", "samples.jsonl")]
    for name in ("diagnostics.jsonl", "samples.jsonl"):  # a crash after the next steps
        with (run / name).open("a") as file:
            file.write('{"step":7}\n{"step":8,"te')
    make_trainer({"resume": run, "steps": 9})
    after = [read_history(run / name) for name in ("diagnostics.jsonl", "samples.jsonl")]
    assert after == before
    assert [record["step"] for record in before[0]] == [1, 3, 6]
    assert [record["step"] for record in before[1]] == [0, 6]
    assert len({record["prompt"] for record in before[1]}) == 1
    assert all(record["text"] for record in before[1])


def test_a_dead_layer_of_a_run_is_told_where_the_run_is_watched(tmp_path, capsys):
    trainer = make_trainer(settings(tmp_path, steps=2, out=tmp_path / "run"))
    with torch.no_grad():
        trainer.model.transformer.h[0].mlp.c_fc.bias.fill_(-30)
    trainer.run()
    out = capsys.readouterr().out
    assert "\nwarning at step 1: dead units: transformer.h.0.mlp.gelu (100% of them). They" in out


# --- files


def test_a_last_line_that_a_crash_cut_short_is_left_out_and_other_damage_is_an_error(tmp_path):
    history = HistoryFile(tmp_path / "x.jsonl")
    assert read_history(history.path) == []
    for step in (1, 2, 3):
        history.append({"step": step, "text": "é\u2028\n"})
    whole = history.path.read_bytes()
    history.path.write_bytes(whole[:-5])
    assert [record["step"] for record in read_history(history.path)] == [1, 2]
    history.start(last_step=1)
    assert read_history(history.path) == [{"step": 1, "text": "é\u2028\n"}]
    history.path.write_bytes(b'{"step":1\n' + whole)
    with pytest.raises(CheckpointError, match=r"x\.jsonl: line 1 is not JSON"):
        read_history(history.path)
    history.path.write_bytes(whole + b"[1]\n")
    with pytest.raises(CheckpointError, match="line 4 is no record with a step"):
        read_history(history.path)
    with pytest.raises(ValueError, match="JSON"):
        history.append({"step": 5, "x": math.nan})
    history.start()
    assert not history.path.exists()


def test_tensorboard_gets_the_histograms_and_ratios_that_the_file_has(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    torch.manual_seed(0)
    model = tiny()
    optimizer = make_optimizer(model, TrainConfig())
    diagnostics = Diagnostics(model, optimizer, 2, tmp_path, tensorboard=True)
    diagnostics.start()
    for step in (1, 2):
        with diagnostics.observe(step):
            model(*tokens(model))[1].backward()
            optimizer.step()
    record = read_history(diagnostics.history.path)[-1]
    events = EventAccumulator(
        str(tmp_path / "tensorboard"), size_guidance={"histograms": 0, "scalars": 0}
    )
    events.Reload()
    name = "transformer.h.1.mlp.c_fc.weight"
    histograms = events.Histograms(f"gradient/{name}")
    assert [event.step for event in histograms] == [1, 2]
    value = histograms[-1].histogram_value
    assert value.num == 32 * 128
    rms = math.sqrt(value.sum_squares / value.num)
    exact = record["gradients"][name]["norm"] / math.sqrt(32 * 128)
    assert rms == pytest.approx(exact, rel=0.2), "up to the width of the bins"
    (_, ratio) = events.Scalars(f"log10 of update to data/{name}")
    assert ratio.value == pytest.approx(record["updates"][name], rel=1e-5)
    assert events.Scalars("attention entropy/transformer.h.0.attn, head 1")
    diagnostics._writer.close()


@pytest.mark.parametrize(
    ("library", "extra"), [("tensorboard", "tensorboard"), ("matplotlib", "plot")]
)
def test_a_missing_library_is_an_error_that_names_its_extra(tmp_path, monkeypatch, library, extra):
    for module in list(sys.modules):
        if module.partition(".")[0] == library:
            monkeypatch.delitem(sys.modules, module)

    class Absent:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.partition(".")[0] == library:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(sys, "meta_path", [Absent, *sys.meta_path])
    expected = rf"needs the library '{library}'.*pip install 'fastgpt\[{extra}\]'"
    with pytest.raises(MissingExtraError, match=expected):
        make_trainer(settings(tmp_path, tensorboard=True, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# --- panels


def test_panels_show_what_the_records_have_and_say_it_in_words(tmp_path):
    record = look_at_gpt(tiny(), tmp_path)
    by_name = {panel.name: panel for panel in panels([record])}
    assert list(by_name) == [
        "activations", "units", "gradient-norm", "gradient-histogram", "update-ratio",
        "attention-entropy",
    ]  # fmt: skip
    entropy = record["attention"]["transformer.h.0.attn"]["entropy"]
    assert f"h.0.attn {sum(entropy) / 2:.3g}" in by_name["attention-entropy"].alt
    assert "1e-3" in by_name["update-ratio"].alt
    plain, _ = look_at(nn.Sequential(linear(1), nn.Tanh()), torch.randn(8, 32), tmp_path)
    names = [panel.name for panel in panels([plain])]
    assert "attention-entropy" not in names
    assert "units" in names
    assert panels([]) == []


def test_a_choice_of_many_is_spread_evenly_and_has_both_ends():
    assert some(range(11), 3) == [0, 5, 10]
    assert some(range(2), 3) == [0, 1]
    assert some(range(100), 5) == [0, 25, 50, 74, 99]
