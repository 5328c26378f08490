"""Checkpoints: kills at any moment, files that are none, the last k, and what resumes."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import killed
import pytest
import torch
from safetensors.torch import save_file

from fastgpt.files import atomic_path, remove_leftovers
from fastgpt.gpt.checkpoint import (
    VERSION,
    keep_checkpoint,
    kept_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from fastgpt.gpt.errors import CheckpointError
from fastgpt.gpt.metrics import Row, read_metrics
from fastgpt.gpt.sample import load_run
from fastgpt.gpt.train import Trainer, make_trainer

TEXT = "".join(f"def f{i}(x):\n    return x + {i * 7919 % 1000}\n\n" for i in range(500))
LATEST = "latest.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """With a text, a run that came to its end, and those that were killed."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text(TEXT)
    threads, cache = torch.get_num_threads(), os.environ.get("FASTGPT_CACHE")
    os.environ["FASTGPT_CACHE"] = str(folder / "cache")
    run(folder / "straight")
    yield folder
    torch.set_num_threads(threads)
    del os.environ["FASTGPT_CACHE"]
    if cache is not None:
        os.environ["FASTGPT_CACHE"] = cache


@pytest.fixture(scope="module")
def killed_runs(folder) -> Path:
    subprocess.run([sys.executable, killed.__file__, folder], check=True, timeout=300)
    return folder


def run(out: Path, **changes: object) -> Trainer:
    settings = {**killed.SETTINGS, "data": str(out.parent / "text.txt"), "out": out, **changes}
    trainer = make_trainer(settings)
    assert trainer.run() == 0
    return trainer


def comparable(path: Path) -> list[tuple]:
    """A run's rows without what the clock decides."""
    rows: list[Row] = read_metrics(path / "metrics.csv")
    return [
        (r.step, r.tokens, r.train_loss, r.val_loss, r.lr, r.grad_norm, r.skipped) for r in rows
    ]


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in folder.rglob("*")
        if file.is_file()
    }


def steps(run: Path) -> list[int]:
    return [load_checkpoint(file)[1]["step"] for file in kept_checkpoints(run)]


@pytest.fixture
def finished(folder, tmp_path) -> Path:
    """A copy of the run that came to its end."""
    run = tmp_path / "run"
    run.mkdir()
    for file in (folder / "straight").iterdir():
        (run / file.name).write_bytes(file.read_bytes())
    return run


# --- kills


@pytest.mark.slow
@pytest.mark.parametrize("point", killed.POINTS)
def test_a_run_that_was_killed_loses_more_than_an_interval_or_goes_on_otherwise(
    killed_runs, folder, point
):
    run = folder / point
    assert load_checkpoint(run / LATEST)[1]["step"] == killed.POINTS[point]
    assert load_checkpoint(run / "best.safetensors")[1]["step"] in (8, 16)
    assert steps(run)[-1:] == [killed.POINTS[point] if point == "in the plot" else 8]
    torch.manual_seed(0)  # nothing may hang on what the process did before
    trainer = make_trainer({"resume": run})
    assert trainer.step == killed.POINTS[point]
    assert not [file for file in run.iterdir() if file.name.startswith(".")], "left by the kill"
    assert trainer.run() == 0
    straight = folder / "straight"
    for name in (LATEST, "best.safetensors"):
        expected, expected_state = load_checkpoint(straight / name)
        tensors, state = load_checkpoint(run / name)
        assert tensors.keys() == expected.keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, expected[key]), key
        assert state["step"] == expected_state["step"]
    assert comparable(run) == comparable(straight)
    assert steps(run) == steps(straight) == [16, 20]


def test_what_a_kill_left_is_kept_or_other_files_are_not(tmp_path):
    path = tmp_path / "a.csv"
    for name in (".a.csv.abcdefgh.csv", ".a.csv.abcd_123.csv"):
        (tmp_path / name).touch()
    others = ["a.csv", ".a.csv", ".a.csv.csv", ".b.csv.abcdefgh.csv", "x.a.csv.abcdefgh.csv"]
    for name in others:
        (tmp_path / name).touch()
    with atomic_path(path) as temporary:
        assert temporary.exists()
        remove_leftovers(path)
        assert not temporary.exists(), "or the names that are looked for are not those given"
        temporary.touch()
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(others)


# --- files that are no checkpoint


class Trap:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def header_of(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def rewrite(path: Path, **header: str) -> None:
    """The checkpoint with another header."""
    tensors, _ = load_checkpoint(path)
    save_file(tensors, path, {**header_of(path), **header})


def spoil(path: Path, how: str) -> str:
    """Spoil a checkpoint; part of the message that is expected."""
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
        return "not a whole fastgpt checkpoint"
    if how == "empty":
        path.write_bytes(b"")
        return "not a whole fastgpt checkpoint"
    if how == "missing":
        path.unlink()
        return "no such checkpoint"
    if how == "one bit":
        path.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
        return "damaged; the checksum of"
    if how == "foreign":
        save_file({"model/w": torch.zeros(3)}, path, {"format": "pt"})
        return r"not a checkpoint of fastgpt; .*found \['format'\]"
    if how == "foreign, without a header":
        save_file({"model/w": torch.zeros(3)}, path)
        return "not a checkpoint of fastgpt; .*found nothing"
    if how == "newer":
        rewrite(path, fastgpt=str(VERSION + 1))
        return f"written by a newer fastgpt, in format {VERSION + 1}"
    if how == "of no version":
        rewrite(path, fastgpt="two")
        return "its version is 'two'"
    if how == "header":
        rewrite(path, metadata="{")
        return "its header is not JSON"
    if how == "no checksum":
        crc32 = json.loads(header_of(path)["crc32"])
        del crc32["progress"]
        rewrite(path, crc32=json.dumps(crc32))
        return "progress has no checksum"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Trap()))
        return "not a whole fastgpt checkpoint"
    if how == "torch.save":
        torch.save({"model/w": Trap()}, path)
        return "not a whole fastgpt checkpoint"
    if how == "weights alone":
        path.write_bytes(path.with_name("best.safetensors").read_bytes())
        return "holds no state of a run to resume, only weights; resume from one of latest"
    tensors, metadata = load_checkpoint(path)
    if how == "of another model":
        del tensors["model/transformer.ln_f.bias"]
        message = "transformer.ln_f.bias is in the file or in the model, not in both"
    elif how == "of another size":
        tensors["optimizer/exp_avg/transformer.ln_f.bias"] = torch.zeros(3)
        message = r"exp_avg/transformer.ln_f.bias has shape \(3,\) in the file and \(64,\) in"
    elif how == "of half an optimiser":
        del tensors["optimizer/exp_avg/transformer.ln_f.bias"]
        message = "the optimiser's state is not the same of each parameter"
    save_checkpoint(path, tensors, metadata)
    return message


@pytest.mark.parametrize(
    "how",
    [
        "truncated", "empty", "missing", "one bit", "foreign", "foreign, without a header", "newer",
        "of no version", "header", "no checksum", "pickle", "torch.save", "weights alone",
        "of another model", "of another size", "of half an optimiser",
    ],
)  # fmt: skip
def test_a_file_that_is_no_checkpoint_is_resumed_executed_or_written_over(
    finished, how, monkeypatch
):
    monkeypatch.chdir(finished)
    message = spoil(finished / LATEST, how)
    before = contents(finished)
    with pytest.raises(CheckpointError, match=message) as raised:
        make_trainer({"resume": finished, "steps": 30})
    assert LATEST in str(raised.value)
    assert contents(finished) == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '{"preset": "tiny", "flux": 1}', "unknown setting 'flux'"),
        ("config.json", '{"preset": "ti', "not JSON"),
        ("config.json", "[]", "expected a JSON object, found list"),
        ("config.json", '{"lr": -1.0}', "lr must be above 0, got -1.0"),
        ("config.json", '{"betas": 3}', "config.json"),
        ("tokenizer.json", "{", "not JSON"),
    ],
)
def test_settings_that_are_none_are_taken_or_written_over(finished, name, content, message):
    (finished / name).write_text(content)
    before = contents(finished)
    with pytest.raises(CheckpointError, match=message):
        make_trainer({"resume": finished})
    assert contents(finished) == before


@pytest.mark.parametrize("latest", [True, False])
def test_a_new_run_in_the_folder_of_another_writes_over_it(finished, latest):
    if not latest:
        (finished / LATEST).unlink()
    before = contents(finished)
    with pytest.raises(ValueError, match="already holds a run"):
        run(finished, data=str(finished / "config.json"))
    assert contents(finished) == before


def test_a_checkpoint_from_before_there_were_versions_is_refused(finished):
    path = finished / LATEST
    tensors, _ = load_checkpoint(path)
    header = header_of(path)
    del header["fastgpt"]
    old = {name: t for name, t in tensors.items() if not name.startswith("spikes/")}
    crc32 = {k: v for k, v in json.loads(header["crc32"]).items() if k in old}
    save_file(old, path, {**header, "crc32": json.dumps(crc32)})
    assert make_trainer({"resume": finished, "steps": 30}).step == 20


def test_a_checkpoint_says_nothing_of_the_settings(finished):
    _, metadata = load_checkpoint(finished / LATEST)
    assert metadata["config"] == json.loads((finished / "config.json").read_text())
    assert header_of(finished / LATEST)["fastgpt"] == str(VERSION)


# --- the last k


def test_more_or_fewer_than_the_last_k_are_kept(tmp_path):
    for step in (8, 16, 24, 100_000_000):
        save_checkpoint(tmp_path / LATEST, {"x": torch.tensor([step])}, {"step": step})
        keep_checkpoint(tmp_path / LATEST, step, keep=3)
    assert steps(tmp_path) == [16, 24, 100_000_000]
    newest = kept_checkpoints(tmp_path)[-1]
    assert os.path.samefile(newest, tmp_path / LATEST), "no second copy of it"
    assert int(load_checkpoint(tmp_path / "step-00000016.safetensors")[0]["x"]) == 16


def test_one_checkpoint_is_kept_as_if_several_were_asked_for(tmp_path):
    save_checkpoint(tmp_path / LATEST, {}, {"step": 8})
    keep_checkpoint(tmp_path / LATEST, 8, keep=1)
    assert [file.name for file in tmp_path.iterdir()] == [LATEST]


def test_without_links_there_is_no_copy(tmp_path, monkeypatch):
    def refuse(a, b):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    save_checkpoint(tmp_path / LATEST, {}, {"step": 8})
    keep_checkpoint(tmp_path / LATEST, 8, keep=2)
    assert steps(tmp_path) == [8]


def test_a_run_that_goes_back_writes_over_what_it_goes_back_behind(finished, folder):
    """From step 16 of 20, and what it computes from there is what was."""
    for step in (99, 7):
        name = finished / f"step-{step:08}.safetensors"
        name.write_bytes((finished / "step-00000016.safetensors").read_bytes())
    (finished / "step-mine.safetensors").write_text("not ours")
    trainer = make_trainer({"resume": finished / "step-00000016.safetensors"})
    assert trainer.step == 16
    assert [row.step for row in trainer.metrics.rows] == [0, 5, 8, 10, 15, 16]
    assert trainer.run() == 0
    names = [file.name for file in sorted(finished.glob("step-*"))]
    assert names == [
        "step-00000016.safetensors", "step-00000020.safetensors", "step-00000099.safetensors",
        "step-mine.safetensors",
    ]  # fmt: skip
    assert comparable(finished) == comparable(folder / "straight")
    expected, _ = load_checkpoint(folder / "straight" / LATEST)
    for name, tensor in load_checkpoint(finished / LATEST)[0].items():
        assert torch.equal(tensor, expected[name]), name


def test_a_checkpoint_of_a_run_samples_worse_than_its_weights_say(finished):
    model, _ = load_run(finished)
    tensors, _ = load_checkpoint(finished / LATEST)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, tensors[f"model/{name}"])
