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

import json
import uuid
from collections.abc import Iterator
from typing import Any

from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from raykernel.errors import BlockCorruptError
from raykernel.jsontext import json_object
from raykernel.location import RemotePath, StorePath, fetch

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
    place.parent.mkdir(parents=True, exist_ok=True)
    return _FileJournal(str(place))


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
        payload = json.dumps({"id": own, "logs": logs}).encode()
        while True:
            at = self._at(self._count)
            try:
                at.write(payload, replaces=False)
            except FileExistsError:
                # A try that failed may have written it all the same.
                if json.loads(at.read_bytes())["id"] == own:
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
        try:
            logs = json_object(content)["logs"]
            if not isinstance(logs, list) or not all(isinstance(log, dict) for log in logs):
                raise TypeError("logs that are no objects")
            return logs
        except (ValueError, TypeError, LookupError) as error:
            raise BlockCorruptError(
                f"{place}: damaged or foreign ({error}). Expected an entry of a search. Delete "
                f"{place.parent} to search anew: what its runs found is stored beside."
            ) from error


class _FileJournal(JournalFileBackend):
    """Reads once more what another process has not written to its end.

    A line that is being appended can be seen in part, or as zeros; Optuna takes that for damage.
    """

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """The log from a line on."""
        patient = Retrying(
            retry=retry_if_exception_type(ValueError),
            wait=wait_exponential(0.01, max=1),
            stop=stop_after_attempt(8),
            reraise=True,
        )
        return iter(patient(lambda: list(super(_FileJournal, self).read_logs(log_number_from))))
