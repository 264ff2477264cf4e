"""Whether every file of a store is whole and belongs where it lies."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from raykernel.errors import BlockCorruptError, InputError
from raykernel.location import StorePath, folders, location, names, sizes
from raykernel.store import manifest
from raykernel.store.arrowfile import damage, read, read_header
from raykernel.store.baselines import NAME as BASELINES
from raykernel.store.baselines import check_baselines
from raykernel.store.blockfile import Names
from raykernel.store.blocks import FOLDERS, MARKER, Store, open_store, write_marker
from raykernel.store.commit import explain, stale_temporaries
from raykernel.store.kernelfiles import PINNED
from raykernel.store.kernels import KernelHandle
from raykernel.store.linearized import read_linearized
from raykernel.store.predictions import read_prediction, solution_of
from raykernel.store.results import COMPACTED, FOLDER, is_result, read_file, rescue
from raykernel.store.sealed import beside, check_beside, check_tensors, unseal_line
from raykernel.store.tables import TABLES, ResultTable
from raykernel.store.trials import checksum

_UNKNOWN = "no file of a store; move it elsewhere"
_WITH_A_BLOCK = {"head.arrow", *(f"{name}.json" for name in PINNED)} - {"rates.json"}
"""What a worker makes before it computes a block, and only then."""
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
    root = location(path)
    bad: list[BadFile] = []
    try:
        store = open_store(root)
    except BlockCorruptError as error:
        bad.append(BadFile(root / MARKER, _reason(error, root / MARKER), remove))
        if not remove:
            return VerifyReport(0, 0, 1, tuple(bad), (), 0)
        write_marker(root)  # it says nothing else than the format, which we know
        store = open_store(root)
    num_files = 1
    kernels, trials, choices = (
        folders(store.path / name) for name in ("kernels", "trials", "selections")
    )
    tables = [store.path / FOLDER / name for name in TABLES]
    results = [folder for name in tables for folder in (name, name / COMPACTED) if folder.is_dir()]
    sweeps = store.path / "sweeps"
    searches = [sweeps, *(one for one in folders(sweeps) if one.suffix == ".journal")]
    adapters = [store.trial(folder.name).adapter for folder in trials]
    checks = {
        **dict.fromkeys(kernels, _problems),
        **dict.fromkeys(trials, _trial_problems),
        **dict.fromkeys([*choices, *(one for one in adapters if one.is_dir())], _adapter_problems),
        **dict.fromkeys(results, _result_problems),
        **dict.fromkeys([one for one in searches if one.is_dir()], _journal_problems),
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
                _delete(file)
            bad.append(BadFile(file, reason, remove and replaceable))
    bad += [BadFile(file, _UNKNOWN, False) for file in _strays(store.path)]
    leftovers = tuple(stale_temporaries(store.path))
    for leftover in leftovers if remove else ():
        _delete(leftover)
    missing = _num_missing(store)
    return VerifyReport(len(kernels), len(trials), num_files, tuple(bad), leftovers, missing)


def _delete(file: StorePath) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:  # of a folder: an object store raises what it means itself
        explain(error, Path(str(file)), 0)


def _problems(
    store: Store, folder: StorePath, files: list[StorePath]
) -> Iterator[tuple[StorePath, str, bool]]:
    """Bad files of one kernel: (path, reason, whether a run would write it again)."""
    if not files:  # begun and killed at once: the next run continues
        return
    try:
        stored = manifest.read(folder)
    except FileNotFoundError:
        yield folder / manifest.NAME, "missing, so that the other files cannot be checked", False
        return
    except InputError as error:
        yield folder / manifest.NAME, _reason(error, folder / manifest.NAME), _damaged(error)
        return
    handle = KernelHandle(folder, stored)
    names_by_file: dict[StorePath, Names] = {}
    again: list[str] = []
    for file in files:
        try:
            own = _check(handle, file)
        except InputError as error:
            yield file, _reason(error, file), _damaged(error)
            if file.name in _WITH_A_BLOCK and _damaged(error):
                again.append(file.name)
        else:
            if own is not None:
                names_by_file[file] = own
    yield from _odd_groups(names_by_file)
    for file in sorted(names_by_file)[:1] if again else ():
        yield file, f"whole, but {', '.join(again)} is made again with a block", True


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
        raise InputError(_UNKNOWN)


def _trial_problems(
    store: Store, folder: StorePath, files: list[StorePath]
) -> Iterator[tuple[StorePath, str, bool]]:
    """Bad files of one fine-tuning run, as `_problems` names them."""
    of_trial = store.trial(folder.name)
    known = (of_trial.checkpoint, of_trial.head, of_trial.twin_checkpoint)
    summed = {
        of_trial.weights: ("trials", "weights_checksum"),
        of_trial.last: ("twins", "last_checksum"),
        of_trial.twin: ("twins", "weights_checksum"),
    }
    for file in files:
        try:
            if file not in (*known, *summed):
                raise InputError(_UNKNOWN)
            check_tensors(file)
            if file in summed:
                _check_weights(store, folder.name, file, *summed[file])
        except FileNotFoundError:  # of a run that has just ended
            continue
        except InputError as error:
            yield file, _reason(error, file), _damaged(error)


def _adapter_problems(
    store: Store, folder: StorePath, files: list[StorePath]
) -> Iterator[tuple[StorePath, str, bool]]:
    """Bad files of an adapter, trained or a choice of layers, as `_problems` names them."""
    del store
    config = folder / "adapter_config.json"
    for file in files:
        try:
            if file == config:
                check_beside(file)
            elif file.name == "adapter_model.safetensors":
                check_tensors(file)
            elif file != beside(config):
                raise InputError(_UNKNOWN)
        except FileNotFoundError:  # of a run that has just ended
            continue
        except InputError as error:
            yield file, _reason(error, file), _damaged(error)


def _journal_problems(
    store: Store, folder: StorePath, files: list[StorePath]
) -> Iterator[tuple[StorePath, str, bool]]:
    """Bad journals, as `_problems` names them; in an object store one is a folder of entries."""
    reasons: dict[StorePath, str] = {}
    is_entry = folder.parent == store.path / "sweeps"
    for file in files:
        if file.name.endswith(".journal.lock"):
            continue
        if file.suffix != (".json" if is_entry else ".journal"):
            yield file, _UNKNOWN, False
            continue
        content = file.read_bytes()
        try:
            # What follows the last line end is being written, or was when its writer died.
            for line in [content] if is_entry else content.split(b"\n")[:-1]:
                unseal_line(file, line)
        except InputError as error:
            reasons[file] = _reason(error, file)
    # Entries are numbered: without one of them, the others say something else.
    for file in files if is_entry and reasons else reasons:
        yield file, reasons.get(file, "of a journal with a damaged entry"), True


def _strays(root: StorePath) -> Iterator[StorePath]:
    """What lies between the folders of a store and is none of its files."""
    above = (root, *(root / name for name in ("kernels", "trials", "selections", FOLDER)))
    files = (folder / name for folder in above for name in sizes(folder))
    others = (root / name for name in names(root) if name not in FOLDERS)
    unknown = (root / FOLDER / name for name in names(root / FOLDER) if name not in TABLES)
    for path in sorted({*files, *others, *unknown}):
        if not path.name.startswith(".") and path.name not in (MARKER, "lost+found"):
            yield path


def _result_problems(
    store: Store, folder: StorePath, files: list[StorePath]
) -> Iterator[tuple[StorePath, str, bool]]:
    """Bad files of a result table, as `_problems` names them."""
    del store
    spec = _table_of(folder)
    for file in files:
        try:
            if not is_result(file):
                raise InputError(_UNKNOWN)
            read_file(file, spec)
        except FileNotFoundError:  # compacted meanwhile
            continue
        except InputError as error:
            yield file, _reason(error, file), _damaged(error)


def _table_of(folder: StorePath) -> ResultTable:
    return TABLES[folder.parent.name if folder.name == COMPACTED else folder.name]


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
    for file, own in names_by_file.items():
        if tuple(own) != usual:
            reason = f"{len(own)} rows, other layer groups than most blocks ({len(usual)} rows)"
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
