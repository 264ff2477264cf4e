"""identity.json: what decides a stored kernel's numbers, and the shapes that follow from it."""

from __future__ import annotations

from dataclasses import asdict, astuple, dataclass

from raykernel.config import Json, differences, fingerprint, plain
from raykernel.errors import BlockCorruptError, InputError, StoreMismatchError
from raykernel.location import StorePath
from raykernel.store import arrowfile
from raykernel.store.commit import commit
from raykernel.store.grid import Grid
from raykernel.store.sealed import seal, unseal

NAME = "identity.json"
_DTYPES = ("float32", "float64")


@dataclass(frozen=True, slots=True)
class Manifest:
    """One kernel's identity and shapes; written before any of its blocks."""

    identity: dict[str, Json]
    """What decides the numbers; its hash names the folder."""
    grid: Grid
    num_outputs: int
    dtype: str
    """Of the stored blocks: float32 or float64."""

    def __post_init__(self) -> None:
        sizes = (*astuple(self.grid), self.num_outputs)
        if any(type(size) is not int for size in sizes):  # 1.0 and true are as large as 1
            raise TypeError(f"found sizes {sizes}, expected whole numbers")
        if self.num_outputs < 1 or self.dtype not in _DTYPES:
            raise ValueError(f"found {self.num_outputs} outputs of {self.dtype!r}: {_DTYPES}")

    @property
    def fingerprint(self) -> str:
        """Hash of the identity: the name of the kernel's folder."""
        return fingerprint(self.identity)

    def to_json(self) -> dict[str, Json]:
        """The file's content."""
        identity = plain(self.identity)  # infinities as text, as they will be read back
        return {
            "format": arrowfile.FORMAT,
            "identity": identity,
            "grid": asdict(self.grid),
            "num_outputs": self.num_outputs,
            "dtype": self.dtype,
        }


def write(folder: StorePath, manifest: Manifest) -> None:
    """Commit the manifest unless the folder has one, and compare it if so.

    Args:
        folder: the kernel's folder.
        manifest: what is about to be computed.

    Raises:
        StoreMismatchError: if the folder holds another kernel.
    """
    wanted = manifest.to_json()
    path = folder / NAME
    if not path.exists():  # two processes at once write the same bytes: harmless
        commit(path, seal(wanted, indent=1))
    found = _read(path).to_json()
    rows = differences(found, wanted)
    if rows:
        raise StoreMismatchError(
            f"{folder}: holds another kernel than the one asked for.\n{differences_text(rows)}\n"
            f"Choose another store.path, or remove this folder to compute the kernel anew."
        )


def read(folder: StorePath) -> Manifest:
    """The manifest of a kernel's folder.

    Args:
        folder: the kernel's folder.

    Returns:
        The manifest.

    Raises:
        BlockCorruptError: if it is damaged, or another kernel's.
    """
    path = folder / NAME
    found = _read(path)
    if found.fingerprint != folder.name:
        reason = f"identity of kernel {found.fingerprint}"
        raise BlockCorruptError(arrowfile.damage(path, reason))
    return found


def _read(path: StorePath) -> Manifest:
    """A manifest, whatever its folder is called."""
    tree = unseal(path, path.read_bytes())
    try:
        arrowfile.require_format(path, tree)
        identity = dict(tree["identity"])
        return Manifest(identity, Grid(**tree["grid"]), tree["num_outputs"], tree["dtype"])
    except InputError:
        raise
    except (ValueError, TypeError, LookupError, OverflowError) as error:
        raise BlockCorruptError(arrowfile.damage(path, f"unreadable manifest: {error}")) from error


def differences_text(rows: list[tuple[str, Json, Json]]) -> str:
    """Differing leaves, one a line.

    Args:
        rows: (dotted path, found, expected), of `config.differences`.

    Returns:
        The lines.
    """
    return "\n".join(
        f"  {path}: found {found!r}, expected {wanted!r}" for path, found, wanted in rows
    )


def at(identity: dict[str, Json], *keys: str) -> Json:
    """One leaf of an identity, None where there is no such leaf.

    Args:
        identity: the identity.
        keys: path of the leaf.

    Returns:
        Its value.
    """
    value: Json = identity
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
