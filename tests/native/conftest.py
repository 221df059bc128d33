"""What tests of native code share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def f16(model: Callable[[str], Path]) -> Any:
    """The reference in llama.cpp: with quantized weights any change of the input flips roundings of activations."""
    from tests.support import lowlevel

    return lowlevel.load_model(model("F16"))
