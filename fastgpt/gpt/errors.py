"""What can go wrong for a user of the reference GPT, and how it is said."""

import os
import sys
from collections.abc import Callable

# Those of the whole package, for the modules here.
from fastgpt.extras import LazyModule as LazyModule
from fastgpt.extras import MissingExtraError as MissingExtraError
from fastgpt.extras import require as require


class UsageError(ValueError):
    """A setting or an input that can't work; the message gives the value and what was expected."""


class CheckpointError(RuntimeError):
    """A checkpoint that can't be read or does not fit; the message names the file."""


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
