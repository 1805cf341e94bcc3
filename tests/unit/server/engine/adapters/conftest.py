"""What the tests of adapters in the engine share."""

from pathlib import Path

import pytest

from tests.support.models.adapters import touch_adapter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight adapters, a to h."""
    for name in "abcdefgh":
        touch_adapter(tmp_path / name)
    return tmp_path
