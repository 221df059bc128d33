"""What the tests of texts start from."""

from __future__ import annotations

import pytest

from intactkv_export.prefix import ikv
from tests.support.smol import Smol


@pytest.fixture(scope="session")
def prefix(smol: Smol) -> ikv.Prefix:
    """Of a system prompt."""
    return ikv.read(smol.ikv)
