"""Optional libraries: which extra of the package each belongs to, and what is said without it."""

import re
from importlib import import_module, metadata
from typing import Any

# As in pyproject.toml. Nothing here is needed to import fastgpt or to run its kernels.
EXTRAS: dict[str, tuple[str, ...]] = {
    "plot": ("matplotlib",),
    "gpt": ("numpy", "safetensors", "tokenizers", "tqdm"),
    "tensorboard": ("tensorboard",),
    "transformers": ("transformers>=5", "accelerate>=1.1", "safetensors"),
}


class MissingExtraError(ImportError):
    """A library of an extra is not installed, or too old; the message says how to get it."""


def require(name: str, extra: str | None = None) -> Any:
    """Import a module of an optional library, or raise MissingExtraError saying how to get it.

    `extra` is the one to name where a library belongs to several; else it is the first of `EXTRAS`.
    """
    library = name.partition(".")[0]
    minima = {
        each: dict(_parsed(requirement) for requirement in EXTRAS[each])
        for each in (EXTRAS if extra is None else (extra,))
    }
    extra = next(each for each, libraries in minima.items() if library in libraries)
    try:
        import_module(library)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise  # the library is there and something it needs is not: say that instead
        raise MissingExtraError(
            f"this part of fastgpt needs the library {library!r}, which is not installed; "
            f"get it with: pip install 'fastgpt[{extra}]'",
            name=library,
        ) from error
    if minimum := minima[extra][library]:
        version = metadata.version(library)
        if _numbers(version) < _numbers(minimum):
            raise MissingExtraError(
                f"this part of fastgpt needs {library} {minimum} or newer, and {version} is "
                f"installed; get it with: pip install --upgrade 'fastgpt[{extra}]'",
                name=library,
            )
    return import_module(name)


class LazyModule:
    """Stands for a module of an optional library and imports it at the first use, by `require`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(require(self._name), attribute)


def _parsed(requirement: str) -> tuple[str, str]:
    """The library and the least version, "" where any will do."""
    library, _, minimum = requirement.partition(">=")
    return library, minimum


def _numbers(version: str) -> tuple[int, ...]:
    """5.0.0.dev0 counts as 5.0.0."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, release[0].split("."))) if release else ()
