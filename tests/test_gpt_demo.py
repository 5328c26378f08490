"""The demonstration, and its comparison of losses and attentions."""

import dataclasses
import math
import sys
import time

import pytest
import torch
from torch.nn import functional as F

from fastgpt.gpt import PRESETS, compare, demo
from fastgpt.gpt.compare import (
    FUSED,
    SECTIONS,
    VARIANTS,
    Measurement,
    Variant,
    compare_variants,
    table,
)
from fastgpt.gpt.train import load_config

TEXT = "".join(f"def f{i}(x):\n    return x + {i * 7919 % 1000}\n\n" for i in range(500))
TINY = dataclasses.replace(PRESETS["tiny"], vocab_size=512, block_size=16)


@pytest.fixture(autouse=True)
def _small(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setitem(PRESETS, "demo", TINY)
    settings = dataclasses.replace(
        demo.SETTINGS, data=str(tmp_path / "text.txt"), vocab_size=512, eval_batches=2, threads=1
    )
    monkeypatch.setattr(demo, "SETTINGS", settings)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # steps as small as these gain nothing from more
    yield
    torch.set_num_threads(threads)


def test_every_variants_step_has_the_same_loss_to_rounding(monkeypatch):
    monkeypatch.setattr(compare, "_peak_in_fresh_process", lambda *task: None)  # has its own test
    measurements = compare_variants(TINY, 4, repeats=9)
    assert tuple(measurements) == VARIANTS
    for m in measurements.values():
        assert m.loss == pytest.approx(measurements[FUSED].loss, rel=1e-6)
        assert m.loss == pytest.approx(math.log(512), abs=0.1)
        assert set(m.operation_ms) == set(SECTIONS)
        assert m.step_ms > max(m.operation_ms.values())
        assert min(m.operation_ms.values()) > 0


def test_a_variant_changes_one_operation_or_its_ratio_means_nothing():
    for operation, variants in SECTIONS.items():
        assert next(iter(variants.values())) == FUSED
        changed, fixed = (
            ("attention", "loss") if operation == "attention" else ("loss", "attention")
        )
        for name, variant in variants.items():
            assert getattr(variant, changed) == name
            assert getattr(variant, fixed) == getattr(FUSED, fixed)


def test_what_is_timed_calls_the_variants_loss_and_attention(monkeypatch):
    called = []

    def spy(choose):
        return lambda name: called.append(name) or choose(name)

    for function in ("loss_function", "attention_function"):
        monkeypatch.setattr(compare, function, spy(getattr(compare, function)))
    step = compare._training_step(TINY, 1)
    step(Variant(loss="naive", attention="explicit"))
    step(Variant(loss="torch", attention="fused"))
    assert called == ["explicit", "naive", "fused", "torch"]
    called.clear()
    compare._loss_alone(TINY, 1)(Variant(loss="naive"))
    compare._attention_alone(TINY, 1)(Variant(attention="explicit"))
    assert called == ["naive", "explicit"]


def test_the_time_of_every_loss_is_that_of_the_projection_too_or_they_do_not_compare():
    run = compare._loss_alone(TINY, 2)
    results = [run(variant) for variant in SECTIONS["projection + loss"].values()]
    assert [gradient.shape for gradient in results[0]] == [(2 * 16, 64), (512, 64)]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-7)


def test_attention_alone_runs_on_heads_that_lie_in_memory_as_the_models_do(monkeypatch):
    strides = []

    def record(q, k, v, **options):
        y = F.scaled_dot_product_attention(q, k, v, **options)
        y.register_hook(lambda upstream: strides.append(upstream.stride()))
        strides.extend(x.stride() for x in (q, k, v))
        return y

    monkeypatch.setattr(compare, "attention_function", lambda name: record)
    compare._training_step(TINY, 3)(FUSED)
    model = strides.copy()
    strides.clear()
    compare._attention_alone(TINY, 3)(FUSED)
    assert sorted(strides) == sorted(model)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("lean", "other", "shape", "tensor"),
    [
        # One more (N, V) in the written out form, and no (N, V) at all without logits.
        (Variant(loss="torch"), Variant(loss="naive"), {"vocab_size": 65_536}, 32 * 16 * 65_536),
        (FUSED, Variant(loss="cross_entropy"), {"vocab_size": 65_536}, 32 * 16 * 65_536),
        # (B, nh, T, T)
        (
            Variant(attention="torch"), Variant(attention="explicit"),
            {"block_size": 512, "n_layer": 1}, 32 * 2 * 512 * 512,
        ),
    ],
    ids=["naive", "logits", "attention"],
)  # fmt: skip
def test_peak_memory_counts_the_tensors_that_another_form_adds(lean, other, shape, tensor):
    config = dataclasses.replace(TINY, **shape)
    peaks = [compare._peak_in_fresh_process(v, config, batch_size=32) for v in (lean, other)]
    extra = tensor * 4 / 2**20
    assert peaks[1] > peaks[0] + 0.9 * extra
    assert peaks[0] < 5 * extra


def test_the_table_gives_ratios_to_the_fused_step_and_each_sections_own_operation():
    operation_ms = {"projection + loss": 5.0, "attention": 3.0}
    rows = {variant: Measurement(9.0, 125.0, operation_ms, 7.0) for variant in VARIANTS}
    rows[FUSED] = Measurement(9.0, 50.0, operation_ms, None)
    sections = [section.splitlines() for section in table(rows).split("\n\n")]
    assert [[line.split()[0] for line in lines[1:]] for lines in sections] == [
        ["linear_cross_entropy", "cross_entropy", "torch", "naive"],
        ["fused", "torch", "explicit"],
    ]
    for lines, operation in zip(sections, SECTIONS, strict=True):
        assert lines[0].startswith(operation)
        assert f"of it {operation}  " in lines[0]
    for lines, own in zip(sections, (" 5.0 ms", " 3.0 ms"), strict=True):
        assert len({len(line) for line in lines}) == 1, "the columns line up"
        assert "1.00x" in lines[1]
        assert "unknown" in lines[1]
        for line in lines[2:]:
            assert "2.50x" in line
            assert own in line
            assert "7 MiB" in line


def test_the_planned_steps_fill_the_time_that_is_left():
    assert demo.plan(demo.SETTINGS, 0, 200.0, 0.1).steps == 2000
    assert demo.plan(demo.SETTINGS, 300, 200.0, 0.1).steps == 2300
    late = demo.plan(demo.SETTINGS, 300, -5.0, 0.1)
    assert late.steps == 301, "it ends with the next step"
    short = demo.plan(demo.SETTINGS, 0, 20.0, 0.1)
    assert (short.steps, short.warmup) == (200, 20), "the warm-up is a tenth at most"


def test_a_wrong_first_guess_of_the_pace_is_corrected(tmp_path):
    settings = dataclasses.replace(demo.SETTINGS, steps=10**6)  # a guess that would take hours
    data = demo.load_dataset(settings.data, settings.tokenizer, settings.vocab_size)
    begin = time.monotonic()
    trainer = demo.TimedTrainer(settings, tmp_path / "run", data, until=begin + 4)
    assert trainer.run() == 0
    assert 2 < time.monotonic() - begin < 8
    assert trainer.step == trainer.config.steps == load_config(tmp_path / "run").steps < 10**5
    assert trainer.metrics.rows[-1].lr == 0, "the schedule came to its end"


def test_the_demonstration_trains_samples_and_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "_peak_in_fresh_process", lambda *task: None)  # would take it all
    out = tmp_path / "run"
    assert demo.main(["--minutes", "0.15", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    for function in ("linear_cross_entropy", "cross_entropy", "scaled_dot_product_attention"):
        assert f"\n{function} on cpu runs on" in text
    assert "ln(512) 6.238" in text
    assert "bigram model" in text
    for row in ("linear_cross_entropy", "cross_entropy", "naive", "explicit"):
        assert text.count(f"\n{row}  ") == 2, "the table, twice"
    assert "\ndef " in text, "the sample"
    assert (out / "loss.png").exists()
    assert (out / "latest.safetensors").exists()
    assert load_config(out).steps >= 20, "the planned steps, so that the run can be resumed"


def test_a_time_that_is_none_is_refused():
    with pytest.raises(ValueError, match="--minutes must be above 0"):
        demo.main(["--minutes", "0"])
