"""The errors that reach a user: one sentence each, saying what is wrong, where, and what to do."""

from __future__ import annotations


class IntactKVError(Exception):
    """Something went wrong with the data or the machine. The command line exits with 1."""

    exit_code = 1


class UsageError(IntactKVError):
    """What was asked for makes no sense. The command line exits with 2."""

    exit_code = 2
