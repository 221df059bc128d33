"""What tests of evaluation share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from intactkv_export.prefix import ikv
from tests.support.smol import Smol


@pytest.fixture
def tuned(smol: Smol, tmp_path: Path) -> Path:
    """A prefix of the first token that says it is calibrated, its V a little smaller."""
    prefix = ikv.read(smol.bos)
    manifest = {k: v for k, v in prefix.manifest.items() if k not in ("format", "tokens", "model")}
    K, V = ({x.il: getattr(x, name) for x in prefix.layers} for name in "KV")
    V = {il: (0.9 * rows).astype(np.float16) for il, rows in V.items()}
    path = tmp_path / "tuned.ikv"
    path.write_bytes(ikv.build(prefix.manifest["model"], prefix.tokens, K, V, {**manifest, "calibrated": {}}))
    return path
