"""Where a store lies: a folder, or a place in an object store.

    location("runs/store")       → pathlib.Path, absolute
    location("s3://bucket/lab")  → RemotePath, the same words over fsspec's file systems

A local path stays a plain `Path`, so that a local store keeps memory maps, renames and syncs. What
a store does with either is `RemotePath`'s methods, which are those of `Path`, and the functions
below; nothing else may be assumed of a place.

Object stores have no folders, no renames and no appending; but an object appears whole or not at
all, and writing may be refused where there is one. Nothing is cached here: what other processes
write is seen at once. Credentials come from the environment, as the provider's own tools read them
(`AWS_ACCESS_KEY_ID`, `AWS_PROFILE`, `AWS_ENDPOINT_URL`, …): an address that has any is refused, so
that none is stored or shown.

Requests, on S3: a block is written by one and read by one, a result row written by four or five and
found again by five; a question whether there is a file takes two where there is none, a listing one
per thousand names. A query makes about six, and one more for every answer of the tables that it
names which is not compacted yet, many side by side; `blocks`, `groups` and `predictions` open each
file of their kind. A run of a study makes some fifty beside those of its blocks and checkpoints,
one that is stored some thirty, one after the other.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any

from raykernel.errors import InputError, nearest

_MARK = "://"
_FOLDER = ".folder"
"""An object that stands for a folder, which object stores do not have."""
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az"}
"""Extra of the package that a protocol needs."""
_WHOLE: dict[str, dict[str, Any]] = {"s3": {"max_concurrency": 1}, "s3a": {"max_concurrency": 1}}
"""How a file is read by one request, without one for its size before."""
_USER = re.compile(r"(?P<protocol>[A-Za-z][\w+.-]*)://(?P<user>[^/\s@]+)@")
_CONTAINERS = {"abfs", "abfss", "az", "adl"}
"""Protocols of which a name and @ stand before the host: a container."""
_NO_CREDENTIALS = ("credential", "token", "authentication", "unauthorized")
"""In the names of what libraries raise without or with wrong ones."""


def _options(protocol: str) -> dict[str, Any]:
    """What a file system is made with: no cache of listings, and a library's own retries."""
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol in ("s3", "s3a") and "AWS_MAX_ATTEMPTS" not in os.environ:
        options["config_kwargs"] = {"retries": {"mode": "standard", "total_max_attempts": 4}}
    return options


@dataclass(frozen=True, order=True, slots=True)
class RemotePath:
    """A place in an object store; its methods are those of `pathlib.Path`, as far as it has any."""

    protocol: str
    key: str
    """Bucket and names below it, without a slash at its end."""

    def __str__(self) -> str:
        return f"{self.protocol}{_MARK}{self.key}"

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.protocol, f"{self.key}/{name}".rstrip("/"))

    @property
    def name(self) -> str:
        """Its last part."""
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """Its last part without the ending."""
        return PurePosixPath(self.key).stem

    @property
    def suffix(self) -> str:
        """Ending of its last part."""
        return PurePosixPath(self.key).suffix

    @property
    def parent(self) -> RemotePath:
        """What it lies in."""
        return RemotePath(self.protocol, self.key.rpartition("/")[0] or self.key)

    @property
    def parents(self) -> tuple[RemotePath, ...]:
        """What it lies in, from the nearest to the bucket."""
        keys = [str(parent) for parent in PurePosixPath(self.key).parents]
        return tuple(RemotePath(self.protocol, key) for key in keys if key not in (".", "/"))

    # ------------------------------------------------------------ what is there

    def exists(self) -> bool:
        """Whether there is an object, or one below."""
        with self._reached() as (system, at):
            return bool(system.exists(at))

    def is_dir(self) -> bool:
        """Whether there is an object below."""
        with self._reached() as (system, at):
            return bool(system.isdir(at))

    def entries(self) -> dict[str, dict[str, Any]]:
        """What lies directly below, by name: `type` (file or directory) and `size`."""
        with self._reached() as (system, at):
            try:
                found = system.ls(at, detail=True)
            except FileNotFoundError:
                return {}
        own = at.strip("/")
        named = {one["name"].strip("/"): one for one in found}
        return {key.rpartition("/")[2]: one for key, one in named.items() if key != own}

    def iterdir(self) -> Iterator[RemotePath]:
        """What lies directly below."""
        return (self / name for name in sorted(self.entries()))

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Objects below whose path is spelt like a pattern: one listing of everything below."""
        with self._reached() as (system, at):
            found = [key.strip("/") for key in system.find(at)]
        depth, start = len(pattern.split("/")), len(at.strip("/")) + 1
        for below in sorted(key[start:] for key in found):
            parts = below.split("/")
            if len(parts) == depth and all(map(fnmatch.fnmatchcase, parts, pattern.split("/"))):
                yield self / below

    def beginning(self, start: str) -> list[str]:
        """Names of the objects directly below that begin so: one listing of these alone."""
        with self._reached() as (system, at):
            try:
                found = system.find(at, prefix=start)
            except FileNotFoundError:
                return []
        first = len(at.strip("/")) + 1
        names = [key.strip("/")[first:] for key in found]
        return [name for name in names if name.startswith(start) and "/" not in name]

    # ------------------------------------------------------------ content

    def read_bytes(self) -> bytes:
        """The whole content."""
        with self._reached() as (system, at):
            return bytes(system.cat_file(at, **_WHOLE.get(self.protocol, {})))

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole content as text."""
        return self.read_bytes().decode(encoding)

    @contextlib.contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The content to be read in parts."""
        with self._reached() as (system, at):
            file = system.open(at, "rb", block_size=1 << 16)
        with file:
            yield file

    def download(self, copy: Path) -> None:
        """Put the content into a local file."""
        with self._reached() as (system, at):
            system.get_file(at, str(copy))

    def write(self, payload: bytes | memoryview, *, replaces: bool = True) -> None:
        """Write an object at once.

        Args:
            payload: the whole content.
            replaces: also where there is one.

        Raises:
            FileExistsError: if there is one that is not to be replaced.
        """
        with self._reached() as (system, at):
            system.pipe_file(at, bytes(payload), mode="overwrite" if replaces else "create")

    def upload(self, copy: Path) -> None:
        """Write the content of a local file as one object."""
        with self._reached() as (system, at):
            system.put_file(str(copy), at)

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object."""
        with self._reached() as (system, at):
            try:
                system.rm_file(at)
            except FileNotFoundError:
                if not missing_ok:
                    raise

    # ------------------------------------------------------------ inside

    @contextlib.contextmanager
    def _reached(self) -> Iterator[tuple[Any, str]]:
        """The file system and the place in it; what its library raises is put in our words.

        Yields:
            Both.

        Raises:
            InputError: if it cannot be reached or used.
            FileNotFoundError: if there is no such object.
            FileExistsError: if there is one already.
            MemoryError: as they are, like a full disk of this machine.
            OSError: likewise.
        """
        import fsspec  # takes a while, and a local store needs none

        try:
            yield fsspec.core.url_to_fs(str(self), **_options(self.protocol))
        except (FileNotFoundError, FileExistsError, InputError, MemoryError):
            raise
        except ImportError as error:
            raise InputError(_missing_package(self, error)) from error
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # of this machine
                raise
            raise InputError(_explanation(self, error)) from error


StorePath = Path | RemotePath
"""A place of a store, or in one."""


def is_remote(text: str) -> bool:
    """Whether an address is one of an object store."""
    return _MARK in text and not text.startswith(("file://", "local://"))


def has_credentials(text: str) -> bool:
    """Whether a text has an address in it with a user or a password before the host.

    Azure's `CONTAINER@ACCOUNT` is none: there no secret stands.

    Args:
        text: any.

    Returns:
        Whether it should be neither stored nor shown.
    """
    return any(
        ":" in found["user"] or found["protocol"].lower() not in _CONTAINERS
        for found in _USER.finditer(text)
    )


def location(address: str | Path | RemotePath) -> StorePath:
    """The place that an address names.

    Args:
        address: a folder, absolute, relative or in the home folder, or PROTOCOL://BUCKET/NAME.

    Returns:
        The place; nobody has looked yet whether it is there.

    Raises:
        InputError: if it is no address, or has credentials in it.
    """
    if isinstance(address, RemotePath):
        return address
    text = str(address)
    if not is_remote(text):
        local = text.partition(_MARK)[2] or text
        return Path(local).expanduser().absolute()
    protocol, _, key = text.partition(_MARK)
    if "?" in key or "#" in key or "::" in key or has_credentials(text):
        # Without the rest, which may be a secret.
        protocol = protocol.rpartition(":")[2]
        raise InputError(
            f"store.path: found an address with credentials or settings in it, expected "
            f"{protocol}://BUCKET/NAME alone. Credentials come from the environment."
        )
    _check_protocol(protocol)
    key = "/".join(part for part in key.split("/") if part)
    if not key:
        raise InputError(f"store.path: found {text}, expected {protocol}://BUCKET/NAME.")
    return RemotePath(protocol, key)


@lru_cache(maxsize=64)
def _check_protocol(protocol: str) -> None:
    from fsspec.registry import get_filesystem_class, known_implementations

    try:
        get_filesystem_class(protocol)
    except ImportError as error:
        raise InputError(_missing_package(RemotePath(protocol, "…"), error)) from error
    except ValueError as error:
        raise InputError(
            f"store.path: found the protocol {protocol!r}, expected a folder, s3://, gs://, az:// "
            f"or another of fsspec's; {nearest(protocol, known_implementations)}"
        ) from error


def require_container(path: RemotePath) -> None:
    """Refuse a place whose bucket is not there.

    Args:
        path: a place in it.

    Raises:
        InputError: if there is no such bucket.
    """
    container = (path, *path.parents)[-1]
    if path.protocol != "memory" and not container.exists():
        raise InputError(
            f"{path}: found no bucket {container.name!r}, expected one that exists. Create it with "
            "your provider's tools, or choose another store.path."
        )


# ---------------------------------------------------------------- either kind


def sizes(folder: StorePath) -> dict[str, int]:
    """Files directly in a folder, with their bytes.

    Args:
        folder: one that need not exist.

    Returns:
        Bytes by name.
    """
    if isinstance(folder, RemotePath):
        found = folder.entries().items()
        return {name: int(one["size"]) for name, one in found if one["type"] == "file"}
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    return {}


def names(folder: StorePath, start: str = "") -> list[str]:
    """Names of what lies directly in a folder.

    Args:
        folder: one that need not exist.
        start: what they begin with; in an object store, then of files alone.

    Returns:
        In no order.
    """
    if isinstance(folder, RemotePath):
        return folder.beginning(start) if start else list(folder.entries())
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.name.startswith(start)]
    except FileNotFoundError:
        return []


def folders(folder: StorePath) -> list[StorePath]:
    """Folders directly in a folder, which need not exist, sorted by name."""
    if isinstance(folder, RemotePath):
        found = folder.entries().items()
        return [folder / name for name, one in sorted(found) if one["type"] == "directory"]
    return sorted(path for path in folder.glob("*") if path.is_dir())


def keep_folder(folder: RemotePath) -> None:
    """Have a folder be there although it has no file: until all below its name is deleted.

    Args:
        folder: which.
    """
    (folder / _FOLDER).write(b"")


def fetch(paths: Iterable[StorePath]) -> dict[StorePath, bytes]:
    """The content of remote files, read side by side.

    Args:
        paths: which; those of local ones, which take no time, are left out.

    Returns:
        Content by path; none of a file that is absent.

    Raises:
        InputError: if one cannot be read for another reason.
    """
    wanted = [path for path in paths if isinstance(path, RemotePath)]
    if not wanted:
        return {}
    with wanted[0]._reached() as (system, _):
        keys = [system._strip_protocol(str(path)) for path in wanted]
        options = _WHOLE.get(wanted[0].protocol, {})
        found = system.cat_ranges(keys, None, None, **options)
    contents: dict[StorePath, bytes] = {}
    for path, content in zip(wanted, found, strict=True):
        if isinstance(content, bytes):
            contents[path] = content
        elif not isinstance(content, FileNotFoundError):
            raise InputError(_explanation(path, content)) from content
    return contents


@contextlib.contextmanager
def local_copy(path: StorePath) -> Iterator[Path]:
    """A file on this machine with a file's content, to be mapped into memory.

    A map outlives the copy, whose pages can leave memory as those of a local store's files do.

    Args:
        path: the file.

    Yields:
        Itself, if it is local.
    """
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="raykernel-") as folder:
        copy = Path(folder) / path.name
        path.download(copy)
        yield copy


# ---------------------------------------------------------------- messages


def _missing_package(path: RemotePath, error: ImportError) -> str:
    extra = _EXTRAS.get(path.protocol)
    cure = f"pip install 'raykernel[{extra}]'" if extra else str(error)
    return (
        f"store.path: found an address of {path.protocol}://, whose package is not installed. "
        f"Expected it: {cure}."
    )


def _explanation(path: RemotePath, error: BaseException) -> str:
    """What went wrong; of what a library says only its kind, for the rest may name secrets."""
    kinds = [type(one).__name__ for one in (error, error.__cause__) if one is not None]
    text = " ".join(kinds).lower()
    if isinstance(error, PermissionError) or any(word in text for word in _NO_CREDENTIALS):
        return (
            f"{path}: cannot be used ({' from '.join(kinds)}). Expected credentials in the "
            "environment that may list, read and write there (for S3 AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or the machine's role). Set them, or choose "
            "another store.path."
        )
    return (
        f"{path}: cannot be reached ({' from '.join(kinds)}). Expected an object store that "
        "answers. Look at the network and at the address of the service (for S3 "
        "AWS_ENDPOINT_URL, AWS_REGION), then run the same command again: what is stored is not "
        "computed twice."
    )
