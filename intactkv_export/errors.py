"""The errors that reach a user: one sentence each, saying what is wrong, where, and what to do.

Exception
  IntactKVError     exit code 1: the data or the machine
    UsageError      exit code 2: what was asked for
"""

from __future__ import annotations


class IntactKVError(Exception):
    """Something went wrong with the data or the machine. The command line exits with 1."""

    exit_code = 1


class UsageError(IntactKVError):
    """What was asked for makes no sense. The command line exits with 2."""

    exit_code = 2


def first_line(error: BaseException) -> str:
    """What another library's exception says, as a part of a sentence: its first line, or the name of its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
