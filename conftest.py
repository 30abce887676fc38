"""For tests and docstring examples alike."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each write into a folder of its own."""
    monkeypatch.chdir(tmp_path)
