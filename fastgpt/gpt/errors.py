"""What can go wrong for a user of the reference GPT, and how it is said."""

import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any


class UsageError(ValueError):
    """A setting or an input that can't work; the message gives the value and what was expected."""


class MissingExtraError(ImportError):
    """A third-party library of an extra, such as `gpt`, is not installed."""


class CheckpointError(RuntimeError):
    """A checkpoint that can't be read or does not fit; the message names the file."""


def require(name: str, extra: str = "gpt") -> Any:
    """Import a module of an extra, or raise MissingExtraError saying how to get it."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        library = name.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != library:
            raise  # the library is there and something it needs is not: say that instead
        raise MissingExtraError(
            f"this part of fastgpt.gpt needs the library {library!r}, which is not installed; "
            f"get it with: pip install 'fastgpt[{extra}]'",
            name=error.name,
        ) from error


class LazyModule:
    """Stands for a module of the extra `gpt` and imports it at the first use, as `require` does."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(require(self._name), attribute)


def run_command(main: Callable[[], int]) -> None:
    """Run a command line's `main` and exit: errors a user can mend are one line, not a trace."""
    try:
        code = main()
        sys.stdout.flush()
    except (UsageError, MissingExtraError, CheckpointError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader, such as `head`, has gone
            # Python flushes stdout once more at exit; let that go nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(code)
