"""Whether every file of a store is whole and belongs where it lies."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from raykernel.errors import BlockCorruptError, InputError
from raykernel.jsontext import json_object
from raykernel.location import StorePath, folders
from raykernel.store import manifest
from raykernel.store.arrowfile import damage, read, read_header
from raykernel.store.baselines import NAME as BASELINES
from raykernel.store.baselines import check_baselines
from raykernel.store.blockfile import Names
from raykernel.store.blocks import Store, open_store
from raykernel.store.commit import stale_temporaries
from raykernel.store.kernelfiles import PINNED
from raykernel.store.kernels import KernelHandle
from raykernel.store.linearized import read_linearized
from raykernel.store.predictions import read_prediction, solution_of
from raykernel.store.results import COMPACTED, FOLDER, is_result, read_file, rescue
from raykernel.store.tables import TABLES, ResultTable
from raykernel.store.trials import checksum

_BLOCK = re.compile(r"block-(\d{4,})-(\d{4,})\.arrow")
_LOGITS = re.compile(r"logits-(\d{4,})\.arrow")
_LINEARIZED = re.compile(r"linearized-(\d{4,})\.arrow")
_PREDICTION = re.compile(r"prediction-[0-9a-f]{16}-(\d{4,})\.arrow")


@dataclass(frozen=True, slots=True)
class BadFile:
    """A file that cannot be trusted."""

    path: StorePath
    reason: str
    removed: bool


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a check of a store found."""

    num_kernels: int
    num_trials: int
    num_files: int
    """Files checked."""
    bad: tuple[BadFile, ...]
    leftovers: tuple[StorePath, ...]
    """Temporaries of writers that died; removed where removal was asked for."""
    num_missing: int
    """Blocks still to compute, after removal."""

    @property
    def ok(self) -> bool:
        """Nothing bad remains."""
        return all(file.removed for file in self.bad)

    def text(self) -> str:
        """The report as lines, ending with what to do.

        Returns:
            One line per bad file and a summary.
        """
        lines = [
            f"{file.path}: {file.reason}" + (" (removed)" if file.removed else "")
            for file in self.bad
        ]
        lines.append(
            f"{self.num_files} files of {self.num_kernels} kernels and {self.num_trials} trials "
            f"checked: {len(self.bad)} bad, {len(self.leftovers)} old temporaries, "
            f"{self.num_missing} blocks missing."
        )
        if not self.ok:
            lines.append("`raykernel verify --remove` deletes what a run can compute again.")
        elif self.num_missing:
            lines.append("A command that needs missing blocks computes them.")
        return "\n".join(lines)


def verify(path: str | StorePath, *, remove: bool = False) -> VerifyReport:
    """Check every checksum, manifest and shape of a store.

    Args:
        path: folder of the store.
        remove: delete what is damaged, so that the next run computes it again, and temporaries
            too old to have a living writer. Files of a newer format or unknown name stay.

    Returns:
        The report.
    """
    store = open_store(path)
    num_files = 0
    bad: list[BadFile] = []
    kernels, trials, choices = (
        folders(store.path / name) for name in ("kernels", "trials", "selections")
    )
    tables = [store.path / FOLDER / name for name in TABLES]
    results = [folder for name in tables for folder in (name, name / COMPACTED) if folder.is_dir()]
    checks = {
        **dict.fromkeys(kernels, _problems),
        **dict.fromkeys(trials, _trial_problems),
        **dict.fromkeys(choices, _choice_problems),
        **dict.fromkeys(results, _result_problems),
    }
    for folder, problems in checks.items():
        files = sorted(
            file
            for file in folder.iterdir()
            if not file.name.startswith(".") and file not in checks
        )
        num_files += len(files)
        for file, reason, replaceable in problems(store, folder, files):
            if remove and replaceable:
                if folder in results:
                    rescue(file, _table_of(folder))
                file.unlink(missing_ok=True)
            bad.append(BadFile(file, reason, remove and replaceable))
    leftovers = tuple(stale_temporaries(store.path))
    for leftover in leftovers if remove else ():
        leftover.unlink(missing_ok=True)
    missing = _num_missing(store)
    return VerifyReport(len(kernels), len(trials), num_files, tuple(bad), leftovers, missing)


def _problems(
    store: Store, folder: StorePath, files: list[StorePath]
) -> Iterator[tuple[StorePath, str, bool]]:
    """Bad files of one kernel: (path, reason, whether a run would write it again)."""
    if not files:  # begun and killed at once: the next run continues
        return
    try:
        stored = manifest.read(folder)
        if stored.fingerprint != folder.name:
            raise BlockCorruptError(
                damage(folder / manifest.NAME, f"identity of kernel {stored.fingerprint}")
            )
    except FileNotFoundError:
        yield folder / manifest.NAME, "missing, so that the other files cannot be checked", False
        return
    except InputError as error:
        yield folder / manifest.NAME, _reason(error, folder / manifest.NAME), _damaged(error)
        return
    handle = KernelHandle(folder, stored)
    names_by_file: dict[StorePath, Names] = {}
    for file in files:
        try:
            names = _check(handle, file)
        except InputError as error:
            yield file, _reason(error, file), _damaged(error)
        else:
            if names is not None:
                names_by_file[file] = names
    yield from _odd_groups(names_by_file)


def _check(handle: KernelHandle, file: StorePath) -> Names | None:
    """Read one file as a run would; names of its rows if it is a block."""
    grid = handle.grid
    if match := _BLOCK.fullmatch(file.name):
        try:
            cell = grid.cell(int(match[1]), int(match[2]))
        except IndexError as error:
            raise BlockCorruptError(damage(file, str(error))) from error
        return handle.read_block(cell).names
    by_row = (_LOGITS, _LINEARIZED, _PREDICTION)
    if match := next(filter(None, (pattern.fullmatch(file.name) for pattern in by_row)), None):
        i = int(match[1])
        if i >= grid.num_row_blocks:
            raise BlockCorruptError(damage(file, f"the grid has {grid.num_row_blocks} row blocks"))
        if match.re is _LOGITS:
            handle.read_logits(i)
        elif match.re is _LINEARIZED:
            read_linearized(handle, i)
        else:
            _check_prediction(handle, file, i)
    elif file.name == "examples.arrow":
        if handle.examples().num_rows != grid.num_rows:
            raise BlockCorruptError(damage(file, f"expected {grid.num_rows} examples"))
    else:
        _check_other(handle, file)
    return None


def _check_prediction(handle: KernelHandle, file: StorePath, i: int) -> None:
    solution = solution_of(file, read_header(file))
    if solution.file_name(i) != file.name:
        raise BlockCorruptError(damage(file, f"it is of {solution.file_name(i)}"))
    read_prediction(handle, solution, i)


def _check_other(handle: KernelHandle, file: StorePath) -> None:
    if file.name == "head.arrow":
        read(file, check=True)
    elif file.name == BASELINES:
        check_baselines(handle)
    elif file.suffix == ".json" and file.stem in PINNED:
        handle.read_pinned(file.stem)
    elif file.name != manifest.NAME:
        raise InputError("no file of a store; move it elsewhere")


def _trial_problems(
    store: Store, folder: StorePath, files: list[StorePath]
) -> Iterator[tuple[StorePath, str, bool]]:
    """Bad files of one fine-tuning run, as `_problems` names them."""
    of_trial = store.trial(folder.name)
    known = (of_trial.checkpoint, of_trial.head, of_trial.adapter, of_trial.twin_checkpoint)
    summed = {
        of_trial.weights: ("trials", "weights_checksum"),
        of_trial.last: ("twins", "last_checksum"),
        of_trial.twin: ("twins", "weights_checksum"),
    }
    for file in files:
        try:
            if file in summed:
                _check_weights(store, folder.name, file, *summed[file])
            elif file not in known:
                raise InputError("no file of a store; move it elsewhere")
        except InputError as error:
            yield file, _reason(error, file), _damaged(error)


def _choice_problems(
    store: Store, folder: StorePath, files: list[StorePath]
) -> Iterator[tuple[StorePath, str, bool]]:
    """Bad files of a choice of layers, as `_problems` names them."""
    del store, folder
    for file in files:
        try:
            if file.name == "adapter_config.json":
                _check_json(file)
            else:
                raise InputError("no file of a store; move it elsewhere")
        except InputError as error:
            yield file, _reason(error, file), _damaged(error)


def _result_problems(
    store: Store, folder: StorePath, files: list[StorePath]
) -> Iterator[tuple[StorePath, str, bool]]:
    """Bad files of a result table, as `_problems` names them."""
    del store
    spec = _table_of(folder)
    for file in files:
        try:
            if not is_result(file):
                raise InputError("no file of a store; move it elsewhere")
            read_file(file, spec)
        except FileNotFoundError:  # compacted meanwhile
            continue
        except InputError as error:
            yield file, _reason(error, file), _damaged(error)


def _table_of(folder: StorePath) -> ResultTable:
    return TABLES[folder.parent.name if folder.name == COMPACTED else folder.name]


def _check_json(file: StorePath) -> None:
    try:
        json_object(file.read_bytes())
    except ValueError as error:
        raise BlockCorruptError(damage(file, str(error))) from error


def _check_weights(store: Store, trial: str, file: StorePath, table: str, column: str) -> None:
    try:
        rows = store.rows(table, trial=trial)
    except BlockCorruptError:  # among the bad files itself
        return
    for row in rows:
        if row[column] != checksum(file):
            raise BlockCorruptError(f"{file}: other content than its trial wrote")


def _odd_groups(names_by_file: dict[StorePath, Names]) -> Iterator[tuple[StorePath, str, bool]]:
    """Blocks whose rows differ from most others': they cannot be summed with them."""
    counts = Counter(tuple(names) for names in names_by_file.values())
    if len(counts) < 2:
        return
    usual, _ = counts.most_common(1)[0]
    for file, names in names_by_file.items():
        if tuple(names) != usual:
            reason = f"{len(names)} rows, other layer groups than most blocks ({len(usual)} rows)"
            yield file, reason, True


def _damaged(error: InputError) -> bool:
    return isinstance(error, BlockCorruptError)


def _reason(error: InputError, file: StorePath) -> str:
    return str(error).removeprefix(f"{file}: ").split(". Expected")[0]


def _num_missing(store: Store) -> int:
    count = 0
    for name in store.fingerprints():
        try:
            count += len(store.open(name).missing_begun())
        except InputError:  # its manifest is among the bad files
            continue
    return count
