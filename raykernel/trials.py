"""The stages of `raykernel finetune`, one short function each.

    config → examples → prompts → identity → stored? → worker trains → rows of the store → table

A trial is one fine-tuning run, named by what decides its numbers: task, prompt, model, parameters,
training and, where there is one, the pull to the start. One whose result is stored is never run
again; a run that was killed goes on from its last evaluation. A trial that fails, because its loss
is not finite for example, leaves no result.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from raykernel.compute.executor import Executor
from raykernel.config import Json, RunConfig, TrainingConfig, canonical_json, fingerprint, require
from raykernel.console import Screen, counted, duration, size
from raykernel.errors import BlockCorruptError, InputError, RunError
from raykernel.jobs import LateExecutor
from raykernel.location import StorePath
from raykernel.prepared import Prepared, example_labels, prepare, problem_columns
from raykernel.store.blocks import Store
from raykernel.store.commit import discard
from raykernel.store.trials import TrialFiles
from raykernel.terms import Precision, Split
from raykernel.training.spec import Point, Receipt, Result, ResultT, TrialSpec, Watch

_STEPS_PER_JOB = 10
"""Steps between signs of life, where no evaluation comes before."""


@dataclass(frozen=True, slots=True)
class TrialOutcome:
    """A trial that has ended, now or before."""

    prepared: Prepared
    row: dict[str, Any]
    """Its row of the table `trials`."""
    curve: list[dict[str, Any]]
    """Its rows of the table `curves`, by step."""
    was_stored: bool
    """It had ended before."""
    files: TrialFiles
    """Where `compute.weights.load_parameters` finds θ_FT."""

    @property
    def trial(self) -> str:
        """Its name in the store."""
        return str(self.row["trial"])


def run_trial(
    config: RunConfig,
    overrides: tuple[str, ...],
    screen: Screen,
    executor: Executor | None = None,
    watch: Watch | None = None,
) -> TrialOutcome:
    """Fine-tune, or read what a trial found that has ended before.

    Args:
        config: the run.
        overrides: the command line that made it, kept with the result.
        screen: where progress is shown.
        executor: where to train, if one is open; None: one of its own.
        watch: told of evaluations; what it raises ends the run, which goes on from there later.

    Returns:
        Its rows and where its parameters are.

    Raises:
        DivergedError: if loss or gradient stop being finite; nothing is stored then.
    """
    check_training(config)
    prepared = prepare(config, screen)
    check_pull(prepared)
    if executor is not None:
        return complete_trial(prepared, overrides, executor, screen, watch)
    compute = dataclasses.replace(config.compute, workers=1)  # no more would have a job
    with contextlib.closing(LateExecutor(compute, screen)) as own:
        return complete_trial(prepared, overrides, own, screen, watch)


def check_training(config: RunConfig) -> None:
    """Refuse what cannot be trained, before anything is computed.

    Args:
        config: the run.
    """
    require(
        config.training.precision is not Precision.tf32 or config.compute.device != "cpu",
        "training.precision",
        "tf32",
        "float32, because only CUDA devices have tf32. Set training.precision=float32",
    )


def check_pull(prepared: Prepared) -> None:
    """Refuse a pull that overshoots, before anything is computed.

    Args:
        prepared: the run, whose train examples count where λ is weighed against their sum.

    Raises:
        InputError: if it does.
    """
    config, num_train = prepared.config, len(prepared.data.splits[Split.train])
    own, rate = config.regularization, config.training.learning_rate
    share = own.step_share(config.training, num_train)
    if share < 2:
        return
    limit = 2 * own.lam / share
    divided = own.weight(config.training, num_train) != own.lam
    product = f"η λ / n, with n = {num_train}," if divided else "η λ"
    raise InputError(
        f"regularization.lam: found {own.lam:g}, expected less than {limit:g}. A step goes "
        f"{product} = {share:g} of the way back to the start, and from 2 on ends farther away "
        f"than it began. Lower regularization.lam or training.learning_rate (η = {rate:g})."
    )


def complete_trial(
    prepared: Prepared,
    overrides: tuple[str, ...],
    executor: Executor,
    screen: Screen,
    watch: Watch | None = None,
) -> TrialOutcome:
    """The same for a run whose input is read.

    Args:
        prepared: the run.
        overrides: the command line that made it, kept with the result.
        executor: where to train.
        screen: where progress is shown.
        watch: told of evaluations.

    Returns:
        Its rows and where its parameters are.
    """
    config = prepared.config
    training = config.training.resolved(k=config.task.k, num_labels=len(prepared.data.labels))
    identity = trial_identity(prepared, training)
    trial, store = fingerprint(identity), Store(config.store.path)
    files = store.trial(trial)
    stored = bool(store.rows("trials", trial=trial))
    if stored and (missing := _missing(prepared, training, store, trial)):
        screen.say(f"The result is stored, its {missing} are not: training again.")
        stored = False
    if stored:
        screen.say(f"Trial {trial} is stored: computing 0 steps.")
    else:
        files = store.begin_trial(trial)
        result = train(trial_spec(prepared, training, files), executor, screen, watch)
        curve = [{"trial": trial, **dataclasses.asdict(point)} for point in result.curve]
        store.write_results("curves", curve)
        row = _row(prepared, training, result, overrides)
        store.write_result("trials", {"trial": trial, **row, "identity": canonical_json(identity)})
    # Also that of a run that was killed after its result was written.
    discard(files.checkpoint)
    (row,) = store.rows("trials", trial=trial)
    return TrialOutcome(prepared, row, store.rows("curves", trial=trial), stored, files)


def _missing(prepared: Prepared, training: TrainingConfig, store: Store, trial: str) -> str:
    """What is asked for and not there, such as a file that was damaged and removed."""
    files = store.trial(trial)
    if not store.rows("curves", trial=trial):
        return "curve"
    if training.keep_weights and not files.weights.exists():
        return "parameters"
    if training.keep_weights and not prepared.encoded.label_ids and not files.head.exists():
        return "parameters of the start"
    if training.keep_weights and prepared.config.parameters.method.adds_adapter:
        wanted = files.adapter / "adapter_model.safetensors", files.adapter / "adapter_config.json"
        if not all(path.exists() for path in wanted):
            return "adapter"
    if training.twin and not has_twin(store, trial) and not files.last.exists():
        return "parameters of the last step"
    return ""


def has_twin(store: Store, trial: str) -> bool:
    """Whether the linear twin of a trial has ended, with all of its rows."""
    return all(store.rows(table, trial=trial) for table in ("twins", "bounds"))


def trial_identity(prepared: Prepared, training: TrainingConfig) -> dict[str, Json]:
    """What decides a trial's numbers, and nothing else: its hash is the trial's name.

    Args:
        prepared: the run.
        training: its method, with numbers of steps.

    Returns:
        A JSON tree.
    """
    shared = ("task", "prompt", "model", "parameters")
    own = prepared.config.regularization
    return {
        **{name: prepared.identity[name] for name in shared},
        "metric": prepared.config.task.metric.value,
        "training": training.identity,
        **({"regularization": own.identity} if own.is_on else {}),
    }


def trial_spec(prepared: Prepared, training: TrainingConfig, files: TrialFiles) -> TrialSpec:
    """What a worker needs to train."""
    config = prepared.config
    return TrialSpec(
        model=config.model,
        parameters=config.parameters,
        training=training,
        regularization=config.regularization,
        compute=config.compute,
        metric=config.task.metric,
        encoded=prepared.encoded,
        labels=tuple(int(label) for label in example_labels(prepared.data)),
        num_labels=len(prepared.data.labels),
        splits=dict(prepared.data.splits),
        files=files,
    )


def train(
    spec: TrialSpec, executor: Executor, screen: Screen, watch: Watch | None = None
) -> Result:
    """Train from the start or from the checkpoint to the end, on one worker.

    Args:
        spec: what to train.
        executor: where.
        screen: where evaluations and progress are shown.
        watch: told of evaluations.

    Returns:
        What was found; θ_FT is in the store.
    """
    return run_steps(
        spec.steps,
        spec.files.checkpoint,
        spec=spec,
        executor=executor,
        screen=screen,
        watch=watch,
    )


def run_steps(
    make: Callable[[], Callable[[int], Receipt[ResultT]]],
    checkpoint: StorePath,
    *,
    spec: TrialSpec,
    executor: Executor,
    screen: Screen,
    watch: Watch | None = None,
) -> ResultT:
    """Have a worker train up to one step after the other, and see how it goes.

    Args:
        make: makes the worker's function, which takes a number of steps.
        checkpoint: where that writes down how far it is.
        spec: what is trained.
        executor: where.
        screen: where evaluations and progress are shown.
        watch: told of evaluations.

    Returns:
        What the last step gave.

    Raises:
        RunError: if loss or gradient stop being finite, or the worker fails otherwise.
    """
    steps, done = spec.training.steps, _steps_done(checkpoint, screen)
    assert steps is not None, "a resolved configuration"
    ends = _ends(spec.training, done)
    shown = done if done else -1
    result: ResultT | None = None
    pass_size, halved = spec.compute.batch_size, 0
    before = dict(zip(ends, [done, *ends], strict=False))
    with screen.progress("steps", steps - done) as advance:
        # The steps of a trial are one after the other: a second worker would do the same ones.
        for outcome in executor.run(make, ends, workers=1):
            receipt = outcome.value()
            if receipt.pass_size < pass_size:
                pass_size = receipt.pass_size
                screen.note(
                    f"compute.memory_gb={spec.compute.memory_gb:g} has room for "
                    f"{counted(pass_size, 'example')} in a pass, not compute.batch_size="
                    f"{spec.compute.batch_size}."
                )
            if receipt.halved > halved:
                halved = receipt.halved
                screen.note(
                    f"memory ran out, and passes were halved {counted(halved, 'time')}: the same "
                    "gradients, summed over more passes. Lower compute.memory_gb to what is free."
                )
            for point in receipt.points:
                if point.step > shown:
                    screen.say(_line(point, spec))
                    shown = point.step
                    if watch is not None and point.step:
                        watch(point)
            advance(outcome.job - before[outcome.job])
            result = receipt.result or result
    if result is None:
        raise RunError(f"found no result after step {steps}, expected one. Run it again.")
    return result


def _ends(training: TrainingConfig, done: int) -> list[int]:
    """Steps up to which the jobs train."""
    assert training.steps is not None, "a resolved configuration"
    assert training.eval_every is not None, "a resolved configuration"
    evaluated = range(training.eval_every, training.steps, training.eval_every)
    ends = {*range(_STEPS_PER_JOB, training.steps, _STEPS_PER_JOB), *evaluated}
    # The last job is there even if all steps are done: it gives the result.
    return [*sorted(end for end in ends if end > done), training.steps]


def _steps_done(checkpoint: StorePath, screen: Screen) -> int:
    """Where the run goes on; a damaged checkpoint is dropped."""
    from raykernel.compute.tensorfile import read_facts  # a stored trial needs none of it

    try:
        done = int(read_facts(checkpoint)["step"])
    except FileNotFoundError:
        return 0
    except BlockCorruptError as error:
        screen.note(f"{error} It is dropped: training begins anew.")
        discard(checkpoint)
        return 0
    screen.say(f"Going on after step {done}.")
    return done


def _line(point: Point, spec: TrialSpec) -> str:
    loss = "" if point.train_loss is None else f"train loss {point.train_loss:.4f}, "
    return (
        f"step {point.step} of {spec.training.steps}: {loss}dev loss {point.dev_loss:.4f}, dev "
        f"{spec.metric.value} {point.dev_score:.3f}"
    )


def _row(
    prepared: Prepared, training: TrainingConfig, result: Result, overrides: tuple[str, ...]
) -> dict[str, Any]:
    """One row of the table `trials`, without its name and identity."""
    config, own = prepared.config, prepared.config.regularization
    num_train = len(prepared.data.splits[Split.train])
    return problem_columns(prepared, result.zero_shot) | {
        "method": config.parameters.method.value,
        "intrinsic_dimension": training.intrinsic_dimension,
        "optimizer": training.optimizer.value,
        "loss": training.loss.value,
        "regularization": own.applied.value,
        "lam": own.lam,
        "convention": own.convention.value if own.is_on else None,
        "sigma": own.sigma(training, num_train),
        "learning_rate": training.learning_rate,
        "batch_size": training.batch_size,
        "steps": training.steps,
        "training_seed": training.seed,
        "precision": training.precision.value,
        "num_parameters": result.num_parameters,
        "finetuned": result.test,
        "dev": result.best.dev_score,
        "best_step": result.best.step,
        "distance": result.best.distance,
        "seconds": result.seconds,
        "peak_memory_bytes": result.peak_memory_bytes,
        "weights_checksum": result.weights_checksum,
        "overrides": list(overrides),
        "parameters": canonical_json(config.parameters.identity),
        "training": canonical_json(training.identity),
    }


def _pulled(row: dict[str, Any]) -> str:
    """The pull in a few letters; nothing where there is none."""
    if not row["lam"]:
        return ""
    sigma = "" if row["sigma"] is None else f", σ = {row['sigma']:g}"
    return f", {row['regularization']}, λ = {row['lam']:g}{sigma}"


def show_trial(outcome: TrialOutcome, screen: Screen) -> None:
    """Print scores, costs, where the parameters are, and what to try next.

    Args:
        outcome: of `run_trial`.
        screen: where to print.
    """
    row, config, start = outcome.row, outcome.prepared.config, outcome.curve[0]
    probe = row["linear_probe"] is not None
    before = row["linear_probe"] if probe else row["zero_shot"]
    screen.table(
        ["", f"{row['metric']} (test)", "dev", "dev loss", "step", "‖θ - θ_0‖"],
        [
            [
                "linear probe" if probe else "zero-shot",
                f"{before:.3f}",
                f"{start['dev_score']:.3f}",
                f"{start['dev_loss']:.4f}",
                "0",
                "0",
            ],
            [
                f"fine-tuning ({row['optimizer']}, {row['method']}{_pulled(row)})",
                f"{row['finetuned']:.3f}",
                f"{row['dev']:.3f}",
                *(f"{p['dev_loss']:.4f}" for p in outcome.curve if p["step"] == row["best_step"]),
                str(row["best_step"]),
                f"{row['distance']:.3g}",
            ],
        ],
        title=(
            f"{row['task']}, {row['model']}, k={row['k']}, seed {row['seed']}: {row['num_train']} "
            f"train, {row['num_dev']} dev, {row['num_test']} test"
        ),
    )
    when = ", stored before (0 steps done now)" if outcome.was_stored else ""
    screen.out.print(
        f"Trial {outcome.trial}{when}: {row['steps']} steps of {row['batch_size']} examples, "
        f"learning rate {row['learning_rate']:g}, {row['num_parameters']:,} trained numbers, "
        f"{duration(row['seconds'])}, peak {size(row['peak_memory_bytes'])}. "
        + (
            f"The best are in {outcome.files.weights}"
            if row["weights_checksum"]
            else "None are kept"
        ),
        markup=False,
    )
    screen.out.print(
        'Next: raykernel query "select task, model, optimizer, learning_rate, dev, finetuned from '
        f'trials" --store {config.store.path}',
        markup=False,
    )
