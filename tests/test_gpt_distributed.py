"""Training on two processes: the curve of one, its checkpoints, and how such runs end.

All cases of two processes in the same program run in one start of them, in float64: there nothing
but the order of sums differs, and the tolerance of 90 roundings, after 8 steps in which AdamW can
amplify them, lets no missing part or wrong factor pass.
"""

import functools
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgpt.gpt.checkpoint import load_checkpoint
from fastgpt.gpt.errors import UsageError
from fastgpt.gpt.metrics import Row, read_metrics
from fastgpt.gpt.train import Trainer, make_trainer

TEXT = "# " + "".join(f"def f{i}(x):\n    return x + {i * 7919 % 1000}\n\n" for i in range(500))
LATEST = "latest.safetensors"
TOLERANCE = 2e-14  # of float64: 90 units in the last place; 13 were found
SETTINGS: dict[str, Any] = {
    "tokenizer": "char", "block_size": 16, "batch_size": 4, "steps": 8, "warmup": 3, "lr": 3e-3,
    "eval_interval": 4, "eval_batches": 2, "log_interval": 1, "device": "cpu", "threads": 1,
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fsdp": {"fsdp": True},
    "tensor-parallel": {"tensor_parallel": True},
    "fsdp, tensor-parallel": {"fsdp": True, "tensor_parallel": True},
}
# What is trained, by one process and by two in each of the ways that `WAYS` names.
RECIPES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a batch": ({}, tuple(WAYS)),
    "micro-batches": ({"grad_accum": 2}, ("plain", "fsdp")),
    "blocks again": ({"checkpoint_activations": True}, ("fsdp", "tensor-parallel")),
    "of logits": ({"loss": "cross_entropy"}, ("tensor-parallel",)),
    "bfloat16": ({"dtype": "bfloat16"}, ("plain", "fsdp", "tensor-parallel")),
    "clipped": ({"grad_clip": 0.05}, ("fsdp", "fsdp, tensor-parallel")),
}
REFERENCES = {recipe: recipe for recipe in RECIPES}
# The compiler is to change nothing; it takes the longest, and so runs once.
RECIPES["compiled"] = ({"compile": True}, ("tensor-parallel",))
REFERENCES["compiled"] = "a batch"
RECIPES["watched"] = ({"diagnostics": 2}, ("plain",))
REFERENCES["watched"] = "a batch"
CASES = [(recipe, way) for recipe, (_, ways) in RECIPES.items() for way in ways]
STOPPED = ("plain", "fsdp, tensor-parallel")
RESUMED = list(zip(WAYS, [*list(WAYS)[1:], "plain"], strict=True))  # each once as either


def settings(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    return {**SETTINGS, "data": str(folder / "text.txt"), "out": folder / name, **changes}


def train(folder: Path, recipe: str, name: str, changes: dict[str, Any]) -> Trainer:
    """Of float64, which autocast leaves alone; so where that is meant, of float32."""
    torch.set_default_dtype(torch.float32 if recipe == "bfloat16" else torch.float64)
    trainer = make_trainer(settings(folder, name, **changes))
    assert trainer.run() == 0
    torch.set_default_dtype(torch.float64)
    return trainer


def stop_at(trainer: Trainer, step: int) -> Trainer:
    """Have the process get a SIGTERM in the middle of a step."""
    train_step = trainer.train_step

    def step_with_signal() -> None:
        if trainer.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        train_step()

    trainer.train_step = step_with_signal  # type: ignore[method-assign]
    return trainer


def work(rank: int, size: int, folder: Path) -> None:
    """All that the tests look at, on one of two processes; an error ends both."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
        "FASTGPT_CACHE": str(folder / "cache"),
    }  # fmt: skip
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=size
    )
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    Trainer.draw = lambda self: None  # type: ignore[method-assign]
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    for recipe, way in CASES:
        changes = RECIPES[recipe][0] | WAYS[way]
        trainer = train(folder, recipe, f"{recipe}, {way}", changes)
        if recipe == "a batch":
            sizes = [
                sum(t.to_local().numel() if hasattr(t, "to_local") else t.numel() for t in tensors)
                for tensors in (
                    trainer.model.parameters(),
                    (s["exp_avg"] for s in trainer.optimizer.state.values()),
                )
            ]
            torch.save(sizes, folder / f"{way}-{rank}.pt")

    # Stopped by a signal that one of the processes gets, and resumed by both, another way too.
    for way in STOPPED:
        trainer = make_trainer(settings(folder, f"stopped, {way}", **WAYS[way], dropout=0.1))
        assert (stop_at(trainer, 6) if rank == 1 else trainer).run() == 128 + signal.SIGTERM
        assert trainer.step == 6
        trainer = make_trainer(settings(folder, f"straight, {way}", **WAYS[way], dropout=0.1))
        trainer.run()
        torch.manual_seed(0)
        trainer = make_trainer({"resume": folder / f"stopped, {way}"})
        assert trainer.step == 6
        trainer.run()
    for first, second in RESUMED:
        name = f"{first}, then {second}"
        off = dict.fromkeys(("fsdp", "tensor_parallel"), False)
        trainer = make_trainer(settings(folder, name, **WAYS[first]))
        if rank == 0:
            stop_at(trainer, 6)
        trainer.run()
        make_trainer({"resume": folder / name, **off, **WAYS[second]}).run()
    trainer = make_trainer(settings(folder, "two, then one", **WAYS["fsdp"]))
    (stop_at(trainer, 6) if rank == 0 else trainer).run()
    make_trainer({"resume": folder / "one, then two", **WAYS["tensor-parallel"]}).run()

    # What only one of them sees leads both to the same.
    trainer = make_trainer(settings(folder, "spikes", skip_spikes=5.0, fsdp=True))
    loss_fn = trainer.loss_fn
    trainer.loss_fn = lambda *t: (
        loss_fn(*t)
        * (float("nan") if rank == 1 and trainer.model.training and trainer.step == 4 else 1)
    )
    trainer.run()
    torch.save(trainer.spikes.skipped, folder / f"skipped-{rank}.pt")
    messages = []
    for changes in (
        {"batch_size": 3},
        {"tensor_parallel": True, "loss": "torch"},
        {"fsdp": True, "diagnostics": 2},
    ):
        try:
            make_trainer(settings(folder, "wrong", **changes))
        except UsageError as error:
            messages.append(str(error))
    torch.save(messages, folder / f"messages-{rank}.pt")
    torch.distributed.destroy_process_group()


def guarded_work(rank: int, size: int, folder: Path) -> None:
    try:
        work(rank, size, folder)
    except BaseException:  # the other would wait for this one
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """Runs of one process, and of two."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(TEXT)
    threads, dtype, cache = (
        torch.get_num_threads(), torch.get_default_dtype(), os.environ.get("FASTGPT_CACHE"),
    )  # fmt: skip
    os.environ["FASTGPT_CACHE"] = str(folder / "cache")
    try:
        for recipe in sorted(set(REFERENCES.values())):
            train(folder, recipe, recipe, RECIPES[recipe][0])
        stop_at(make_trainer(settings(folder, "one, then two")), 6).run()
        context = torch.multiprocessing.spawn(guarded_work, (2, folder), nprocs=2, join=False)
        try:
            while not context.join(timeout=5):
                pass
        except torch.multiprocessing.ProcessExitedException:
            pytest.fail("".join(f.read_text() for f in sorted(folder.glob("error-*"))))
        make_trainer({"resume": folder / "two, then one", "fsdp": False}).run()
        yield folder
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        del os.environ["FASTGPT_CACHE"]
        if cache is not None:
            os.environ["FASTGPT_CACHE"] = cache


def rows(run: Path) -> list[Row]:
    return read_metrics(run / "metrics.csv")


def assert_same_curve(run: Path, reference: Path, tolerance: float = TOLERANCE) -> None:
    found, expected = rows(run), rows(reference)
    assert [row.step for row in found] == [row.step for row in expected] == [*range(9)]
    for a, b in zip(found, expected, strict=True):
        assert (a.val_loss is None) == (b.val_loss is None) == bool(a.step % 4)
        if a.val_loss:
            assert a.val_loss == pytest.approx(b.val_loss, rel=tolerance, abs=0), b.step
        if b.step:
            assert a.train_loss == pytest.approx(b.train_loss, rel=tolerance, abs=0), b.step
            assert a.grad_norm == pytest.approx(b.grad_norm, rel=tolerance, abs=0), b.step


def assert_same_checkpoint(run: Path, reference: Path, tolerance: float) -> None:
    for name in (LATEST, "best.safetensors"):
        found, state = load_checkpoint(run / name)
        expected, expected_state = load_checkpoint(reference / name)
        assert state["step"] == expected_state["step"]
        assert state["model"] == expected_state["model"]
        names = {n for n in found if not n.startswith("rng/")}
        assert names == {n for n in expected if not n.startswith("rng/")}
        for n in names:
            torch.testing.assert_close(
                found[n],
                expected[n],
                rtol=tolerance,
                atol=tolerance,
                msg=lambda m, n=n: f"{n}: {m}",
            )


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "way"), CASES)
def test_two_processes_have_another_curve_than_one_on_the_same_batches(folder, recipe, way):
    # bfloat16 rounds the gradients of matrices, 8 bits, before the processes' are added.
    tolerance = 2**-8 if recipe == "bfloat16" else TOLERANCE
    assert_same_curve(folder / f"{recipe}, {way}", folder / REFERENCES[recipe], tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_of_two_processes_holds_parts_or_other_numbers(folder, way):
    """Weights and moments are of the size of the updates of AdamW, which divides by roots."""
    assert_same_checkpoint(folder / f"a batch, {way}", folder / "a batch", 1e-12)


@pytest.mark.slow
def test_what_is_shared_out_lies_on_every_process(folder):
    sizes = {way: [torch.load(folder / f"{way}-{r}.pt") for r in range(2)] for way in WAYS}
    (whole, _), _ = sizes["plain"]
    assert sizes["plain"] == [[whole, whole]] * 2
    tensors, saved = load_checkpoint(folder / "a batch" / LATEST, prefix="model/")
    assert whole == sum(t.numel() for t in tensors.values())
    C, V = saved["model"]["n_embd"], saved["model"]["vocab_size"]
    assert V % 2, "or no slice is larger than the other"
    for way in WAYS:
        if way != "plain":
            total = whole if "fsdp" in way else 2 * whole - V * C
            assert [sum(of_rank[i] for of_rank in sizes[way]) for i in (0, 1)] == [total] * 2
    halves = [parameters for parameters, _ in sizes["fsdp"]]
    assert max(halves) < 0.55 * whole


@pytest.mark.slow
@pytest.mark.parametrize("way", STOPPED)
def test_a_signal_to_one_process_stops_it_alone_or_resuming_is_not_exact(folder, way):
    """Stopped at the same step, with one process's signal; resumed bit for bit, with dropout."""
    stopped, straight = folder / f"stopped, {way}", folder / f"straight, {way}"
    found, expected = load_checkpoint(stopped / LATEST)[0], load_checkpoint(straight / LATEST)[0]
    assert found.keys() == expected.keys()
    assert {"rng/cpu", "rng/cpu/1"} <= found.keys()
    assert not torch.equal(found["rng/cpu"], found["rng/cpu/1"]), "both drop the same"
    for name in found:
        assert torch.equal(found[name], expected[name]), name
    assert [(r.train_loss, r.val_loss, r.grad_norm) for r in rows(stopped)] == [
        (r.train_loss, r.val_loss, r.grad_norm) for r in rows(straight)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), RESUMED)
def test_a_checkpoint_can_be_resumed_in_the_way_it_was_written_only(folder, first, second):
    assert_same_curve(folder / f"{first}, then {second}", folder / "a batch")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two, then one", "one, then two"])
def test_a_checkpoint_can_be_resumed_by_as_many_processes_only(folder, name):
    assert_same_curve(folder / name, folder / "a batch")


@pytest.mark.slow
def test_a_spike_that_one_process_sees_parts_them(folder):
    assert [torch.load(folder / f"skipped-{r}.pt") for r in range(2)] == [1, 1]
    found, expected = rows(folder / "spikes"), rows(folder / "a batch")
    assert [row.skipped for row in found] == [0] * 5 + [1] * 4
    assert found[5].train_loss is None
    assert [r.train_loss for r in found[1:5]] == pytest.approx(
        [r.train_loss for r in expected[1:5]], rel=TOLERANCE
    )
    assert found[-1].train_loss != expected[-1].train_loss


@pytest.mark.slow
def test_settings_that_two_processes_cannot_share_are_taken(folder):
    for rank in range(2):
        batch, loss, looks = torch.load(folder / f"messages-{rank}.pt")
        assert "batch_size must be a multiple of the number of processes" in batch
        assert "got 3 and 2" in batch
        assert "needs the loss linear_cross_entropy or cross_entropy, got 'torch'" in loss
        assert "--diagnostics looks at whole parameters, and --fsdp shares them out" in looks
    assert not (folder / "wrong").exists()


@pytest.mark.parametrize("name", ["fsdp", "tensor_parallel"])
def test_one_process_shares_out_a_model_with_nobody(tmp_path, monkeypatch, threads, name):
    monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TEXT)
    option = name.replace("_", "-")
    with pytest.raises(UsageError, match=rf"--{option} .*torchrun --standalone.*--no-{option}"):
        make_trainer(settings(tmp_path, "run", **{name: True}))
    assert not (tmp_path / "run").exists()


# --- torchrun


def environment(folder: Path) -> dict[str, str]:
    path = ":".join(filter(None, sys.path))
    return {**os.environ, "FASTGPT_CACHE": str(folder / "cache"), "PYTHONPATH": path}


def torchrun(folder: Path, *arguments: object) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        "-m", "fastgpt.gpt.train", *arguments,
    ]  # fmt: skip
    return subprocess.Popen(
        [str(word) for word in command], cwd=folder, text=True,
        env=environment(folder),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def flags(**changes: Any) -> list[str]:
    return [
        word
        for name, value in {**SETTINGS, **changes}.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]


@pytest.mark.slow
def test_torchrun_talks_twice_or_a_sigterm_leaves_no_checkpoint(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    changes = {"data": "text.txt", "steps": 100_000, "eval_interval": 100_000, "log_interval": 5}
    process = torchrun(tmp_path, *flags(**changes), "--fsdp")
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step     10/"):
            break
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    lines += out.splitlines()
    assert process.returncode != 0
    assert sum(line.startswith("run folder: runs/tiny-") for line in lines) == 1, err
    assert sum(line.startswith("step      0/") for line in lines) == 1
    assert "2 x cpu" in "".join(lines)
    assert lines[-1].startswith("stopped after step "), err
    (run,) = (tmp_path / "runs").iterdir()
    step = load_checkpoint(run / LATEST)[1]["step"]
    assert step >= 10
    assert f"stopped after step {step:,} of" in lines[-1]
    assert not [file for file in run.iterdir() if file.name.startswith(".")]


FAILING = """
import os, runpy, sys
import fastgpt.gpt.data
random_batch = fastgpt.gpt.data.random_batch
def fail(*arguments):
    if arguments[3][-1] == 7 and os.environ["RANK"] == "1":
        raise OSError(5, "the disk of rank 1 has gone")
    return random_batch(*arguments)
fastgpt.gpt.data.random_batch = fail
runpy.run_module("fastgpt.gpt.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_a_process_that_fails_leaves_the_other_waiting_or_its_error_unsaid(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "failing.py").write_text(FAILING)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        "failing.py", *flags(data="text.txt", steps=100_000), "--out", "run",
    ]  # fmt: skip
    begin = time.monotonic()
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=200,
        env=environment(tmp_path),
    )  # fmt: skip
    assert result.returncode != 0
    assert time.monotonic() - begin < 120
    assert "error: rank 1: [Errno 5] the disk of rank 1 has gone" in result.stderr
    assert "step      7/" in result.stdout
    assert "step      8/" not in result.stdout
    assert load_checkpoint(tmp_path / "run" / LATEST)[1]["step"] == 4
