"""Autotuning with a pretended clock and device: which candidate wins, and where it is kept."""

import json
import threading
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources

from fastgpt.backends.triton import autotune
from fastgpt.backends.triton.chips import CHIPS

CHIP = CHIPS["sm_90"]


class Config(NamedTuple):
    block: int
    num_warps: int


SLOW, FAST, GREEDY = Config(32, 4), Config(64, 8), Config(1024, 8)
TIMES = {SLOW: 2.0, FAST: 1.0}


class Device:
    """A GPU on which a launch takes the time that TIMES say, and GREEDY's blocks do not fit."""

    capturing = False

    def __init__(self):
        self.launched, self.measured = [], 0

    def launch(self, config):
        if config.block >= GREEDY.block:
            raise OutOfResources(300_000, 232_448, "shared memory")
        self.launched.append(config)

    def measure(self, run):
        run()
        self.measured += 1
        return TIMES[self.launched[-1]]

    def best(self, candidates=(SLOW, GREEDY, FAST), name="forward", key=("bf16", 128)):
        return autotune.best(name, key, CHIP, candidates, self.launch, self.measure)


def restart():
    """What a new process starts with."""
    autotune._chosen.clear()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "autotune"


@pytest.fixture
def device(folder, monkeypatch):
    device = Device()
    monkeypatch.setattr(autotune, "enabled", lambda: True)
    monkeypatch.setattr(autotune, "_on_gpu", lambda: True)
    monkeypatch.setattr(autotune, "_device", lambda: 0)
    monkeypatch.setattr(autotune, "_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(autotune, "_capturing", lambda: device.capturing)
    restart()
    yield device
    restart()


def test_a_slower_candidate_wins_or_one_that_does_not_fit_ends_the_tuning(device):
    assert device.best() == FAST
    assert isinstance(device.best(), Config)
    assert device.launched == [SLOW, FAST]


def test_a_choice_is_made_again_in_the_same_process_or_the_next(device, folder):
    device.best()
    for _ in range(2):
        assert device.best() == FAST
        assert device.measured == 2
        restart()
    [path] = folder.iterdir()
    assert json.loads(path.read_text())["config"] == {"block": 64, "num_warps": 8}


@pytest.mark.parametrize(
    "change",
    [
        {"name": "backward"},
        {"key": ("bf16", 64)},
        {"candidates": (SLOW, FAST)},
    ],
)
def test_a_choice_is_taken_for_another_kernel_shape_or_table(device, change):
    device.best()
    before = device.measured
    restart()
    device.best(**change)
    assert device.measured == before + 2


def test_calls_of_attention_that_differ_in_an_option_share_a_choice(monkeypatch):
    from fastgpt.backends.triton import attention

    keys = []

    def best(name, key, chip, candidates, launch):
        keys.append((name, key))
        return candidates[0]

    monkeypatch.setattr(attention, "INTERPRETED", False)
    monkeypatch.setattr(autotune, "enabled", lambda: True)
    monkeypatch.setattr(autotune, "best", best)
    for variant in attention.VARIANTS.values():
        call = attention._example(torch.bfloat16, 64, variant)
        attention._tiled("forward", call, CHIP, lambda config: SimpleNamespace(run=None))
    assert len(set(keys)) == len(keys) == len(attention.VARIANTS)


@pytest.mark.parametrize("what", ["_device_name", "version"])
def test_a_choice_is_taken_for_another_device_or_triton(device, monkeypatch, what):
    device.best()
    monkeypatch.setattr(autotune, "_device", lambda: 1)
    monkeypatch.setattr(autotune, what, lambda: "another")
    device.best()
    assert device.measured == 4


def test_nothing_is_tuned_unless_asked_for(device, folder, monkeypatch):
    monkeypatch.setattr(autotune, "enabled", lambda: False)
    assert device.best() == SLOW
    assert device.launched == []
    assert not folder.exists()


@pytest.mark.parametrize(("value", "on"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_the_variable_is_misread(monkeypatch, value, on):
    monkeypatch.delenv("FASTGPT_AUTOTUNE", raising=False)
    if value is not None:
        monkeypatch.setenv("FASTGPT_AUTOTUNE", value)
    assert autotune.enabled.__wrapped__() == on
    monkeypatch.setenv("FASTGPT_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="FASTGPT_AUTOTUNE: expected '0' or '1', got 'yes'"):
        autotune.enabled.__wrapped__()


def test_a_capture_times_something_or_keeps_its_stopgap(device, folder):
    device.capturing = True
    assert device.best() == SLOW
    assert device.launched == []
    assert not folder.exists()
    device.capturing = False
    assert device.best() == FAST
    device.capturing = True
    assert device.best() == FAST
    restart()
    assert device.best() == FAST


def test_no_candidate_that_fits_is_remembered_as_a_choice(device, folder):
    assert device.best((GREEDY, GREEDY._replace(block=2048))) == GREEDY
    assert not folder.exists()


def test_memory_that_runs_out_while_timing_ends_the_program(device, folder, monkeypatch):
    def out_of_memory(run):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(device, "measure", out_of_memory)
    with pytest.warns(UserWarning, match="no memory left to time Config"):
        assert device.best() == SLOW
    assert not folder.exists()


@pytest.mark.parametrize(
    "text",
    [
        '{"config": {"block": 6',
        "[]",
        '{"config": 3}',
        '{"other": 1}',
        '{"config": {"block": 128, "num_warps": 8}}',
        b"\xff\xfe",
    ],
)
def test_a_broken_file_is_believed_or_stays_broken(device, folder, text):
    device.best()
    [path] = folder.iterdir()
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    restart()
    with pytest.warns(UserWarning, match="tuning again"):
        assert device.best() == FAST
    restart()
    assert device.best() == FAST
    assert device.measured == 4


def test_a_folder_that_can_not_be_written_stops_the_program(device, folder):
    folder.parent.mkdir()
    folder.write_text("not a folder")
    with pytest.warns(UserWarning, match="can't be kept"):
        assert device.best() == FAST
    assert device.best() == FAST
    assert device.measured == 2


def test_processes_that_tune_at_once_lose_each_others_choices(device, folder):
    def tune(own):
        for key in (own, "shared"):
            restart()
            device.best((SLOW, FAST), key=key)

    def one_candidate_at_a_time(run):  # another thread's launch must not be taken for one's own
        return TIMES[run.args[0]]

    device.measure = one_candidate_at_a_time
    threads = [threading.Thread(target=tune, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(folder.iterdir())) == 9
    restart()
    device.measure = pytest.fail
    for key in (*range(8), "shared"):
        assert device.best((SLOW, FAST), key=key) == FAST
