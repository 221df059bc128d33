"""What a conversion gives back: the files that were made, and what it took."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from intactkv_export.conversion.intact_tokens import Curve
from intactkv_export.prefix import Prefix
from intactkv_export.work import Stage


@dataclass(frozen=True)
class Output:
    """A GGUF that was written. type: as in weights.TYPES, or "reference"."""

    path: Path
    type: str
    n_bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class ConvertResult:
    """What came out, and what it took.

    outputs: the GGUFs; prefix: the `.ikv`. curves: by type, or by the model's name, what prefix_tokens="auto" chose by.
    calibrated: by type, {"prefix": its `.ikv`} and what its manifest says of the held-out texts: "n_tokens", their KL
    divergence "before" and "after", nats a token, and both "by_depth"; prefix is the first of them.
    """

    outputs: list[Output]
    prefix: Path
    prefix_bytes: int
    n_tokens: int
    text: str
    engine: str
    reference_sha256: str
    embedded: bool
    curves: dict[str, Curve]
    calibrated: dict[str, dict[str, Any]]
    stages: list[Stage]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: paths as text."""
        return _plain(asdict(self))


def result(
    outputs: list[Output],
    path: Path,
    prefix: Prefix,
    embedded: bool,
    curves: dict[str, Curve],
    calibrated: dict[str, dict[str, Any]],
    stages: list[Stage],
) -> ConvertResult:
    """path: of the prefix file that was published."""
    manifest = prefix.manifest
    return ConvertResult(
        outputs=outputs,
        prefix=path,
        prefix_bytes=path.stat().st_size,
        n_tokens=len(prefix.tokens),
        text=manifest["text"],
        engine=manifest["engine"]["name"],
        reference_sha256=manifest["reference"]["sha256"],
        embedded=embedded,
        curves=curves,
        calibrated=calibrated,
        stages=stages,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
