"""Optional libraries: the package works without them, and says what to install for a part."""

import pkgutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

import fastgpt
from fastgpt import extras
from fastgpt.extras import EXTRAS, LazyModule, MissingExtraError, require
from fastgpt.gpt.bigram import Bigram
from fastgpt.gpt.checkpoint import load_checkpoint, save_checkpoint
from fastgpt.gpt.config import TrainConfig
from fastgpt.gpt.metrics import draw_loss
from fastgpt.gpt.tokenizer import train_tokenizer
from fastgpt.gpt.train import Trainer

PROJECT = Path(__file__).parent.parent
LIBRARIES = sorted({r.partition(">=")[0] for libraries in EXTRAS.values() for r in libraries})


def hide(monkeypatch, *libraries):
    """As if they were not installed, nor had been imported."""
    for library in libraries:
        for name in [name for name in sys.modules if name.startswith(f"{library}.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, library, None)


def optional_dependencies():
    if sys.version_info >= (3, 11):
        import tomllib

        text = (PROJECT / "pyproject.toml").read_text()
        return tomllib.loads(text)["project"]["optional-dependencies"]
    pytest.skip("Python 3.10 does not read TOML")


def test_an_error_names_an_extra_that_does_not_bring_the_library():
    declared = optional_dependencies()
    for extra, libraries in EXTRAS.items():
        others = [r for r in declared[extra] if not r.startswith("fastgpt[")]
        assert sorted(others) == sorted(libraries), extra


def test_the_development_environment_lacks_an_extra():
    dev = optional_dependencies()["dev"]
    (own,) = (r for r in dev if r.startswith("fastgpt["))
    assert set(EXTRAS) <= set(own.removeprefix("fastgpt[").rstrip("]").split(","))


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_missing_library_is_an_error_that_does_not_say_what_to_install(library, monkeypatch):
    hide(monkeypatch, library)
    extra = next(e for e, found in EXTRAS.items() if any(r.startswith(library) for r in found))
    for name in (library, f"{library}.submodule"):
        with pytest.raises(MissingExtraError) as raised:
            require(name)
        assert str(raised.value) == (
            f"this part of fastgpt needs the library {library!r}, which is not installed; "
            f"get it with: pip install 'fastgpt[{extra}]'"
        )
        assert isinstance(raised.value, ImportError)
        assert raised.value.name == library


def test_a_library_of_two_extras_is_asked_for_by_the_wrong_one(monkeypatch):
    hide(monkeypatch, "safetensors")
    with pytest.raises(MissingExtraError, match=r"pip install 'fastgpt\[gpt\]'"):
        require("safetensors.torch")
    with pytest.raises(MissingExtraError, match=r"pip install 'fastgpt\[transformers\]'"):
        require("safetensors.torch", extra="transformers")


@pytest.mark.parametrize(
    ("installed", "enough"),
    [("4.57.1", False), ("5", True), ("5.0.0.dev0", True), ("5.24.0", True), ("10.1", True)],
)
def test_a_library_that_is_too_old_is_accepted_or_a_new_one_refused(installed, enough, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", object())
    monkeypatch.setattr(metadata, "version", lambda library: installed)
    if enough:
        assert require("transformers") is sys.modules["transformers"]
        return
    with pytest.raises(MissingExtraError) as raised:
        require("transformers.masking_utils")  # which older ones lack
    assert str(raised.value) == (
        f"this part of fastgpt needs transformers 5 or newer, and {installed} is installed; "
        "get it with: pip install --upgrade 'fastgpt[transformers]'"
    )


def test_a_library_whose_own_dependency_is_missing_is_called_missing(monkeypatch):
    def import_module(name):
        raise ModuleNotFoundError("No module named 'regex'", name="regex")

    monkeypatch.setattr(extras, "import_module", import_module)
    with pytest.raises(ModuleNotFoundError, match="regex") as raised:
        require("tokenizers")
    assert not isinstance(raised.value, MissingExtraError)


def test_a_lazy_module_imports_at_once_or_never(monkeypatch):
    hide(monkeypatch, "numpy")
    lazy = LazyModule("numpy")
    with pytest.raises(MissingExtraError, match=r"'fastgpt\[gpt\]'"):
        _ = lazy.unique
    monkeypatch.undo()
    assert lazy.unique is np.unique


def _train(tmp_path):
    return Trainer(TrainConfig(), tmp_path)


# What a user does, and the libraries that it needs.
USES = {
    "train": (_train, ("safetensors", "matplotlib", "tqdm")),
    "draw": (lambda folder: draw_loss(folder / "loss.png", [], 10), ("matplotlib",)),
    "save": (
        lambda folder: save_checkpoint(folder / "x.safetensors", {"x": torch.ones(1)}, {}),
        ("safetensors",),
    ),
    "load": (lambda folder: load_checkpoint(folder / "x.safetensors"), ("safetensors",)),
    "tokenise": (lambda folder: train_tokenizer("bpe", ["text"], 256, ""), ("tokenizers",)),
    "count": (lambda folder: Bigram(torch.zeros(4), 2), ("numpy",)),
}


@pytest.mark.parametrize(
    ("use", "library"), [(use, library) for use, (_, found) in USES.items() for library in found]
)
def test_a_part_of_the_package_fails_obscurely_without_its_library(
    use, library, monkeypatch, tmp_path
):
    run, _ = USES[use]
    hide(monkeypatch, library)
    with pytest.raises(MissingExtraError, match=f"the library '{library}', which is not installed"):
        run(tmp_path)
    assert not list(tmp_path.iterdir()), "something half done is left behind"


def test_a_module_of_the_package_cannot_be_imported_without_the_extras():
    names = [
        found.name
        for found in pkgutil.walk_packages(fastgpt.__path__, "fastgpt.")
        # The extensions' own tests import those; Triton's interpreter itself is written in numpy.
        if not found.name.endswith(("._C", "._cuda", "triton.interpreter"))
        # Made of transformers' classes; test_transformers.py has what it says without them.
        and not found.name.startswith("fastgpt.integrations.transformers")
    ]
    assert "fastgpt.gpt.train" in names
    code = f"""
import sys
for name in {[*LIBRARIES, "lightning"]}:
    sys.modules[name] = None
import importlib
for name in {names}:
    try:
        importlib.import_module(name)
    except ImportError as error:  # what is for users of a library begins with that library
        if not (name.startswith("fastgpt.integrations.") and "fastgpt[" in str(error)):
            raise
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
