"""Training the reference GPT: the curve, exact resumption, and runs that end before their time."""

import contextlib
import csv
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fastgpt.gpt import GPT, GPTConfig, TrainConfig, train
from fastgpt.gpt.checkpoint import load_checkpoint, save_checkpoint
from fastgpt.gpt.config import LOSSES
from fastgpt.gpt.errors import CheckpointError, UsageError
from fastgpt.gpt.metrics import MetricsFile, Row, draw_loss, read_metrics
from fastgpt.gpt.optim import learning_rate, make_optimizer
from fastgpt.gpt.train import Trainer, load_config, main, make_trainer

TEXT = "".join(f"def f{i}(x):\n    return x + {i * 7919 % 1000}\n\n" for i in range(500))
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def text(tmp_path, monkeypatch) -> Iterator[Path]:
    monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # steps as small as these gain nothing from more
    yield path
    torch.set_num_threads(threads)


def options(text: Path, **changes: object) -> dict[str, object]:
    small = {
        "data": str(text), "tokenizer": "byte", "block_size": 16, "batch_size": 4, "dropout": 0.1,
        "steps": 20, "warmup": 5, "lr": 3e-3, "eval_interval": 8, "eval_batches": 2,
        "log_interval": 5, "device": "cpu", "threads": 1,
    }  # fmt: skip
    return {**small, **changes}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "fastgpt.gpt.train", *map(str, arguments)]


def flags(settings: dict[str, object]) -> list[str]:
    return [s for k, v in settings.items() for s in (f"--{k.replace('_', '-')}", str(v))]


def interrupt_after(trainer: Trainer, step: int) -> None:
    """Send this process a Ctrl-C in the middle of a step."""
    train_step = trainer.train_step

    def step_with_interrupt() -> None:
        if trainer.step == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        train_step()

    trainer.train_step = step_with_interrupt  # type: ignore[method-assign]


def comparable(rows: list[Row]) -> list[tuple]:
    """Rows without what the clock decides."""
    return [(r.step, r.tokens, r.train_loss, r.val_loss, r.lr, r.grad_norm) for r in rows]


# --- the optimiser


def test_learning_rate_rises_in_a_line_and_falls_in_half_a_cosine():
    config = TrainConfig(steps=101, warmup=20, lr=1.0, min_lr=0.2)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert rates[20] == 1.0
    assert rates[60] == pytest.approx(0.6), "halfway down in the middle"
    assert rates[100] == pytest.approx(0.2)
    falls = [a - b for a, b in pairwise(rates[20:])]
    assert min(falls) > 0
    assert falls.index(max(falls)) == pytest.approx(40, abs=1), "steepest in the middle"
    assert learning_rate(500, config) == 0.2


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_learning_rate_is_in_range_when_the_warm_up_is_longer_than_the_run(steps):
    config = TrainConfig(steps=steps, warmup=3, lr=1.0)
    assert all(0 < learning_rate(step, config) <= 1 for step in range(steps))


def test_only_matrices_decay():
    model = GPT(GPTConfig(vocab_size=11, block_size=4, n_layer=1, n_head=1, n_embd=8))
    decayed, others = make_optimizer(model, TrainConfig(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {
        "transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.attn.c_attn.weight",
        "transformer.h.0.attn.c_proj.weight", "transformer.h.0.mlp.c_fc.weight",
        "transformer.h.0.mlp.c_proj.weight",
    }  # fmt: skip
    assert len(decayed["params"]) + len(others["params"]) == len(names)
    assert all("ln_" in names[id(p)] or "bias" in names[id(p)] for p in others["params"])


def test_the_gradient_is_clipped_and_its_norm_before_that_is_recorded(text, tmp_path):
    trainer = make_trainer(options(text, steps=1, grad_clip=1e-3, warmup=0, out=tmp_path / "run"))
    norms = []
    step = trainer.optimizer.step

    def spy():
        gradients = [p.grad.flatten() for p in trainer.model.parameters()]
        norms.append(torch.cat(gradients).norm().item())
        step()

    trainer.optimizer.step = spy
    trainer.run()
    assert norms == [pytest.approx(1e-3, rel=1e-3)]
    assert trainer.metrics.rows[-1].grad_norm > 0.1


# --- learning


def test_a_model_can_learn_one_batch_by_heart():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50, block_size=16, n_layer=1, n_head=2, n_embd=64))
    optimizer = make_optimizer(model, TrainConfig(lr=3e-3, weight_decay=0.0))
    x, y = torch.randint(50, (2, 4, 16))
    x[:, 0] = torch.arange(4)  # or two sequences could begin alike and go on differently
    for _ in range(100):
        loss = model(x, y)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02


def test_training_beats_the_bigram_model_on_held_out_text(text, tmp_path):
    settings = options(text, steps=150, block_size=32, batch_size=8, dropout=0.0, lr=1e-2)
    settings |= {"eval_interval": 150, "log_interval": 50, "eval_batches": 10}
    trainer = make_trainer({**settings, "out": tmp_path / "run"})
    assert trainer.run() == 0
    first, last = trainer.metrics.rows[0], trainer.metrics.rows[-1]
    assert first.val_loss == pytest.approx(math.log(256), abs=0.1)
    assert last.val_loss < 0.9 * trainer.bigram_loss


def test_training_follows_the_same_curve_with_every_loss(text, tmp_path):
    curves = {}
    for loss in LOSSES:
        settings = options(text, steps=40, log_interval=1, eval_interval=40, loss=loss)
        trainer = make_trainer({**settings, "out": tmp_path / loss})
        trainer.run()
        curves[loss] = torch.tensor([row.train_loss for row in trainer.metrics.rows[1:]])
    expected = curves.pop("torch")
    assert expected[-1] < expected[0] - 1, "there is a curve"
    for curve in curves.values():
        torch.testing.assert_close(curve, expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("loss", [None, *LOSSES])
def test_a_run_trains_with_the_loss_asked_for_and_by_default_without_logits(
    text, tmp_path, monkeypatch, loss
):
    asked = []

    def record(name):
        asked.append(name)
        return lambda x, weight, targets: x.new_tensor(7.0)

    monkeypatch.setattr(train, "loss_function", record)
    chosen = {} if loss is None else {"loss": loss}
    trainer = make_trainer({**options(text), **chosen, "out": tmp_path / "run"})
    assert asked == [loss or "linear_cross_entropy"]
    assert trainer.evaluate() == 7.0


def test_two_micro_batches_give_the_gradient_of_one_twice_as_large(text, tmp_path):
    trainer = make_trainer(options(text, grad_accum=2, dropout=0.0, steps=1, out=tmp_path / "a"))
    with torch.no_grad():
        expected = (trainer._loss(0, 0) + trainer._loss(0, 1)) / 2
    trainer.train_step()
    assert trainer.sums[0].item() == pytest.approx(expected.item(), rel=1e-6)


def test_bfloat16_trains_like_float32_to_its_precision(text, tmp_path):
    losses = []
    for dtype in ("float32", "bfloat16"):
        trainer = make_trainer(options(text, dtype=dtype, out=tmp_path / dtype))
        trainer.run()
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
        losses.append(trainer.metrics.rows[-1].val_loss)
    assert losses[0] != losses[1], "or autocast did nothing"
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_evaluating_changes_nothing_and_is_the_same_twice(text, tmp_path):
    trainer = make_trainer(options(text, dropout=0.5, out=tmp_path / "run"))
    state = torch.get_rng_state()
    first = trainer.evaluate()
    assert trainer.evaluate() == first
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


# --- stopping and resuming


@pytest.mark.parametrize("stop_after", [8, 13], ids=["at an evaluation", "between two rows"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(text, tmp_path, stop_after):
    straight = make_trainer(options(text, out=tmp_path / "straight"))
    assert straight.run() == 0
    stopped = make_trainer(options(text, out=tmp_path / "stopped"))
    interrupt_after(stopped, stop_after)
    assert stopped.run() == 130
    assert stopped.step == stop_after
    torch.manual_seed(0)  # nothing may hang on what the process did before
    resumed = make_trainer({"resume": tmp_path / "stopped"})
    assert resumed.step == stop_after
    assert resumed.run() == 0

    name = "latest.safetensors"
    expected, expected_state = load_checkpoint(tmp_path / "straight" / name)
    tensors, state = load_checkpoint(tmp_path / "stopped" / name)
    assert tensors.keys() == expected.keys()
    for key, tensor in tensors.items():
        assert torch.equal(tensor, expected[key]), key
    assert state["best_val"] == expected_state["best_val"]
    rows = read_metrics(tmp_path / "stopped" / "metrics.csv")
    assert comparable(rows) == comparable(straight.metrics.rows)
    assert [row.step for row in rows] == [0, 5, 8, 10, 15, 16, 20]


def test_dropout_is_part_of_what_resumes(text, tmp_path):
    """Guards the test above: without the generator's state the curves would part."""
    trainer = make_trainer(options(text, out=tmp_path / "run"))
    interrupt_after(trainer, 8)
    trainer.run()
    resumed = make_trainer({"resume": tmp_path / "run"})
    torch.manual_seed(0)  # spoils the state that was restored
    resumed.run()
    straight = make_trainer(options(text, out=tmp_path / "straight"))
    straight.run()
    assert resumed.metrics.rows[-1].train_loss != straight.metrics.rows[-1].train_loss


def test_rows_past_the_checkpoint_are_dropped_when_resuming(text, tmp_path):
    """As after a crash between two checkpoints."""
    run = tmp_path / "run"
    trainer = make_trainer(options(text, steps=8, out=run))
    trainer.run()
    rows = read_metrics(run / "metrics.csv")
    with (run / "metrics.csv").open("a") as file:
        file.write("10,640,9.9,,0.001,1.0,100.0,1.0\n12,768,9.")
    resumed = make_trainer({"resume": run, "steps": 9})
    assert read_metrics(run / "metrics.csv") == rows == resumed.metrics.rows


def test_more_steps_can_be_asked_for_and_done_steps_are_not_repeated(text, tmp_path, capsys):
    run = tmp_path / "run"
    make_trainer(options(text, steps=6, out=run)).run()
    assert main(["--resume", str(run)]) == 0
    assert "nothing to do: 6 steps are done" in capsys.readouterr().out
    assert main(["--resume", str(run), "--steps", "8"]) == 0
    assert load_config(run).steps == 8
    assert [row.step for row in read_metrics(run / "metrics.csv")] == [0, 5, 6, 8]


def test_a_save_that_fails_leaves_the_checkpoint_before_it(text, tmp_path, monkeypatch):
    run = tmp_path / "run"
    trainer = make_trainer(options(text, steps=8, out=run))
    trainer.run()
    before = (run / "latest.safetensors").read_bytes()

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", fail)
        with pytest.raises(OSError, match="No space left"):
            trainer.save()
    assert (run / "latest.safetensors").read_bytes() == before
    assert not [file for file in run.iterdir() if file.name.startswith(".")]
    assert make_trainer({"resume": run}).step == 8


@pytest.mark.parametrize("damage", ["truncated", "empty", "header", "one bit of a weight"])
def test_a_damaged_checkpoint_is_an_error_that_names_the_file(tmp_path, damage):
    path = tmp_path / "latest.safetensors"
    save_checkpoint(path, {"model/w": torch.arange(1000.0)}, {"step": 1})
    assert load_checkpoint(path)[1] == {"step": 1}
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        data = data[:-100]
    elif damage == "empty":
        data = bytearray()
    elif damage == "header":
        data[20] ^= 0xFF
    else:
        data[-50] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"latest\.safetensors"):
        load_checkpoint(path)


def test_a_checkpoint_is_plain_tensors_and_json(text, tmp_path):
    make_trainer(options(text, steps=2, out=tmp_path / "run")).run()
    with safe_open(tmp_path / "run" / "latest.safetensors", framework="pt") as file:
        names = set(file.keys())
        saved = json.loads(file.metadata()["metadata"])
    assert {"model/transformer.wte.weight", "rng/cpu", "progress"} <= names
    assert "optimizer/exp_avg/transformer.wte.weight" in names
    assert "model/lm_head.weight" not in names, "the tied matrix is there once"
    assert saved["model"]["block_size"] == 16


def test_the_best_checkpoint_is_of_the_lowest_validation_loss(text, tmp_path, monkeypatch):
    run = tmp_path / "run"
    trainer = make_trainer(options(text, steps=4, eval_interval=1, out=run))
    losses = iter([5.0, 4.0, 2.0, 3.0, 2.5])
    monkeypatch.setattr(trainer, "evaluate", lambda: next(losses))
    trainer.run()
    assert load_checkpoint(run / "best.safetensors")[1]["step"] == 2
    assert load_checkpoint(run / "latest.safetensors")[1]["step"] == 4


def test_a_run_whose_loss_was_named_fused_goes_on_with_the_loss_that_it_had(text, tmp_path):
    straight = make_trainer(options(text, loss="cross_entropy", out=tmp_path / "straight"))
    straight.run()
    stopped = make_trainer(options(text, loss="cross_entropy", out=tmp_path / "run"))
    interrupt_after(stopped, 13)
    stopped.run()
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "loss": "fused"}))
    resumed = make_trainer({"resume": tmp_path / "run"})
    assert resumed.config.loss == load_config(tmp_path / "run").loss == "cross_entropy"
    resumed.run()
    assert comparable(resumed.metrics.rows) == comparable(straight.metrics.rows)


def test_what_cannot_be_resumed_is_refused(text, tmp_path):
    run = tmp_path / "run"
    make_trainer(options(text, steps=1, out=run)).run()
    with pytest.raises(UsageError, match="already holds a run"):
        make_trainer(options(text, out=run))
    with pytest.raises(UsageError, match="has block_size 16, which can't become 32"):
        make_trainer({"resume": run, "block_size": 32})
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        make_trainer({"resume": tmp_path})
    text.write_text(TEXT + "more")
    with pytest.raises(CheckpointError, match="trained on another text"):
        make_trainer({"resume": run})


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(text, tmp_path):
    run = tmp_path / "run"
    trainer = make_trainer(options(text, out=run))
    loss_fn = trainer.loss_fn
    trainer.loss_fn = lambda *tensors: loss_fn(*tensors) * (math.nan if trainer.step > 9 else 1)
    with pytest.raises(UsageError, match="the loss is nan by step 15"):
        trainer.run()
    tensors, saved = load_checkpoint(run / "latest.safetensors")
    assert saved["step"] == 8
    assert all(t.isfinite().all() for n, t in tensors.items() if n.startswith("model/"))


# --- what a run leaves, and what it says


def test_metrics_have_the_promised_columns_and_the_plot_is_a_png(text, tmp_path):
    run = tmp_path / "run"
    make_trainer(options(text, steps=10, out=run)).run()
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "step", "tokens", "train_loss", "val_loss", "lr", "grad_norm", "tokens_per_s", "seconds",
        "mfu", "skipped",
    ]  # fmt: skip
    assert [(row["step"], row["tokens"]) for row in rows] == [
        ("0", "0"), ("5", "320"), ("8", "512"), ("10", "640"),
    ]  # fmt: skip
    assert [bool(row["val_loss"]) for row in rows] == [True, False, True, True]
    assert (run / "loss.png").read_bytes().startswith(PNG)


def test_a_plot_can_be_drawn_of_nothing_yet(tmp_path):
    draw_loss(tmp_path / "loss.png", [], 256)
    assert (tmp_path / "loss.png").read_bytes().startswith(PNG)


def test_metrics_survive_being_read_back(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.csv")
    metrics.start()
    rows = [
        Row(0, 0, None, 1 / 3, 1e-5, None, None, 0.0),
        Row(5, 640, 0.1, None, 1e-3, 2.0, 9.5, 1.0),
    ]
    for row in rows:
        metrics.append(row)
    assert read_metrics(metrics.path) == rows


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(text, tmp_path):
    run = tmp_path / "run"
    settings = options(text, steps=100_000, eval_interval=100_000)
    process = subprocess.Popen(
        command(*flags(settings), "--out", run),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step     10/"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == ""
    message = out.splitlines()[-1]
    assert message.startswith("stopped after step ")
    assert message.endswith(f"--resume {run}")
    trainer = make_trainer({"resume": run})
    assert trainer.step >= 10
    assert f"step {trainer.step:,} of 100,000" in message


def test_piped_output_is_one_line_per_interval_without_control_characters(text, tmp_path):
    settings = options(text, steps=20, eval_interval=10)
    result = subprocess.run(
        command(*flags(settings), "--out", tmp_path / "run"), capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert not {"\r", "\x1b"} & set(result.stdout)
    lines = [line for line in result.stdout.splitlines() if line.startswith("step ")]
    assert [line.split("/")[0].split()[1] for line in lines] == ["0", "5", "10", "15", "20"]
    assert all("tokens/s" in line and "loss" in line for line in lines[1:])
    assert all(" left" in line for line in lines[1:-1])


def test_a_terminal_shows_a_bar_with_loss_speed_and_time_left(text, tmp_path):
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    reader, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    settings = options(text, steps=20, eval_interval=10)
    with subprocess.Popen(
        command(*flags(settings), "--out", tmp_path / "run"), stdout=terminal, stderr=terminal,
    ) as process:  # fmt: skip
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):  # how Linux says that the other end has closed
            while part := os.read(reader, 4096):
                shown += part
    os.close(reader)
    assert process.returncode == 0
    bars = "".join(part for part in shown.decode().split("\r") if "|" in part)
    # At step 10 it is drawn in any case, at 15 only if the steps before took a tenth of a second.
    assert re.search(
        r"(50|75)%.*1[05]/20, loss \d\.\d{4}, [\d,]+ tokens/s, \d\d:\d\d left", bars
    ), bars


def test_a_reader_that_goes_away_ends_the_run_without_a_trace(text, tmp_path):
    run = tmp_path / "run"
    with subprocess.Popen(
        command(*flags(options(text, steps=100_000, eval_interval=100_000)), "--out", run),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if process.poll() is None:
            process.kill()
        assert process.stderr.read() == ""
        assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "-1"], "error: lr must be above 0, got -1.0"),
        (["--data", "/no/such/text"], "error: --data /no/such/text: no such file or folder"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_status_2(arguments, message):
    result = subprocess.run(command(*arguments), capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", message + "\n")
