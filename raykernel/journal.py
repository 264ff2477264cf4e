"""The journal of a search where it lies: a file, or objects one after the other.

    sweeps/<study>.journal             a file, which Optuna locks and appends to
    sweeps/<study>.journal/<nnnnnnnn>  in an object store: entries in the order of their numbers

Nothing can be appended to an object. Who has something to write creates the object after the last
one it knows; of several at once the store lets one through, and the others read what that wrote
and try the next number. So that all processes on all machines see the same order, without a lock,
and a driver that dies takes nothing with it. That needs a store that can refuse to overwrite
(`If-None-Match` of S3), as `raykernel doctor` tells.

Reading costs a request if nothing is new, and else one per object, many side by side; a choice of a
search writes about six objects, and one for each of its hyperparameters.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.storages.journal._file import get_lock_file
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from raykernel.errors import BlockCorruptError
from raykernel.location import RemotePath, StorePath, fetch
from raykernel.store.arrowfile import damage
from raykernel.store.commit import explain, make_folder
from raykernel.store.sealed import seal, unseal, unseal_line

_TAIL_BYTES = 1 << 12
"""Read at a time from the end of a file."""
_AT_ONCE = 128
"""Objects fetched side by side, at the most."""


def open_journal(place: StorePath) -> BaseJournalBackend:
    """The journal at a place, made if it is new.

    Args:
        place: in a store.

    Returns:
        What Optuna's storage is made of.
    """
    if isinstance(place, RemotePath):
        return ObjectJournal(place)
    make_folder(place.parent)
    return _FileJournal(place)


class ObjectJournal(BaseJournalBackend):
    """Entries as numbered objects.

    Args:
        place: what they lie in.
    """

    def __init__(self, place: RemotePath) -> None:
        self._place = place
        self._count = 0
        self._logs: list[dict[str, Any]] = []

    def read_logs(self, log_number_from: int) -> list[dict[str, Any]]:
        """The log from a line on."""
        self._catch_up()
        return self._logs[log_number_from:]

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Put lines at the end."""
        own = uuid.uuid4().hex
        payload = seal({"id": own, "logs": list[Any](logs)})
        while True:
            at = self._at(self._count)
            try:
                at.write(payload, replaces=False)
            except FileExistsError:
                # A try that failed may have written it all the same.
                if unseal(at, at.read_bytes())["id"] == own:
                    return
                self._catch_up()
            else:
                return

    def _catch_up(self) -> None:
        """Read the objects that are new, more at once the more there are."""
        wanted = 1
        while True:
            places = [self._at(self._count + number) for number in range(wanted)]
            found = fetch(places)
            for place in places:
                if place not in found:
                    return
                self._logs += self._entry(place, found[place])
                self._count += 1
            wanted = min(2 * wanted, _AT_ONCE)

    def _at(self, number: int) -> RemotePath:
        return self._place / f"{number:08d}.json"

    @staticmethod
    def _entry(place: RemotePath, content: bytes) -> list[dict[str, Any]]:
        logs = unseal(place, content).get("logs")
        if not isinstance(logs, list) or not all(isinstance(log, dict) for log in logs):
            raise BlockCorruptError(damage(place, "logs that are no objects"))
        return logs


class _FileJournal(JournalFileBackend):
    """Optuna's file with a checksum in every line, which its own programs take no notice of.

    Reads once more what another process has not written to its end: a line that is being appended
    can be seen in part, or as zeros, which Optuna takes for damage.
    """

    def __init__(self, place: Path) -> None:
        self._place = place
        with _explaining(place):
            super().__init__(str(place))

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Put lines at the end: all of them, or none if there is no space."""
        with _explaining(self._place), get_lock_file(self._lock), self._place.open("r+b") as file:
            # Nobody has read a line without its end, which a writer that died has left.
            end = _end_of_lines(file)
            file.truncate(end)
            file.seek(end)
            try:
                file.write(b"".join(seal(log) + b"\n" for log in logs))
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """The log from a line on."""
        patient = Retrying(
            retry=retry_if_exception_type(BlockCorruptError),
            wait=wait_exponential(0.01, max=1),
            stop=stop_after_attempt(8),
            reraise=True,
        )
        return iter(patient(self._lines, log_number_from))

    def _lines(self, first: int) -> list[dict[str, Any]]:
        """The lines from a number on that have an end; Optuna would also pass over a bad last."""
        known = max(number for number in self._log_number_offset if number <= first)
        found: list[dict[str, Any]] = []
        with self._place.open("rb") as file:
            file.seek(self._log_number_offset[known])
            for number, line in enumerate(file, start=known):
                if not line.endswith(b"\n"):
                    break
                if number >= first:
                    found.append(unseal_line(self._place, line))
                self._log_number_offset[number + 1] = self._log_number_offset[number] + len(line)
        return found


def _end_of_lines(file: IO[bytes]) -> int:
    """Where the last line ends that has an end."""
    place = file.seek(0, os.SEEK_END)
    tail = b""
    while place and b"\n" not in tail:
        start = max(0, place - _TAIL_BYTES)
        file.seek(start)
        tail, place = file.read(place - start), start
    return place + tail.rfind(b"\n") + 1


@contextlib.contextmanager
def _explaining(place: Path) -> Iterator[None]:
    """Say what a failed write means to the user."""
    try:
        yield
    except OSError as error:
        explain(error, place, 0)
