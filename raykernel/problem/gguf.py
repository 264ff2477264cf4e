"""GGUF checkpoints as plain float32 safetensors, converted once into the user's cache."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import xxhash
from transformers import AutoModelForCausalLM, AutoTokenizer

from raykernel.cache import cache_folder
from raykernel.errors import InputError
from raykernel.problem.hub import first_line, quiet
from raykernel.problem.packaged import new_folder, progress


def dequantized(file: Path) -> Path:
    """The GGUF file's weights as a float32 safetensors folder in the cache, made at first use.

    Named by the file's content: de-quantising takes tens of seconds, reading the result one.

    Args:
        file: the GGUF file of a causal LM.

    Returns:
        A folder with config.json, tokenizer and model.safetensors.

    Raises:
        InputError: if it is not a GGUF file that transformers can de-quantise.
    """
    folder = cache_folder() / "gguf" / content_digest(file.parent, (file.name,))
    if folder.is_dir():
        return folder
    import torch  # that a file is there already is found out without it

    size = f"{file.stat().st_size / 1e6:.0f} MB"
    with (
        progress(f"De-quantising {file.name} ({size}), once ..."),
        new_folder(folder) as unfinished,
    ):
        source: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
        try:
            # Its progress bar asks neither transformers' settings nor whether this is a terminal.
            with quiet(), redirect_stderr(io.StringIO()):
                tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
                module: Any = AutoModelForCausalLM.from_pretrained(
                    file.parent, dtype=torch.float32, **source
                )
        except Exception as error:  # gguf and transformers raise many types on a foreign file
            raise InputError(
                f"model.gguf_file: could not read {file.name!r} ({first_line(error)}), expected a "
                "GGUF file of a causal LM that transformers can de-quantise."
            ) from error
        # The tensors are plain now, but transformers refuses to save what it still calls quantised.
        module.hf_quantizer = None
        if hasattr(module.config, "quantization_config"):
            del module.config.quantization_config
        with quiet():
            module.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
    return folder


def content_digest(folder: Path, patterns: tuple[str, ...]) -> str:
    """128-bit xxh3 of the names and contents of matching files.

    Hashes at memory speed, so that reading the disk decides how long it takes.

    Args:
        folder: where the files lie.
        patterns: glob patterns inside it.

    Returns:
        32 hexadecimal digits.
    """
    total = xxhash.xxh3_128()
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        total.update(path.name.encode())
        total.update(path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                total.update(chunk)
    return total.hexdigest()
