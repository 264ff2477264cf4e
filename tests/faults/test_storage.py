"""Every kind of file that is written, with a flipped byte: named, removed, made again, exact."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from raykernel.cli import main
from raykernel.store.blocks import Store
from raykernel.store.sealed import SEAL
from raykernel.store.verify import verify
from tests import tiny
from tests.faults.contents import contents, files

DATA = {"task__test_limit": "6"}
PROBE = tiny.overrides("tiny", **DATA, prompt__template=None, prompt__words=None)
KERNEL = ["kernel", *PROBE, "prompt=none"]
"""The kernel of a linear probe."""
TWIN = [
    *("finetune", *PROBE, "prompt=none", "parameters=lora", "training=adam", "training.steps=4"),
    *("training.eval_every=2", "training.batch_size=2", "training.twin=true"),
    "training.dropout=false",
]
"""A LoRA beside its linear twin, from a linear probe."""
SELECT = [
    *("select", *tiny.overrides("tiny", **DATA), "parameters=lora", "select.max_size=1"),
    "select.halves=0",
]
COMMANDS = (KERNEL, TWIN, SELECT)

KINDS = (
    "kernels/*/examples.arrow",
    "kernels/*/head.arrow",
    "kernels/*/block-0000-0000.arrow",
    "kernels/*/logits-0000.arrow",
    "kernels/*/prediction-*.arrow",
    "kernels/*/features.json",
    "kernels/*/lora.json",
    "kernels/*/baselines.arrow",
    "selections/*/adapter_config.json",
    "trials/*/head.safetensors",
    "trials/*/best.safetensors",
    "trials/*/last.safetensors",
    "trials/*/twin.safetensors",
    "trials/*/adapter/adapter_model.safetensors",
    "trials/*/adapter/adapter_config.json",
    *(f"results/{name}/*.arrow" for name in ("kernels", "selections", "trials", "curves")),
    *(f"results/{name}/*.arrow" for name in ("twins", "bounds")),
)
"""Every kind of file but the two that the others cannot be read without, and measured rates."""
SINGLE = ("raykernel.json", "kernels/*/identity.json", "kernels/*/rates.json")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of an undisturbed store, in which commands run."""
    folder = tmp_path_factory.mktemp("storage")
    tiny.save_masked_lm(folder / "tiny", num_hidden_layers=1)
    tiny.write_reviews(folder / "reviews.tsv", num=30)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in COMMANDS:
            assert main(command) == 0
        yield folder


def flip(path: Path) -> None:
    """Flip a bit of a number in an Arrow file, where padding says nothing; else in the middle."""
    content = bytearray(path.read_bytes())
    place = len(content) // 2
    if path.suffix == ".arrow":
        column = pa.ipc.open_file(content).read_all().columns[-1].combine_chunks()
        value = next(buffer for buffer in reversed(column.buffers()) if buffer is not None)
        place = content.index(value.to_pybytes()[:16])
    content[place] ^= 1
    path.write_bytes(content)


def test_every_kind_of_file_is_known_here(here: Path) -> None:
    """The tables above have all that the commands write."""
    store = here / "store"
    assert all(files(store, kind) for kind in (*KINDS, *SINGLE))
    same = ("block-*", "logits-*", "prediction-*", f"*.{SEAL}")
    others = {path for path in store.rglob("*") if path.is_file()} - {
        *files(store, *KINDS, *SINGLE)
    }
    assert not {path for path in others if not any(map(path.match, same))}


def test_damage_to_every_kind_of_file_is_named_removed_and_made_again(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a repair the same commands make the undisturbed store, to the bit."""
    whole, store = here / "store", here / "flipped"
    shutil.copytree(whole, store)
    damaged = files(store, *KINDS)
    for path in damaged:
        flip(path)
    assert main(["verify", "--store", str(store)]) == 1
    out = capsys.readouterr().out
    assert all(f"{path}: " in out for path in damaged)
    assert "--remove" in out
    assert main(["verify", "--remove", "--store", str(store)]) == 0
    assert capsys.readouterr().out.count("(removed)") >= len(damaged)
    assert not any(path.exists() for path in damaged)
    for command in COMMANDS:
        assert main([*command, "store.path=flipped"]) == 0
    assert verify(store).bad == ()
    there, again = contents(whole), contents(store)
    assert [name for name in there if there[name] != again[name]] == []
    assert there.keys() == again.keys()


@pytest.mark.parametrize("kind", SINGLE)
def test_damage_to_what_others_need_loses_none_of_them(
    here: Path, tmp_path: Path, kind: str
) -> None:
    """The marker, a kernel's identity and its rates: nothing else is called bad, or removed."""
    store = tmp_path / "store"
    shutil.copytree(here / "store", store)
    path = files(store, kind)[0]
    others = {one for one in store.rglob("*") if one.is_file()} - {path}
    flip(path)
    assert [file.path for file in verify(store).bad] == [path]
    assert verify(store, remove=True).ok
    assert others <= {one for one in store.rglob("*") if one.is_file()}
    assert Store(store).results("kernels").num_rows == 1
