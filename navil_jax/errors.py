"""The one exception that stands for a user's mistake, and how commands report it."""

import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, and what to do."""


def report_user_errors(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wraps a command's main: a `UserError` or a missing package becomes one line on stderr and exit status 2."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except ModuleNotFoundError as error:
            if not error.name or error.name.startswith("navil_jax"):
                raise
            print(f"error: Python package {error.name!r} is missing; install it with pip", file=sys.stderr)
            return 2

    return wrapped
