"""The Hugging Face hub at its edge: downloads, what their failures mean, and silence."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import logging as transformers_logging

from raykernel.config import ModelConfig
from raykernel.errors import InputError

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

_ELSEWHERE = (
    "Name a local folder (model=hf model.name=FOLDER) or a packaged model "
    "(model=smollm2_135m, model=minilm_l6) instead."
)


def download_model(model: ModelConfig) -> Path:
    """The model's folder in the hub cache, its name the commit.

    A pinned commit that is there already asks no network: many workers would be many requests.

    Args:
        model: name, revision and what kinds of files are allowed.

    Returns:
        A folder without subfolders: exports to other frameworks lie there.

    Raises:
        InputError: if the hub does not have it, does not give it, or cannot be reached.
    """
    wanted = ["*.json", "*.txt", "*.model", "*.jinja", "model*.safetensors"]
    wanted += ["*.py"] if model.trust_remote_code else []
    wanted += ["pytorch_model*.bin"] if model.allow_pickle else []
    options: dict[str, Any] = {"allow_patterns": wanted, "ignore_patterns": ["*/*"]}
    if model.revision and re.fullmatch("[0-9a-f]{40}", model.revision):
        try:
            cached = Path(
                snapshot_download(
                    model.name, revision=model.revision, local_files_only=True, **options
                )
            )
            if has_any(cached, SAFETENSORS + PICKLES):
                return cached
        except LocalEntryNotFoundError:
            pass
    with _hub_errors(model):
        return Path(snapshot_download(model.name, revision=model.revision, **options))


def download_file(model: ModelConfig, file: str) -> Path:
    """One file of a hub repository, in the hub cache.

    Args:
        model: name and revision.
        file: its path in the repository.

    Returns:
        Where it lies.
    """
    with _hub_errors(model):
        return Path(hf_hub_download(model.name, file, revision=model.revision))


def has_any(folder: Path, names: tuple[str, ...]) -> bool:
    """Whether a folder holds at least one of these files."""
    return any((folder / name).is_file() for name in names)


@contextmanager
def _hub_errors(model: ModelConfig) -> Iterator[None]:
    """Say what a failed download means for the user."""
    name, revision = model.name, model.revision
    try:
        yield
    except GatedRepoError as error:
        raise InputError(
            f"model.name: access to {name!r} is granted by its owner, expected a login that has "
            f"it. Accept its terms on the hub and log in with `hf auth login`. {_ELSEWHERE}"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(
            f"model.revision: found no {revision!r} of {name!r} on the hub, expected a branch, tag "
            "or commit of it. Check model.revision."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"model.name: found no model {name!r} on the Hugging Face hub and no such folder here, "
            f"expected ORG/NAME. Check the spelling, or log in if it is private. {_ELSEWHERE}"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise InputError(
            f"model.name: {name!r} is not in the local cache, and the Hugging Face hub could not "
            f"be reached ({first_line(error)}); expected a network or a cached copy. {_ELSEWHERE}"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from reporting what our own checks decide and say.

    Yields:
        Nothing.
    """
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def first_line(error: Exception) -> str:
    """An exception's message without its further paragraphs."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
