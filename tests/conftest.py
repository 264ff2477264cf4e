"""Every signature of raykernel is checked at run time, in the tests' own process."""

from pathlib import Path

import pytest

from tests import tiny, typed

typed.install("raykernel")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny masked language model in a folder, as a hub checkpoint would be."""
    return tiny.save_masked_lm(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of the user's own, with a review file."""
    monkeypatch.chdir(tmp_path)
    tiny.write_reviews(tmp_path / "reviews.tsv")
    return tmp_path
