"""The demonstration, and its comparison of the three losses."""

import dataclasses
import json
import math
import subprocess
import sys
import time

import pytest
import torch

from fastgpt.gpt import PRESETS, compare, demo
from fastgpt.gpt.compare import Measurement, compare_losses, table
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


def test_the_three_losses_of_one_step_are_equal_to_rounding(monkeypatch):
    monkeypatch.setattr(compare, "_peak_in_fresh_process", lambda *task: None)  # has its own test
    measurements = compare_losses(TINY, 4, repeats=1)
    assert [m.name for m in measurements] == ["fused", "torch", "naive"]
    for m in measurements:
        assert m.loss == pytest.approx(measurements[0].loss, rel=1e-6)
        assert m.loss == pytest.approx(math.log(512), abs=0.1)
        assert m.step_ms > m.loss_ms > 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_counts_the_naive_losss_extra_tensors():
    task = {"config": vars(TINY) | {"vocab_size": 65_536}, "batch_size": 32, "threads": 1}
    peaks = {}
    for name in ("torch", "naive"):
        command = [sys.executable, "-m", "fastgpt.gpt.compare", "--peak"]
        result = subprocess.run(
            [*command, json.dumps({**task, "name": name})], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        peaks[name] = json.loads(result.stdout)
    logits = 32 * 16 * 65_536 * 4 / 2**20  # 128 MiB
    assert peaks["naive"] > peaks["torch"] + 0.9 * logits
    assert peaks["torch"] < 5 * logits


def test_the_table_gives_ratios_to_the_fused_loss():
    rows = [Measurement("fused", 9.0, 50.0, 5.0, None), Measurement("naive", 9.0, 125.0, 80.0, 7.0)]
    lines = table(rows).splitlines()
    assert "1.00x" in lines[1]
    assert "unknown" in lines[1]
    assert "2.50x" in lines[2]
    assert "7 MiB" in lines[2]


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


def test_the_demonstration_trains_samples_and_reports(tmp_path, capsys):
    out = tmp_path / "run"
    assert demo.main(["--minutes", "0.25", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "cross_entropy on cpu runs on" in text
    assert "ln(512) 6.238" in text
    assert "bigram model" in text
    assert text.count("fused") == text.count("naive") >= 2, "the table"
    assert "\ndef " in text, "the sample"
    assert (out / "loss.png").exists()
    assert (out / "latest.safetensors").exists()
    assert load_config(out).steps >= 20, "the planned steps, so that the run can be resumed"


def test_a_time_that_is_none_is_refused():
    with pytest.raises(ValueError, match="--minutes must be above 0"):
        demo.main(["--minutes", "0"])
