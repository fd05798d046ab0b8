"""A machine of its own for each test: a data folder, a cache, and no network."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn
from urllib.error import URLError

import pytest

from cograd.data import files, images


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user cache, which does not exist yet; every download fails as it does with no network."""

    def offline(url: str, timeout: float) -> NoReturn:
        raise URLError("Name or service not known")

    folder = tmp_path / "cache"
    for module in (files, images):
        monkeypatch.setattr(module, "cache_dir", lambda: folder)
    monkeypatch.setattr(files, "urlopen", offline)
    monkeypatch.delenv("COGRAD_DATA", raising=False)
    return folder


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$COGRAD_DATA, an empty folder."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("COGRAD_DATA", str(folder))
    return folder
