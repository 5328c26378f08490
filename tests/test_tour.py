"""The chapters of the tour: what they claim, their figures, their pages and the index."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOUR = Path(__file__).parent.parent / "docs" / "tour"
SCRIPTS = sorted(TOUR.glob("[0-9]*.py"))
OUTPUT = re.compile(r"```text\n(.*?)```\n\n", re.DOTALL)
LARGEST_FIGURE = 60_000  # bytes: a repository keeps every version of it


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build_tour", TOUR / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(monkeypatch, tmp_path, threads):
    """Runs a copy of a chapter in a folder of its own, as `python docs/tour/NN_name.py` would."""

    def run_copy(script: Path, edit=lambda source: source):
        copy = tmp_path / script.name
        copy.write_text(edit(script.read_text(encoding="utf-8")), encoding="utf-8")
        with torch.random.fork_rng():
            runpy.run_path(str(copy), run_name="__main__")

    monkeypatch.syspath_prepend(TOUR)
    torch.set_num_threads(1)
    return run_copy


def without_numbers(text: str) -> list[str]:
    """The words: the last digits are the machine's, and with them the width of columns."""
    return re.sub(r"-?\d[\d.,]*(e[+-]?\d+)?", " # ", text).split()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_claim_does_not_hold_or_the_page_shows_other_output(script, run, tmp_path, capsys):
    run(script)
    figure = tmp_path / "figures" / f"{script.stem}.png"
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert figure.stat().st_size < LARGEST_FIGURE
    shown = "".join(OUTPUT.findall(script.with_suffix(".md").read_text(encoding="utf-8")))
    assert without_numbers(shown) == without_numbers(capsys.readouterr().out), (
        "run docs/tour/build.py"
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_page_is_older_than_its_script(script, build):
    written = script.with_suffix(".md").read_text(encoding="utf-8")
    silent = build.page(script, [""] * len(build.cells(script.read_text(encoding="utf-8"))))
    assert OUTPUT.sub("", written) == silent, "run docs/tour/build.py"
    assert (TOUR / "figures" / f"{script.stem}.png").stat().st_size < LARGEST_FIGURE


def test_the_index_misses_a_chapter_or_its_summary(build):
    assert (TOUR / "README.md").read_text(encoding="utf-8") == build.readme(), (
        "run docs/tour/build.py"
    )
    assert [script.name[:2] for script in SCRIPTS] == [f"{n:02}" for n in range(1, 13)]


def test_a_false_claim_goes_unnoticed(run):
    true, false = "assert flat[0] == 100", "assert flat[0] == 0"
    with pytest.raises(AssertionError):
        run(SCRIPTS[0], lambda source: source.replace(true, false))


def test_without_matplotlib_a_reader_is_not_told_what_to_install(tmp_path):
    script = SCRIPTS[0]
    code = f"import runpy, sys; sys.modules['matplotlib'] = None; runpy.run_path({str(script)!r})"
    path = os.pathsep.join([str(TOUR), str(TOUR.parent.parent)])
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert "needs the library 'matplotlib'" in last
    assert "pip install 'fastgpt[plot]'" in last
