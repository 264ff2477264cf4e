"""Every signature of raykernel is checked at run time, in the tests' own process."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny, typed

typed.install("raykernel")

# Before Ray is imported: no token in $HOME. And one mode for all clusters that this process starts
# in turn: Ray keeps the first, and the actors of a cluster of another mode die at once.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"


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


@pytest.fixture(scope="session")
def ray_instance() -> Iterator[None]:
    """Ray on this machine, with room for the actors of `ray_run` and of another executor."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=100 * 2**20,
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parents[1])}},
    )
    yield
    ray.shutdown()
