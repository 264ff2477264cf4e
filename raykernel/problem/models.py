"""The problem f(θ): a batch of texts to logits, at the pre-trained θ_0.

f is the label words' logits of a masked LM at the mask, or of a causal LM at the last position,
or, without a prompt, a linear head on an encoder. Weights come from a folder of safetensors
(checkpoints.py); logits are read as readout.py says; parameters.py decides which θ vary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PretrainedConfig

from raykernel.config import ModelConfig, ParametersConfig
from raykernel.errors import InputError
from raykernel.problem.architectures import HEADS, check_architecture, without_pooler
from raykernel.problem.batches import Batch
from raykernel.problem.checkpoints import Checkpoint, locate, read_config
from raykernel.problem.hub import SAFETENSORS, first_line, has_any, quiet
from raykernel.problem.parameters import select_parameters
from raykernel.problem.probe import Head
from raykernel.problem.readout import (
    Probed,
    embeddings,
    read_head,
    read_label_words,
    restrict_head,
)
from raykernel.problem.skeleton import blank_model
from raykernel.terms import Architecture, Precision

_DTYPES = {
    Precision.float32: torch.float32,
    Precision.float64: torch.float64,
    Precision.tf32: torch.float32,
    Precision.bfloat16: torch.bfloat16,
}
# Its output enters no readout, so it may be missing from a checkpoint.
_POOLER = re.compile(r"(^|\.)pooler\.")


@dataclass(frozen=True)
class Problem:
    """A model at θ_0 and how its logits are read."""

    module: nn.Module
    """In eval mode; `requires_grad` holds exactly for the parameters that vary."""
    readout: Callable[[nn.Module, Batch], Tensor]
    """(module, batch) → logits (n, c)."""

    @torch.no_grad()
    def features(self, batch: Batch) -> Float[Tensor, "n d"]:
        """What the linear head reads; without a prompt only.

        Args:
            batch: right-padded token ids.

        Returns:
            One row per example.

        Raises:
            TypeError: if the problem has a prompt, thus no linear head.
        """
        if not isinstance(self.module, Probed):
            raise TypeError("Only prompt=none has a linear head whose input could be read.")
        return self.module.features(batch)


def load_problem(
    model: ModelConfig,
    parameters: ParametersConfig,
    *,
    label_ids: tuple[int, ...],
    num_labels: int,
    head: Head | None = None,
    device: str = "cpu",
    precision: Precision = Precision.float32,
) -> Problem:
    """The problem at θ_0.

    The attention is the eager one: fused kernels do not promise the same numbers on every device.

    Args:
        model: which model.
        parameters: which parameters vary.
        label_ids: token ids of the label words; () means no prompt, thus a linear head.
        num_labels: number of logits.
        head: start of the linear head; zeros if None.
        device: cpu, cuda or cuda:N.
        precision: arithmetic of the forward pass.

    Returns:
        The model, without dropout, and its readout.

    Raises:
        ValueError: if the number of label words is not the number of labels.
    """
    place = _device(device, precision)
    checkpoint = locate(model)
    config = read_config(model, checkpoint)
    check_architecture(model, config, has_prompt=bool(label_ids))
    if label_ids and len(label_ids) != num_labels:
        raise ValueError(f"Found {len(label_ids)} label words, expected {num_labels}.")
    dtype = _DTYPES[precision]
    if label_ids:
        language_model = _load(model, checkpoint, config, model.architecture, dtype)
        _set_tie(language_model, model)
        restrict_head(language_model, label_ids)
        problem = Problem(language_model, read_label_words)
    else:
        encoder = _load(model, checkpoint, config, Architecture.encoder, dtype)
        probed = Probed(encoder, model.pooling, num_labels=num_labels)
        probed.classifier.to(dtype)
        probed.set_head(head)
        problem = Problem(probed, read_head)
    # On the CPU still: LoRA's random A must not depend on the device.
    select_parameters(problem.module, parameters)
    # The device only: rotary frequencies stay in float32 whatever the weights' precision.
    problem.module.to(place).eval()
    return problem


def check_parameters(
    model: ModelConfig, parameters: ParametersConfig, *, label_ids: tuple[int, ...], num_labels: int
) -> None:
    """Refuse a selection that fits nothing of a model, without its weights.

    Args:
        model: which model.
        parameters: which parameters vary.
        label_ids: token ids of the label words; () means no prompt, thus a linear head.
        num_labels: number of logits.

    Raises:
        InputError: if a name, a layer or an expression fits nothing, or nothing is left.
    """
    varying_parameters(model, parameters, label_ids=label_ids, num_labels=num_labels)


def varying_parameters(
    model: ModelConfig, parameters: ParametersConfig, *, label_ids: tuple[int, ...], num_labels: int
) -> list[str]:
    """Names of the parameters that vary, found without the model's weights.

    Args:
        model: which model.
        parameters: which parameters vary.
        label_ids: token ids of the label words; () means no prompt, thus a linear head.
        num_labels: number of logits.

    Returns:
        A shared parameter under each of its names; of a head around an encoder, `model.` is the
        encoder's prefix.

    Raises:
        InputError: if a name, a layer or an expression fits nothing, or nothing is left.
    """
    blank: Any = blank_model(model, has_prompt=bool(label_ids))
    with quiet(), torch.device("meta"):
        if label_ids:
            restrict_head(blank, label_ids)
        else:
            blank = Probed(blank, model.pooling, num_labels=num_labels)
        select_parameters(blank, parameters)
    named = blank.named_parameters(remove_duplicate=False)
    return [name for name, parameter in named if parameter.requires_grad]


def _load(
    model: ModelConfig,
    checkpoint: Checkpoint,
    config: PretrainedConfig,
    architecture: Architecture,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """The pre-trained weights in their class, each of them found in the checkpoint."""
    auto_class, _ = HEADS[architecture]
    config.use_cache = False
    if model.tie_head is not None:
        # Checkpoints drop a tied head's weight, and a class told not to tie would invent one; so
        # it is tied here and untied by `_set_tie`.
        config.tie_word_embeddings = True
    try:
        with quiet():
            module, report = auto_class.from_pretrained(
                checkpoint.folder,
                config=config,
                dtype=dtype,
                attn_implementation="eager",
                use_safetensors=has_any(checkpoint.folder, SAFETENSORS),
                trust_remote_code=model.trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
                **without_pooler(architecture, config),
            )
    except Exception as error:  # safetensors, transformers and remote code raise many types
        raise InputError(
            f"model.name: could not load the weights of {model.name!r} ({first_line(error)}), "
            "expected complete files that fit config.json. Save or download the model again."
        ) from error
    _check_complete(report["missing_keys"], model)
    loaded: PreTrainedModel = module
    return loaded


def _check_complete(missing: Iterable[str], model: ModelConfig) -> None:
    """No weight was invented: transformers fills gaps with random numbers."""
    names = sorted(name for name in missing if not _POOLER.search(name))
    if not names:
        return
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    raise InputError(
        f"model.name: found no weights for {len(names)} parameters in {model.name!r} ({shown}), "
        f"expected a complete {model.architecture.value}. If only the head is missing, use "
        "prompt=none (a linear head), or model.tie_head=true where it is the input embedding."
    )


def _set_tie(module: PreTrainedModel, model: ModelConfig) -> None:
    """Share input embedding and head, or give the head its own copy, as asked."""
    head, embedding = embeddings(module)
    if model.tie_head is None or not isinstance(head, nn.Linear):
        return
    is_tied = head.weight is embedding.weight
    if not model.tie_head and is_tied:
        head.weight = nn.Parameter(embedding.weight.detach().clone())
    if model.tie_head and not is_tied:
        if not torch.equal(head.weight, embedding.weight):
            raise InputError(
                f"model.tie_head: the head of {model.name!r} differs from its input embedding, "
                "expected equal weights to share. Set model.tie_head=null or false."
            )
        head.weight = embedding.weight
    module.config.tie_word_embeddings = model.tie_head


def set_matmul_precision(precision: Precision) -> None:
    """Switch tf32 on or off for the whole process; CPUs have none."""
    torch.set_float32_matmul_precision("high" if precision is Precision.tf32 else "highest")


def _device(name: str, precision: Precision) -> torch.device:
    """The device, with tf32 switched on or off where it exists."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(
            f"compute.device: found {name!r}, expected cpu, cuda or cuda:N. Set it."
        ) from error
    if device.type == "cuda":
        if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
            raise InputError(
                f"compute.device: found {name!r}, expected one of the {torch.cuda.device_count()} "
                "CUDA devices that this PyTorch sees. Set compute.device=cpu, or install a CUDA "
                "build of PyTorch."
            )
        set_matmul_precision(precision)
    elif precision is Precision.tf32:
        raise InputError(
            f"kernel.precision: tf32 exists on CUDA devices only, found compute.device={name}. "
            "Set kernel.precision=float32."
        )
    return device
