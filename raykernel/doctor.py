"""Checks of environment and problem before money is spent.

Wrong input ends in the same error as a run would give; what only costs or only surprises is shown
in a table. The model is loaded here and a handful of examples is traced; no block is stored.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from raykernel.analysis.gram import DEAD
from raykernel.compute.logs import sessions
from raykernel.compute.memory import GIB
from raykernel.compute.second_pass import TOLERANCE
from raykernel.config import RunConfig
from raykernel.console import Screen, size
from raykernel.errors import InputError
from raykernel.jobs import open_executor
from raykernel.location import RemotePath
from raykernel.ntk.capture import Capture, Tracer
from raykernel.ntk.contract import gram
from raykernel.plan import plan_worker
from raykernel.prepared import Prepared, prepare
from raykernel.problem.batches import collate
from raykernel.problem.checkpoints import load_tokenizer
from raykernel.problem.models import Problem, load_problem
from raykernel.problem.probe import Head
from raykernel.provenance import versions
from raykernel.store.blocks import Store
from raykernel.terms import ExecutorName


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    found: str


def examine(config: RunConfig, screen: Screen) -> None:
    """Run all checks and print them.

    Args:
        config: the run to be checked.
        screen: where to print.

    Raises:
        InputError: if a check failed.
    """
    checks = [check_environment(config)]
    prepared = prepare(config, screen)
    checks += [check_label_words(prepared), check_truncation(prepared), check_store(prepared)]
    with screen.stage("Tracing a few examples"):
        checks += check_gradients(prepared)
        checks.append(check_memory(prepared))
    if config.compute.executor is ExecutorName.ray:
        checks += [check_cluster(config, screen), check_logs()]
    screen.table(
        ["check", "", "found"],
        [[check.name, "ok" if check.ok else "FAILED", check.found] for check in checks],
        title=f"{config.task.name}, {config.model.name}",
    )
    failed = [check.name for check in checks if not check.ok]
    if failed:
        raise InputError(f"{len(failed)} checks failed: {', '.join(failed)}.")


def check_environment(config: RunConfig) -> Check:
    """Versions, cores and device."""
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    device = config.compute.device
    ok = not device.startswith("cuda") or torch.cuda.is_available()
    found += f", {os.cpu_count()} cores, device {device}"
    return Check("environment", ok, found if ok else f"{found}, but PyTorch sees no CUDA device")


def check_label_words(prepared: Prepared) -> Check:
    """Every label word is one token of its own; `prepare` has refused anything else."""
    tokenizer = load_tokenizer(prepared.config.model)
    encoded, labels = prepared.encoded, prepared.data.labels
    if not encoded.label_ids:
        return Check("label words", True, f"none: a linear head of {len(labels)} outputs")
    pieces = zip(labels, prepared.prompt.words, encoded.label_ids, strict=True)
    found = ", ".join(
        f"{label}: {word!r} = {tokenizer.convert_ids_to_tokens(token)!r}"
        for label, word, token in pieces
    )
    return Check("label words", True, found)


def check_truncation(prepared: Prepared) -> Check:
    """The readout's token is in every prompt, and how many texts lost something for it."""
    encoded = prepared.encoded
    lengths = [len(ids) for ids in encoded.input_ids]
    inside = all(at < length for at, length in zip(encoded.position, lengths, strict=True))
    cut = f"{encoded.truncated} of {len(lengths)} texts cut"
    return Check("truncation", inside, f"{min(lengths)} to {max(lengths)} tokens, {cut}")


def check_store(prepared: Prepared) -> Check:
    """The store's folder can be written to."""
    path = Store(prepared.config.store.path).path
    if isinstance(path, RemotePath):
        return Check("store", True, f"{path}: {_tried(path)}")
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    ok = os.access(there, os.W_OK)
    return Check("store", ok, f"{path}: {size(free)} free" if ok else f"{there} is not writable")


def _tried(path: RemotePath) -> str:
    """Write, read and delete an object, as a run does; raises what a run would."""
    probe = path / f".doctor-{uuid.uuid4().hex}"
    probe.write(b"raykernel")
    try:
        probe.read_bytes()
        try:
            probe.write(b"", replaces=False)
        except FileExistsError:
            return "can be read and written"
        return (
            "can be read and written, but overwrites where it should refuse (If-None-Match): let "
            "one process at a time search (sweep.workers=1)"
        )
    finally:
        probe.unlink(missing_ok=True)


def check_gradients(prepared: Prepared) -> list[Check]:
    """Gradients do not depend on company or padding, and which layers have none."""
    config = prepared.config
    problem = load_for_checks(prepared)
    tracer = Tracer(problem.module, problem.readout)
    ids = prepared.encoded.input_ids
    by_length = sorted(range(len(ids)), key=lambda index: (len(ids[index]), index))
    few = sorted({by_length[0], by_length[len(ids) // 2], by_length[-1]})

    def capture(indices: list[int]) -> Capture:
        return tracer.capture(collate(prepared.encoded, indices, config.compute.device))

    alone = gram_of(Capture.concatenate([capture([index]) for index in few]))
    together = gram_of(capture(few))
    whole = sum(alone.values(), np.zeros(()))
    change = np.linalg.norm(sum(together.values(), np.zeros(())) - whole) / np.linalg.norm(whole)
    limit = TOLERANCE[config.kernel.precision]
    shares = {
        name: np.einsum("iaia->", k) / np.einsum("iaia->", whole) for name, k in alone.items()
    }
    dead = [name for name, share in shares.items() if share < DEAD and name.count("cross(") == 0]
    mode = "whole batches" if tracer.batched else "one example at a time"
    covered = f"{len(tracer.groups)} layer groups, equal to autograd on the first example"
    if tracer.fallbacks:
        covered += f"; without a rule: {', '.join(tracer.fallbacks)}"
    return [
        Check("gradients", True, covered),
        Check(
            "batch and padding",
            bool(change < limit),
            f"kernel changes by {change:.1e} (at most {limit:.0e}); traced in {mode}",
        ),
        Check("dead gradients", True, ", ".join(dead) or "none"),
    ]


def load_for_checks(prepared: Prepared) -> Problem:
    """The problem in this process; a linear head gets unequal weights, a probe would need train."""
    config, num_labels = prepared.config, len(prepared.data.labels)

    def load(head: Head | None) -> Problem:
        return load_problem(
            config.model,
            config.parameters,
            label_ids=prepared.encoded.label_ids,
            num_labels=num_labels,
            head=head,
            device=config.compute.device,
            precision=config.kernel.precision,
        )

    problem = load(None)
    if prepared.encoded.label_ids:
        return problem
    batch = collate(prepared.encoded, [0], config.compute.device)
    width = problem.features(batch).shape[1]
    weight = np.random.default_rng(0).normal(size=(num_labels, width)) / np.sqrt(width)
    return load(Head(weight.astype(np.float32), np.zeros(num_labels, np.float32)))


def gram_of(capture: Capture) -> dict[str, np.ndarray]:
    """Kernel of a capture with itself by layer group, in float64."""
    return {name: block.double().cpu().numpy() for name, block in gram(capture, capture).items()}


def check_memory(prepared: Prepared) -> Check:
    """One example against one fits a worker; `plan` refuses anything else."""
    with tempfile.TemporaryDirectory() as scratch:
        sizes = plan_worker(prepared, scratch).sizes
    compute = prepared.config.compute
    return Check(
        "memory",
        True,
        f"{compute.workers} workers of {size(sizes.peak_bytes)}, "
        f"{size(compute.memory_gb * GIB)} allowed each",
    )


def make_idle() -> Callable[[int], int]:
    """In a worker's process: a function that does nothing."""
    return _same


def _same(job: int) -> int:
    return job


def check_cluster(config: RunConfig, screen: Screen) -> Check:
    """A worker starts, and every node runs the same versions, Ray's and Python's among them."""
    # Ray takes seconds to import, and an inline run needs none of it.
    from raykernel.compute.ray_executor import node_versions, versions_here

    with closing(open_executor(config.compute, screen)) as executor:
        (outcome,) = executor.run(make_idle, [0])
        outcome.value()
        nodes = node_versions()
    here = versions_here()
    other = dict.fromkeys(text for there in nodes if (text := difference(here, there)))
    number = f"{len(nodes)} node{'s' if len(nodes) > 1 else ''}"
    runs = f"Ray {here['ray']}, Python {here['python']}"
    found = f"{config.compute.address or 'local'}: starts workers; {number}, "
    return Check("cluster", not other, found + ("; ".join(other) or f"all with {runs} as here"))


def check_logs() -> Check:
    """What Ray has left on this machine; raykernel bounds the logs of a session, not their number.

    A folder may be of a session that runs, of anybody, so that none is deleted here.

    Returns:
        Always fine.
    """
    left = sessions()
    found = f"{left.path}: {left.count} sessions, {size(left.num_bytes)}"
    return Check("Ray's logs", True, found + "; those that have ended can be deleted")


def difference(here: Mapping[str, str], there: Mapping[str, str]) -> str | None:
    """How a node's versions differ from ours, None if they do not."""
    rows = [
        f"{name} {there.get(name)} (here {own})"
        for name, own in here.items()
        if name != "node" and there.get(name) != own
    ]
    return f"node {there['node']} has {', '.join(rows)}" if rows else None
