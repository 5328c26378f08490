"""The README: its Python runs as it stands, its commands exist, and so do the files it names."""

import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

PROJECT = Path(__file__).parent.parent
README = (PROJECT / "README.md").read_text()


class Block(NamedTuple):
    language: str
    line: int  # the first of its text, from 1
    text: str


def blocks(language):
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    every = [Block(m[1], README.count("\n", 0, m.start(2)) + 1, m[2]) for m in found]
    return [block for block in every if block.language == language]


PYTHON, SHELL = blocks("python"), blocks("sh")

# Of the first blocks, what the reader has: sizes as small as they go. In a process of its own, as
# the reader's is, without Triton's interpreter; each block is compiled at its place in the README.
RUNNER = """
import contextlib, doctest, io, os, sys, traceback, types
os.environ["KINETO_LOG_LEVEL"] = "6"  # else the profiler prints
import torch
from torch import nn

def model(tokens, labels):
    embedded = nn.functional.embedding(tokens, lm_head.weight)
    hidden = nn.functional.scaled_dot_product_attention(embedded, embedded, embedded)
    return nn.functional.cross_entropy(lm_head(hidden).flatten(0, 1), labels.flatten())

torch.manual_seed(0)
vocabulary, lm_head = 11, nn.Linear(8, 11, bias=False)
given = dict(
    model=model, vocabulary=vocabulary, lm_head=lm_head, hidden=torch.randn(2, 5, 8),
    q=torch.randn(2, 2, 5, 4), k=torch.randn(2, 2, 5, 4), v=torch.randn(2, 2, 5, 4),
    tokens=torch.randint(11, (2, 5)), targets=torch.randint(11, (2, 5)),
    labels=torch.randint(11, (2, 5)),
)
module = types.ModuleType("readme")
sys.modules["readme"] = module  # where a loader's processes would look for its classes
vars(module).update(given)
results = {}
for line, text in torch.load(sys.argv[1]):
    names = vars(module)
    if text.startswith(">>>"):
        names["logits"], names["probabilities"] = torch.zeros(2, 3), torch.full((2, 3), 1 / 3)
    else:
        names.setdefault("logits", torch.randn(2, 5, 11))
    operators, error = set(), ""
    activities = [torch.profiler.ProfilerActivity.CPU]
    try:
        with torch.profiler.profile(activities=activities) as profile:
            if text.startswith(">>>"):
                said = io.StringIO()
                test = doctest.DocTestParser().get_doctest(text, names, "README", "README.md", line)
                doctest.DocTestRunner(verbose=False).run(test, out=said.write, clear_globs=False)
                error = said.getvalue()
            else:
                exec(compile("\\n" * (line - 1) + text, "README.md", "exec"), names)
    except BaseException:
        error = traceback.format_exc()
    operators = {e.name() for e in profile.profiler.kineto_results.events()}
    results[line] = error, {name for name in operators if name.startswith("fastgpt::")}
torch.save(results, sys.argv[2])
"""


def run_blocks(folder):
    """Of each block its error, or "", and the operators of ours that ran; and the files left."""
    torch.save([(block.line, block.text) for block in PYTHON], folder / "blocks.pt")
    scratch = folder / "scratch"
    scratch.mkdir()
    run = subprocess.run(
        [sys.executable, "-c", RUNNER, folder / "blocks.pt", folder / "results.pt"],
        cwd=scratch, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return torch.load(folder / "results.pt"), [path.name for path in scratch.rglob("*")]


def environment():
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**own, "PYTHONPATH": str(PROJECT), "PYTHONWARNINGS": "ignore"}


@pytest.mark.slow
def test_an_example_fails_or_runs_torchs_functions_or_leaves_files(tmp_path):
    """All in one process, each with what those before it have defined."""
    results, files = run_blocks(tmp_path)
    assert len(results) == len(PYTHON) > 4
    errors = [error for error, _ in results.values() if error]
    assert not errors, "\n".join(errors)
    for block in PYTHON:
        assert results[block.line][1] or "explain" in block.text, block
    assert files == []


def commands():
    """Of every shell block, and of the text: what follows a prompt, without its comment."""
    lines = [line for block in SHELL for line in block.text.splitlines()]
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(r"`((?:python -m|pip|make|pytest) [^`]+)`", prose)
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_a_command_names_a_make_target_an_extra_or_a_program_that_is_not_there():
    makefile = (PROJECT / "Makefile").read_text()
    extras = (PROJECT / "pyproject.toml").read_text().split("optional-dependencies")[1]
    seen = set()
    for words in commands():
        seen.add(words[0])
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words
        elif words[0] == "pip":
            for extra in re.findall(r"\[(.*?)\]", " ".join(words)):
                assert re.search(rf"^{extra} = \[", extras, re.MULTILINE), words
        elif words[0] == "python":
            assert words[1] == "-m", words
            assert find_spec(words[2]), words
        else:
            assert words[0] in ("pytest", "torchrun"), words
    assert seen >= {"make", "pip", "python"}


def modules_with_options():
    found: dict[str, set[str]] = {}
    for words in commands():
        if words[:2] == ["python", "-m"]:
            options = {word.strip("[]") for word in words[3:] if word.strip("[").startswith("--")}
            found.setdefault(words[2], set()).update(options)
    return {module: options for module, options in found.items() if options}


@pytest.mark.slow
@pytest.mark.parametrize("module", modules_with_options())
def test_a_command_has_an_option_that_is_not_there(module):
    run = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=PROJECT, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    known = set(re.findall(r"--[\w-]+", run.stdout))
    assert modules_with_options()[module] <= known


def test_a_link_leads_nowhere():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    files = [link for link in links if "://" not in link]
    assert len(files) > 3
    for file in files:
        assert (PROJECT / file).exists(), file
