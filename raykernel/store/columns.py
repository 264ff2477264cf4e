"""Columns of the store's tables, each with the sentence that says what it means.

`raykernel query --schema` prints these, and the tables are made of them, so that no column is
without a meaning. Columns that several tables have stand here, the others with their table.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table."""

    name: str
    type: pa.DataType
    meaning: str
    """One or two sentences; what null means where it means anything."""


def text(name: str, meaning: str) -> Column:
    """A column of text."""
    return Column(name, pa.string(), meaning)


def texts(name: str, meaning: str) -> Column:
    """A column of lists of texts."""
    return Column(name, pa.list_(pa.string()), meaning)


def integer(name: str, meaning: str) -> Column:
    """A column of whole numbers."""
    return Column(name, pa.int64(), meaning)


def integers(name: str, meaning: str) -> Column:
    """A column of lists of whole numbers."""
    return Column(name, pa.list_(pa.int64()), meaning)


def number(name: str, meaning: str) -> Column:
    """A column of floating-point numbers."""
    return Column(name, pa.float64(), meaning)


def numbers(name: str, meaning: str) -> Column:
    """A column of lists of floating-point numbers."""
    return Column(name, pa.list_(pa.float64()), meaning)


def flag(name: str, meaning: str) -> Column:
    """A column of true and false."""
    return Column(name, pa.bool_(), meaning)


def time(name: str, meaning: str) -> Column:
    """A column of points in time."""
    return Column(name, pa.timestamp("us", tz="UTC"), meaning)


@cache
def schema_of(columns: tuple[Column, ...]) -> pa.Schema:
    """The Arrow schema of columns."""
    return pa.schema([(column.name, column.type) for column in columns])


# ---------------------------------------------------------------- columns of several tables

FINGERPRINT = text("fingerprint", "Name of the kernel: hash of what decides its numbers.")
KIND = text("kind", "Kind of kernel: sgd, signgd or asigngd.")
TRIAL = text("trial", "Name of the fine-tuning run: hash of what decides its numbers.")
TASK = text("task", "Name of the task (task.name).")
MODEL = text("model", "Name of the model (model.name).")
PROBLEM = (
    TASK,
    MODEL,
    text("prompt", "Style of the prompt; none: a linear head, standard fine-tuning."),
    integer("k", "Train examples per label."),
    integer("seed", "Seed of the few-shot sample of examples."),
)
"""Which problem a row is of."""
NUM_OUTPUTS = integer("num_outputs", "Outputs of the model: labels of the task.")
NUM_TRAIN = integer("num_train", "Train examples.")
SPLIT_SIZES = (
    NUM_TRAIN,
    integer("num_dev", "Dev examples."),
    integer("num_test", "Test examples."),
)
METRIC = text("metric", "What the scores are: accuracy, f1 or matthews.")
ZERO_SHOT = number("zero_shot", "Test score of the model as it comes; null: prompt=none.")
LINEAR_PROBE = number("linear_probe", "Test score of the linear probe; null: there is a prompt.")
PRECISION = text("precision", "Arithmetic of the passes and products.")
PARAMETERS = text("parameters", "The configuration group parameters, as JSON.")
OPTIMIZER = text("optimizer", "Update rule: sgd, adam, adamw or signgd.")
LOSS = text("loss", "What training minimises: cross_entropy or squared.")
METHOD = text("method", "Which parameters are trained: full, lora or peft.")
PULL = (
    text("regularization", "Pull to the start; none, too, where lam is 0."),
    number("lam", "λ of λ/2 ‖θ - θ_0‖²."),
    text("convention", "Loss that λ is weighed against: sum or mean; null: no pull."),
)
LEARNING_RATE = number("learning_rate", "Learning rate of the first step.")
BATCH_SIZE = integer("batch_size", "Examples of a step.")
STEPS = integer("steps", "Steps of training.")
SECONDS = number("seconds", "Wall-clock seconds that it took.")
PEAK_MEMORY = integer("peak_memory_bytes", "Largest memory of a process of the run.")
SOLUTION = (
    text("solved_by", "Solver: ridge, logistic or asymmetric."),
    number("ridge", "Selected ridge, relative to the operator norm of K(train, train)."),
    number("f0_scaling", "Selected divisor of the initial logits; inf leaves them out."),
    number("gamma", "Selected γ of the asymmetric solver; null: another solver."),
    number("c", "Selected c of the asymmetric solver; null: another solver."),
)
"""The point of the solver's grid that dev selected."""
SPECTRUM_ROWS = (
    text("outputs", "Outputs of the kernel read. contrast: what softmax sees; full: all."),
    integer("num_rows", "Rows of the kernel read, and so its eigenvalues."),
    integer("num_unresolved", "Eigenvalues that are rounding noise of the stored kernel."),
)
PATH = text("path", "Folder below the store that the row is of, and lasts as long as.")
ORIGIN = (
    time("created", "When the row was written, UTC."),
    text(
        "versions", "Version of every package that matters, and the commit of a checkout, as JSON."
    ),
    text("host", "Machine that wrote the row."),
)
"""What made a row; the store fills it in."""
OVERRIDES = texts("overrides", "Command line of the run.")
IDENTITY = text("identity", "All that decides the numbers, as JSON: its hash is the name.")
