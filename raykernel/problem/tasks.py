"""The few-shot sample of a task: train, dev and test examples of one (k, seed).

The sample is the papers' own, to the row: the training rows are shuffled by NumPy's legacy
generator, of every label the first k are train and the next k are dev. The shuffle does not
depend on k, so that for one seed the 16-shot examples lie inside the 64-shot ones; and the test
examples depend on neither k nor seed. Kernels therefore nest and are shared.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from raykernel.config import TaskConfig, fingerprint
from raykernel.errors import InputError, nearest
from raykernel.problem.sources import Rows, read_rows
from raykernel.terms import Split


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled example."""

    id: str
    """Split or file, and row in it."""
    texts: tuple[str, ...]
    """In the order of `task.text`."""
    label: int
    """Index into the labels."""


@dataclass(frozen=True, slots=True)
class Data:
    """The few-shot sample of one (task, k, seed)."""

    labels: tuple[str, ...]
    """Label values in the order of the outputs."""
    examples: tuple[Example, ...]
    """Train, then dev (each ordered by label), then test."""
    splits: dict[Split, range]
    """Where each split lies in `examples`."""
    fingerprint: str
    """Hash of ids, texts and labels."""
    notes: tuple[str, ...]
    """What to say once on screen."""


def load_data(task: TaskConfig) -> Data:
    """Read a task and draw its few-shot sample.

    Args:
        task: where the rows are and how to sample them.

    Returns:
        2k examples per label, and the test examples.

    Raises:
        InputError: if the data cannot be read or are too few, or a cell or label is missing.
    """
    train_rows, test_rows = read_rows(task)
    labels = label_values(task, [train_rows, *([test_rows] if test_rows else [])])
    train_labels = label_indices(train_rows, task, labels)
    notes = left_out(train_rows, train_labels)
    source = train_rows.name
    if test_rows is None:
        source += ", of which a part is held out for test"
        held_out = hold_out(train_labels, len(labels), task)
        test_rows, test_labels = train_rows, only(train_labels, held_out)
        train_labels = only(train_labels, set(range(len(train_labels))) - held_out)
        notes.append(
            f"no test split: {len(held_out)} rows of {train_rows.name} are held out for test "
            f"(task.test_fraction={task.test_fraction:g})"
        )
    else:
        test_rows = with_distinct_ids(test_rows, train_rows)
        test_labels = label_indices(test_rows, task, labels)
        notes += left_out(test_rows, test_labels)
    check_counts(train_labels, labels, task, source)
    train, dev = few_shot(train_labels, k=task.k, seed=task.seed)
    test = sample_test(test_labels, labels, task)
    if not test:
        raise InputError(f"{test_rows.name}: found no test example, expected at least one.")
    parts = {
        Split.train: examples_at(train_rows, train_labels, train, task),
        Split.dev: examples_at(train_rows, train_labels, dev, task),
        Split.test: examples_at(test_rows, test_labels, test, task),
    }
    return assemble(labels, parts, [*notes, *repeated_texts(parts)])


def assemble(
    labels: Sequence[str], parts: dict[Split, list[Example]], notes: Sequence[str]
) -> Data:
    """One sequence of examples with the splits as ranges into it."""
    examples: list[Example] = []
    splits = {}
    for split, members in parts.items():
        splits[split] = range(len(examples), len(examples) + len(members))
        examples += members
    assert len({example.id for example in examples}) == len(examples), "an example occurs twice"
    return Data(
        labels=tuple(labels),
        examples=tuple(examples),
        splits=splits,
        fingerprint=fingerprint([[item.id, item.texts, item.label] for item in examples]),
        notes=tuple(notes),
    )


# ---------------------------------------------------------------- sampling
def shuffled(num_rows: int, seed: int) -> list[int]:
    """Row numbers in the papers' random order.

    The legacy generator is what the papers used; NumPy promises never to change its stream. It
    makes the same draws for `np.random.seed(seed); np.random.shuffle(lines)` and for pandas'
    `sample(n, random_state=seed)`, which is the beginning of this order.

    Args:
        num_rows: how many rows there are.
        seed: seed of the order.

    Returns:
        The row numbers.
    """
    order = list(range(num_rows))
    np.random.RandomState(seed).shuffle(order)
    return order


def few_shot(labels: Sequence[int | None], *, k: int, seed: int) -> tuple[list[int], list[int]]:
    """Rows of train and dev: of every label the first k of the random order, and the next k.

    Args:
        labels: label of every row; None is shuffled along but never chosen.
        k: examples per label.
        seed: seed of the order.

    Returns:
        Rows of train and of dev, ordered by label.
    """
    by_label = grouped(labels, shuffled(len(labels), seed))
    train = [row for label in sorted(by_label) for row in by_label[label][:k]]
    dev = [row for label in sorted(by_label) for row in by_label[label][k : 2 * k]]
    return train, dev


def sample_test(labels: Sequence[int | None], names: Sequence[str], task: TaskConfig) -> list[int]:
    """Rows of test: all in their order, or `test_limit` of them in random order.

    Args:
        labels: label of every row; None is never chosen.
        names: label values.
        task: limit, seed and balance.

    Returns:
        The rows, the same for every k and seed.

    Raises:
        InputError: if balance is asked for and a label has no row.
    """
    usable = [row for row, label in enumerate(labels) if label is not None]
    order = shuffled(len(labels), task.test_seed)
    if task.test_balanced:
        by_label = grouped(labels, order)
        absent = [name for index, name in enumerate(names) if index not in by_label]
        if absent:
            raise InputError(
                f"task.test_balanced: found no test example of label {absent[0]!r}, expected "
                "every label. Set task.test_balanced=false, or choose other labels."
            )
        each = min(task.test_limit // len(names), *(len(rows) for rows in by_label.values()))
        return [row for label in sorted(by_label) for row in by_label[label][:each]]
    if len(usable) <= task.test_limit:
        return usable
    return [row for row in order if labels[row] is not None][: task.test_limit]


def hold_out(labels: Sequence[int | None], num_labels: int, task: TaskConfig) -> set[int]:
    """Rows held out for test: `test_fraction` of every label, whatever k and seed are."""
    by_label = grouped(labels, shuffled(len(labels), task.test_seed))
    held_out: set[int] = set()
    for label in range(num_labels):
        rows = by_label.get(label, [])
        held_out.update(rows[: round(task.test_fraction * len(rows))])
    return held_out


def grouped(labels: Sequence[int | None], order: Iterable[int]) -> dict[int, list[int]]:
    """Rows of every label, in the given order."""
    by_label: dict[int, list[int]] = {}
    for row in order:
        label = labels[row]
        if label is not None:
            by_label.setdefault(label, []).append(row)
    return by_label


def only(labels: Sequence[int | None], rows: set[int]) -> list[int | None]:
    """The labels of some rows, None elsewhere, so that rows keep their numbers."""
    return [label if row in rows else None for row, label in enumerate(labels)]


# ---------------------------------------------------------------- labels and cells
def label_values(task: TaskConfig, tables: Sequence[Rows]) -> list[str]:
    """The label values in the order of the outputs.

    Args:
        task: the values wanted, and those left out.
        tables: training rows, and test rows if there are any.

    Returns:
        `task.labels`, or all values found, sorted (numbers by size).

    Raises:
        InputError: if there are fewer than two, or one is both wanted and left out.
    """
    dropped = set(task.drop_labels)
    if both := dropped & set(task.labels):
        raise InputError(
            f"task.drop_labels: found {sorted(both)[0]!r}, which is in task.labels, too. Remove it "
            "from one of them."
        )
    if len(set(task.labels)) != len(task.labels):
        raise InputError(f"task.labels: found {task.labels}, expected different values.")
    found = {label for rows in tables for label in rows.labels if label is not None} - dropped
    labels = task.labels or sorted(found, key=by_size)
    if len(labels) < 2:
        raise InputError(
            f"task.labels: found {labels or 'no label'} in column {task.label!r} of "
            f"{tables[0].name}, expected at least two label values. Is task.label right?"
        )
    return labels


def by_size(value: str) -> tuple[float, str]:
    """Sort key: numbers by size, then other text."""
    try:
        number = float(value)
    except ValueError:
        return math.inf, value
    return number if math.isfinite(number) else math.inf, value


def label_indices(rows: Rows, task: TaskConfig, labels: Sequence[str]) -> list[int | None]:
    """Label of every row as index into `labels`; None for a row that is left out.

    Args:
        rows: the rows.
        task: which labels are left out.
        labels: label values.

    Returns:
        One index or None per row.

    Raises:
        InputError: for a row without a label, or with one that is not listed.
    """
    index = {value: position for position, value in enumerate(labels)}
    if task.drop_other_labels or task.data_dir is not None:
        return [None if label is None else index.get(label) for label in rows.labels]
    missing = [row for row, label in enumerate(rows.labels) if label is None]
    if missing:
        raise InputError(
            f"{rows.name}: found no label in {len(missing)} rows (the first is row {missing[0]}, "
            f"counted from 0), expected one in column {task.label!r}. Fill or remove them, or "
            "leave them out with task.labels=[…] task.drop_other_labels=true."
        )
    counts = Counter(label for label in rows.labels if label not in index)
    unlisted = [(label, n) for label, n in counts.items() if label not in task.drop_labels]
    if unlisted:
        label, count = unlisted[0]
        raise InputError(
            f"{rows.name}: found label {label!r} ({count} rows), expected one of task.labels "
            f"{list(labels)}; {nearest(str(label), labels)} Add it there, or leave its rows out "
            f"with task.drop_labels=[{label}] or task.drop_other_labels=true."
        )
    return [None if label is None else index.get(label) for label in rows.labels]


def check_counts(
    labels: Sequence[int | None], names: Sequence[str], task: TaskConfig, source: str
) -> None:
    """Check that every label has its k train and k dev examples.

    Raises:
        InputError: if one has fewer.
    """
    counts = Counter(label for label in labels if label is not None)
    rarest = min(range(len(names)), key=lambda label: counts[label])
    if counts[rarest] >= 2 * task.k:
        return
    largest = counts[rarest] // 2
    way_out = f"The largest possible k is {largest}: task.k={largest}."
    if largest == 0:
        way_out = "Give more rows, or leave the label out with task.drop_labels."
    raise InputError(
        f"task.k={task.k}: found {counts[rarest]} examples of label {names[rarest]!r} to draw "
        f"from in {source}, expected {2 * task.k} (k for train and k for dev). {way_out}"
    )


def examples_at(
    rows: Rows, labels: Sequence[int | None], chosen: Sequence[int], task: TaskConfig
) -> list[Example]:
    """The chosen rows as examples.

    Args:
        rows: all rows.
        labels: label of every row; None where it is left out.
        chosen: the rows chosen.
        task: names of the text columns.

    Returns:
        One example for each chosen row.

    Raises:
        InputError: if any row that could have been chosen lacks a text.
    """
    # All usable rows, not only the chosen ones: a seed must not decide whether the data are right.
    for row, texts in enumerate(rows.texts):
        if labels[row] is not None and None in texts:
            raise InputError(
                f"{rows.name}: found no text in row {row} (counted from 0), column "
                f"{task.text[texts.index(None)]!r}, expected one. Fill or remove the row."
            )
    examples = []
    for row in chosen:
        label = labels[row]
        assert label is not None, "only labelled rows are drawn"
        present = tuple(text for text in rows.texts[row] if text is not None)
        examples.append(Example(rows.ids[row], present, label))
    return examples


# ---------------------------------------------------------------- notes
def with_distinct_ids(test: Rows, train: Rows) -> Rows:
    """Test rows whose ids differ from those of the training rows, as for files of one name."""
    if not set(test.ids) & set(train.ids):
        return test
    return replace(test, ids=tuple(f"test:{name}" for name in test.ids))


def left_out(rows: Rows, labels: Sequence[int | None]) -> list[str]:
    """A note on rows without a label of the task."""
    count = sum(label is None for label in labels)
    return [f"{count} rows of {rows.name} are left out for their label"] if count else []


def repeated_texts(parts: dict[Split, list[Example]]) -> list[str]:
    """A note on test examples whose text is in train or dev, too."""
    seen = {example.texts for split in (Split.train, Split.dev) for example in parts[split]}
    count = sum(example.texts in seen for example in parts[Split.test])
    return [f"{count} test examples repeat a text of train or dev"] if count else []
