"""The store: one folder, here or in an object store, that holds kernels and results.

    <store.path>/
      raykernel.json            marker: {"format": 1}
      kernels/<fingerprint>/    see kernels.py
      trials/<trial>/           see trials.py
      selections/<choice>/      adapter_config.json of a choice of layers
      results/<table>/          rows of all of these, see results.py

A folder of an object store is there as soon as something lies in it; where nothing else may, an
object `.folder` stands for it.

Nothing is created before something is written: looking at a store that is not there finds an
empty one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from raykernel.config import Json, differences, fingerprint, plain
from raykernel.errors import BlockCorruptError, InputError, nearest
from raykernel.jsontext import json_object
from raykernel.location import (
    RemotePath,
    StorePath,
    location,
    names,
    require_container,
)
from raykernel.store import arrowfile, manifest, results
from raykernel.store.commit import commit, make_folder
from raykernel.store.grid import Grid
from raykernel.store.kernels import KernelHandle
from raykernel.store.manifest import Manifest
from raykernel.store.trials import TrialFiles

__all__ = ["KernelHandle", "Store", "open_store"]

MARKER = "raykernel.json"

_known: set[StorePath] = set()
"""Remote stores that this process has looked at: every look is a request."""
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")


class Store:
    """A folder of kernels and results. The folder is created by the first write.

    Attributes:
        path: the folder, absolute, or its place in an object store.
    """

    def __init__(self, path: str | StorePath) -> None:
        self.path = location(path)
        self._checked: set[tuple[StorePath, int, int]] = set()
        require_store(self.path)

    # ------------------------------------------------------------ kernels

    def begin(
        self,
        identity: dict[str, Json],
        *,
        grid: Grid,
        num_outputs: int,
        examples: pa.Table,
        dtype: str = "float32",
    ) -> KernelHandle:
        """Open the kernel of this identity, creating it if it is new.

        Idempotent; two processes may begin the same kernel at once.

        Args:
            identity: what decides the numbers.
            grid: how the kernel is cut.
            num_outputs: outputs of the model.
            examples: one row per example, train first; at least `id`, `split` and `label`.
            dtype: float32 or float64, of the stored blocks.

        Returns:
            The kernel.

        Raises:
            ValueError: if there is not one row per example.
        """
        if examples.num_rows != grid.num_rows:
            raise ValueError(f"found {examples.num_rows} examples, expected {grid.num_rows}")
        wanted = Manifest(identity, grid, num_outputs, dtype)
        self.create()
        folder = self._kernels / wanted.fingerprint
        make_folder(folder)
        manifest.write(folder, wanted)
        if not (folder / "examples.arrow").exists():
            header: dict[str, Json] = {"fingerprint": wanted.fingerprint}
            arrowfile.write(folder / "examples.arrow", examples, header)
        return KernelHandle(folder, manifest.read(folder), self._checked)

    def open(self, fingerprint: str | None = None) -> KernelHandle:
        """Open a stored kernel.

        Args:
            fingerprint: its name or the beginning of it; None: the only one.

        Returns:
            The kernel.
        """
        folder = self._kernels / self.resolve(fingerprint)
        return KernelHandle(folder, manifest.read(folder), self._checked)

    def fingerprints(self) -> list[str]:
        """Names of the stored kernels."""
        return sorted(path.parent.name for path in self._kernels.glob(f"*/{manifest.NAME}"))

    def resolve(self, fingerprint: str | None = None) -> str:
        """The full name of a stored kernel.

        Args:
            fingerprint: its name or the beginning of it; None: the only one.

        Returns:
            The name.

        Raises:
            InputError: if no kernel or several have this name.
        """
        if fingerprint and self._is_begun(fingerprint):
            return fingerprint
        stored = self.fingerprints()
        found = [name for name in stored if name.startswith(fingerprint or "")]
        if len(found) == 1 or fingerprint in found:
            return found[0] if len(found) == 1 else str(fingerprint)
        if not stored:
            raise InputError(
                f"{self.path}: found no kernel, expected one. Compute one with `raykernel kernel`."
            )
        if not found:
            raise InputError(
                f"{self.path}: found no kernel {fingerprint!r}; {nearest(str(fingerprint), stored)}"
            )
        lines = "\n".join(f"  {name}  {self.describe(name)}" for name in found)
        raise InputError(
            f"{self.path}: found {len(found)} kernels, expected the fingerprint of one:\n{lines}"
        )

    def describe(self, fingerprint: str) -> str:
        """Task, model, k and seed of a stored kernel, in one line."""
        try:
            identity = manifest.read(self._kernels / fingerprint).identity
        except BlockCorruptError:
            return "(unreadable; see `raykernel verify`)"
        task, model = manifest.at(identity, "task", "name"), manifest.at(identity, "model", "name")
        k, seed = manifest.at(identity, "task", "k"), manifest.at(identity, "task", "seed")
        return f"task={task} model={model} k={k} seed={seed}"

    def nearest_kernel(
        self, identity: dict[str, Json]
    ) -> tuple[str, list[tuple[str, Json, Json]]] | None:
        """The stored kernel that differs least, to say why its blocks are not reused.

        Args:
            identity: the identity asked for.

        Returns:
            Its fingerprint and (path, stored value, wanted value) of what differs; None if there
            is no kernel.
        """
        wanted = plain(identity)
        candidates = []
        for name in self.fingerprints():
            try:
                stored = manifest.read(self._kernels / name).identity
            except InputError:  # only a hint: `verify` names what is damaged
                continue
            candidates.append((name, differences(plain(stored), wanted)))
        return min(candidates, key=lambda found: len(found[1]), default=None)

    def has(self, identity: dict[str, Json]) -> bool:
        """Whether the kernel of this identity has been begun."""
        return self._is_begun(fingerprint(identity))

    def kernel(
        self,
        fingerprint: str | None = None,
        *,
        kind: str = "sgd",
        groups: Sequence[str] | None = None,
        layers_to_transform: Sequence[int] | None = None,
        target_modules: Sequence[str] | None = None,
        rows: range | None = None,
        cols: range | None = None,
    ) -> Float[np.ndarray, "n c m c"]:
        """A stored kernel as one array, see `KernelHandle.kernel`.

        Args:
            fingerprint: its name or the beginning of it; None: the only one.
            kind: kind of kernel.
            groups: names or regular expressions; None: all.
            layers_to_transform: transformer layers, as in PEFT.
            target_modules: ends of module paths, as in PEFT.
            rows: consecutive row examples; None: all.
            cols: consecutive column (train) examples; None: all.

        Returns:
            The kernel in float64.
        """
        return self.open(fingerprint).kernel(
            groups,
            kind=kind,
            rows=rows,
            cols=cols,
            layers_to_transform=layers_to_transform,
            target_modules=target_modules,
        )

    # ------------------------------------------------------------ trials

    def begin_trial(self, trial: str) -> TrialFiles:
        """The place of a fine-tuning run, made if it is new."""
        self.create()
        files = self.trial(trial)
        make_folder(files.path)
        return files

    def trial(self, trial: str) -> TrialFiles:
        """The place of a fine-tuning run, whether or not it exists."""
        return TrialFiles(self.path / "trials" / trial)

    def trials(self) -> list[str]:
        """Names of the fine-tuning runs that ended."""
        return sorted(self.results("trials")["trial"].to_pylist())

    # ------------------------------------------------------------ results

    def write_result(self, table: str, row: dict[str, object]) -> StorePath:
        """Commit one result row, see `results.write_result`."""
        self.create()
        return results.write_result(self.path, table, row)

    def write_results(self, table: str, rows: Sequence[dict[str, object]]) -> StorePath:
        """Commit rows of one key, see `results.write_results`."""
        self.create()
        return results.write_results(self.path, table, rows)

    def has_result(self, table: str, row: dict[str, object]) -> bool:
        """Whether a row with the same key is stored."""
        return bool(results.read_key(self.path, table, row))

    def rows(self, table: str, **key: object) -> list[dict[str, Any]]:
        """Rows of one key of a result table, see `results.read_key`."""
        return results.read_key(self.path, table, key)

    def results(self, table: str) -> pa.Table:
        """All rows of a result table, see `results.read_results`."""
        return results.read_results(self.path, table)

    # ------------------------------------------------------------ inside

    def _is_begun(self, name: str) -> bool:
        """Whether there is a kernel of this whole name."""
        return (
            bool(_FINGERPRINT.fullmatch(name)) and (self._kernels / name / manifest.NAME).exists()
        )

    @property
    def _kernels(self) -> StorePath:
        return self.path / "kernels"

    def create(self) -> None:
        """Make the folder a store; one that is there stays as it is."""
        make_folder(self.path)
        if not require_store(self.path):
            commit(self.path / MARKER, json.dumps({"format": arrowfile.FORMAT}).encode())


def open_store(path: str | StorePath) -> Store:
    """Open a store that exists.

    Args:
        path: its folder.

    Returns:
        The store.

    Raises:
        InputError: if there is no store.
    """
    store = Store(path)
    if not require_store(store.path):
        raise InputError(
            f"{store.path}: found no store, expected a folder with {MARKER}. `raykernel kernel` "
            f"creates one; `--store PATH` or store.path=PATH names another."
        )
    return store


def require_store(path: StorePath) -> bool:
    """Refuse a folder that holds something else than a store of a format we know.

    Args:
        path: a folder, which need not exist.

    Returns:
        Whether it is a store already.

    Raises:
        InputError: if it is no store, or cannot be reached.
        BlockCorruptError: if its marker is damaged.
    """
    if path in _known:
        return True
    marker = path / MARKER
    try:
        content = marker.read_bytes()
    except FileNotFoundError:
        _require_empty(path)
        return False
    except NotADirectoryError as error:
        if not path.exists():  # something above it is a file: no write will succeed
            return False
        raise InputError(
            f"{path}: found a file, expected a folder. Choose another store.path."
        ) from error
    try:
        found = int(json_object(content)["format"])
    except (ValueError, TypeError, LookupError, OverflowError) as error:
        raise BlockCorruptError(
            f'{marker}: damaged, expected {{"format": {arrowfile.FORMAT}}}. Write that into it.'
        ) from error
    if found > arrowfile.FORMAT:
        raise InputError(
            f"{path}: found a store of format {found}, expected at most {arrowfile.FORMAT}: a "
            f"newer raykernel wrote it. Update raykernel, or choose another store.path."
        )
    if isinstance(path, RemotePath):
        _known.add(path)
    return True


def _require_empty(path: StorePath) -> None:
    # A folder with nothing but hidden files, or a fresh volume's lost+found, is an empty one.
    others = [name for name in names(path) if not name.startswith(".") and name != "lost+found"]
    # Another process may have made it a store, and written to it, since we looked.
    if others and not (path / MARKER).exists():
        raise InputError(
            f"{path}: found a folder with other files ({', '.join(sorted(others)[:3])}) and no "
            f"{MARKER}, expected a store or an empty folder. Choose another store.path."
        )
    if isinstance(path, RemotePath):
        require_container(path)
