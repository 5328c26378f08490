"""`fastgpt.info()` and `python -m fastgpt.info`: what this installation can run."""

import importlib
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import interpreter
import pytest
import torch

import fastgpt
from fastgpt import dispatch
from fastgpt.backends import cuda, hopper, native
from fastgpt.backends.measured import Measurement
from fastgpt.dispatch import BACKENDS

OPS = ("cross_entropy", "linear_cross_entropy", "scaled_dot_product_attention")
DEVICES = ("cpu", "cuda")


def show(*arguments: str) -> str:
    """What the command prints where Triton runs as it does in this process."""
    environment = dict(os.environ, PYTHONPATH=str(Path(fastgpt.__file__).parent.parent))
    if interpreter.ON:
        environment["TRITON_INTERPRET"] = "1"
    shown = subprocess.run(
        [sys.executable, "-W", "error", "-m", "fastgpt.info", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stderr == ""
    return shown.stdout


def test_the_command_prints_something_else_than_info():
    assert show().strip() == str(fastgpt.info()).strip()


def test_the_json_lacks_a_cell_or_does_not_parse():
    found = json.loads(show("--json"))
    cells = {(c["op"], c["backend"], c["device"]): c for c in found["cells"]}
    assert set(cells) == set(product(OPS, BACKENDS, DEVICES))
    assert found["torch"] == torch.__version__
    assert found["isas"] == list(native.isas())
    assert found["isa"] == native.isa()
    for cell in cells.values():
        assert cell["available"] == (cell["reason"] == "")
        assert cell["available"] or not (cell["default"] or cell["note"])
        assert cell["default"] == (cell["available"] and not cell["note"])
    assert cells["cross_entropy", "native", "cpu"]["available"]
    assert all(cells[op, "eager", device]["available"] for op, device in product(OPS, DEVICES))


def test_the_table_hides_a_cell_or_a_reason():
    information = fastgpt.info()
    lines = str(information).splitlines()
    for cell in information.cells:
        state = "on" if cell["available"] else f"off: {cell['reason']}"
        if cell["note"]:
            state = f"on when asked for, {cell['note']}"
        assert any(
            line.split()[:3] == [cell["op"], cell["backend"], cell["device"]]
            and line.endswith(state)
            for line in lines
        )
    assert native.isa() in str(information)
    assert f"{torch.get_num_threads()} threads" in str(information)


@pytest.mark.parametrize(
    ("ratios", "default", "state"),
    [
        ({}, False, "on when asked for, by fastgpt.backend('native'): it has never run on a GPU"),
        (
            {"sm_80": 1.0},
            False,
            "on when asked for, by fastgpt.backend('native'): it is not faster than Triton on "
            "sm_80",
        ),
        (
            {"sm_80": 0.9, "sm_90": 1.2},
            True,
            "on, by default on sm_90, elsewhere by fastgpt.backend('native')",
        ),
    ],
)
@pytest.mark.parametrize("op", ["cross_entropy", "scaled_dot_product_attention"])
def test_a_kernel_that_must_be_asked_for_is_shown_as_on(monkeypatch, op, ratios, default, state):
    stored = [
        Measurement(op, chip, "GPU", "2026-11-24", "db4a743", ratio, [])
        for chip, ratio in ratios.items()
    ]
    monkeypatch.setattr(cuda, "built_for_hopper", lambda: False)
    monkeypatch.setitem(dispatch.TABLE, (op, "native", "cuda"), cuda.cell("", stored, op))
    information = fastgpt.info()
    [cell] = [
        cell
        for cell in json.loads(information.to_json())["cells"]
        if (cell["op"], cell["backend"], cell["device"]) == (op, "native", "cuda")
    ]
    assert (cell["available"], cell["reason"], cell["default"]) == (True, "", default)
    [line] = [x for x in str(information).splitlines() if x.split()[:3] == [op, "native", "cuda"]]
    if op != "cross_entropy":  # of which there is one generation of kernels
        state += "; on sm_90 by Ampere's kernels: built without code for 9.0a"
    assert line.endswith(f" cuda  {state}")


def test_the_generation_of_attentions_kernels_is_shown_as_another(monkeypatch):
    op = "scaled_dot_product_attention"
    stored = [
        Measurement(hopper.entry("forward", width), "sm_90", "GPU", date, "db4a743", ratio, [])
        for width, date, ratio in (
            (64, "2026-12-01", 0.8),
            (128, "2026-12-01", 0.7),
            (128, "2026-12-02", 1.3),
        )
    ]
    monkeypatch.setattr(cuda, "built_for_hopper", lambda: True)
    monkeypatch.setitem(dispatch.TABLE, (op, "native", "cuda"), cuda.cell("", stored, op))
    assert (
        "it has never run on a GPU; on sm_90 "
        "forward at width 64 by Ampere's kernels (Hopper's take 1.25 times their time, "
        "2026-12-01), else "
        "forward at width 128 by Hopper's kernels (1.3 times as fast as Ampere's, 2026-12-02), "
        "else by Hopper's kernels (not compared with Ampere's)\n"
    ) in f"{fastgpt.info()}\n"


def test_an_empty_cell_is_a_guess():
    cells = {(c["op"], c["backend"], c["device"]): c for c in fastgpt.info().cells}
    for op, device in product(OPS, DEVICES):
        if (op, device) != ("cross_entropy", "cpu"):
            cell = cells[op, "native", device]
            assert cell["available"] or cell["reason"]


def test_importing_the_module_replaces_the_function():
    """`fastgpt.info` is both a function and a module that can be run."""
    importlib.import_module("fastgpt.info")
    assert isinstance(fastgpt.info(), fastgpt.Info)
    shown = subprocess.run(
        [
            sys.executable,
            "-c",
            "import fastgpt.info\nprint(type(fastgpt.info()).__name__)\n"
            "from fastgpt.info import info\nprint(type(info()).__name__)",
        ],
        env=dict(os.environ, PYTHONPATH=str(Path(fastgpt.__file__).parent.parent)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shown.stdout.split() == ["Info", "Info"], shown.stderr


def test_info_can_be_changed():
    with pytest.raises(AttributeError):
        fastgpt.info().version = "2"


def test_a_public_name_is_missing():
    for name in fastgpt.__all__:
        assert getattr(fastgpt, name) is not None
    assert isinstance(fastgpt.__version__, str)
