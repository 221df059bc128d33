"""RoPE settings of a context other than the model's own: what llama.cpp's programs call --rope-... and --yarn-..."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from intactkv_export.errors import UsageError

SCALINGS = {"none": 0, "linear": 1, "yarn": 2}  # enum llama_rope_scaling_type (llama.h)
_UNSPECIFIED = -1


@dataclass(frozen=True)
class Rope:
    """Settings by the names of upstream's options; a field's default is upstream's "as the model says".

    scaling: of SCALINGS. scale: the context grows by this factor; freq_scale: its inverse, one of both. Raises
    UsageError for values that do not exist.
    """

    scaling: str | None = None
    scale: float = 0.0
    freq_base: float = 0.0
    freq_scale: float = 0.0
    yarn_orig_ctx: int = 0
    yarn_ext_factor: float = -1.0
    yarn_attn_factor: float = -1.0
    yarn_beta_slow: float = -1.0
    yarn_beta_fast: float = -1.0

    def __post_init__(self) -> None:
        if self.scaling is not None and self.scaling not in SCALINGS:
            raise UsageError(f"unknown RoPE scaling {self.scaling!r}: give one of {', '.join(SCALINGS)}")
        if self.scale and self.freq_scale:
            raise UsageError(
                f"--rope-scale is {self.scale:g} and --rope-freq-scale {self.freq_scale:g}, each other's inverse: give "
                "one of both"
            )
        for name, value in self.given.items():
            if not isinstance(value, str) and not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{option(name)} is {value:g}: give a number from 0 on, or leave it out")

    @property
    def given(self) -> dict[str, Any]:
        """The settings that differ from the model's own, by field; what Rope() is called with to have them again."""
        return {x.name: value for x in fields(self) if (value := getattr(self, x.name)) != x.default}

    def __bool__(self) -> bool:
        return bool(self.given)

    def __str__(self) -> str:
        """As options of the command line."""
        return " ".join(
            f"{option(name)} {value if isinstance(value, str) else f'{value:g}'}" for name, value in self.given.items()
        )

    @property
    def llama_kwargs(self) -> dict[str, Any]:
        """By the names that llama_context_params and llama_cpp.Llama have in common, every one of them.

        llama_cpp.Llama's own defaults are not upstream's: its yarn_beta_fast=32 would overrule the model's.
        """
        return {
            "rope_scaling_type": _UNSPECIFIED if self.scaling is None else SCALINGS[self.scaling],
            "rope_freq_base": self.freq_base,
            "rope_freq_scale": 1 / self.scale if self.scale else self.freq_scale,
            "yarn_orig_ctx": self.yarn_orig_ctx,
            "yarn_ext_factor": self.yarn_ext_factor,
            "yarn_attn_factor": self.yarn_attn_factor,
            "yarn_beta_slow": self.yarn_beta_slow,
            "yarn_beta_fast": self.yarn_beta_fast,
        }


def option(field: str) -> str:
    """The name of a field's option on the command line, upstream's."""
    name = field.replace("_", "-")
    return f"--{name}" if name.startswith("yarn") else f"--rope-{name}"


def rope_of(given: Mapping[str, Any] | None) -> Rope:
    """The settings that Rope.given noted, in a manifest for instance; None: the model's own. Raises UsageError."""
    try:
        return Rope(**(given or {}))
    except TypeError as error:
        raise UsageError(f"unknown RoPE settings {', '.join(given or {})}: use the version that wrote them") from error
