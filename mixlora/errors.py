"""How the program says that something it was given is wrong."""

import argparse
import difflib
import functools
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn


class InputError(ValueError):
    """A wrong key, value or file. The text is one line: what was wanted, what was got, where."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"`, or the list of known names where none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else f" (known: {', '.join(known)})"


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are one line, like every other error here."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (--help lists the options)")


def command(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """A script's `main(argv)`: wrong input, and a file that cannot be read or written, become one
    line on stderr and exit code 2."""

    @functools.wraps(main)
    def guarded(argv: list[str]) -> int:
        try:
            return main(argv)
        except (InputError, OSError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130

    return guarded
