"""Packages that only some commands need (the extras of pyproject.toml), and what is said where one is absent."""

from __future__ import annotations

from importlib.util import find_spec

from intactkv_export.errors import UsageError

# What is needed -> the extra that brings it, the packages that must be there
_NEEDS = {
    "torch": ("convert", ("torch", "transformers")),
    "huggingface_hub": ("convert", ("huggingface_hub",)),
    "matplotlib": ("plot", ("matplotlib",)),
}


def missing(needed: str) -> str:
    """The first package of "torch" (with transformers), "huggingface_hub" or "matplotlib" not installed, or ""."""
    return next((name for name in _NEEDS[needed][1] if find_spec(name) is None), "")


def require(*needed: str, for_: str, otherwise: str = "") -> None:
    """Raises UsageError if a package is not installed. for_: what needs it; otherwise: what can be done without it."""
    if name := next((name for name in map(missing, needed) if name), ""):
        extras = ",".join(sorted({_NEEDS[each][0] for each in needed}))
        raise UsageError(sentence(name, for_, otherwise, extras=extras))


def sentence(package: str, for_: str, otherwise: str = "", *, extras: str = "convert") -> str:
    """The one sentence: "FOR needs PACKAGE, which is not installed: pip install ..."."""
    rest = f", or {otherwise}" if otherwise else ""
    return f"{for_} needs {package}, which is not installed: pip install 'intactkv-export[{extras}]'{rest}"
