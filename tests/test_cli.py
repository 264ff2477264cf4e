"""Whole commands as a user runs them: exit codes, messages, nothing half-written."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from raykernel.cli import main
from raykernel.doctor import difference
from tests import tiny


def arguments(folder: Path, **changes: str | None) -> list[str]:
    """Overrides of a small kernel of the user's own data; a value of None drops the key."""
    own = {"task.test_limit": "6", "kernel.block_size": "4"}
    return tiny.overrides(folder, **(own | changes))


def fails(capsys, here: Path, command: list[str], *helps: str, code: int = 2) -> str:
    """Run a command that must fail with a message, without a traceback and without a store."""
    assert main(command) == code
    captured = capsys.readouterr()
    assert captured.err.startswith("Error: ") or "\nError: " in captured.err
    assert "Traceback" not in captured.err + captured.out
    for text in helps:
        assert text in captured.err
    assert not list(here.glob("store/kernels/*/block-*"))
    return captured.err


def test_kernel_prints_scores_stores_them_and_computes_nothing_twice(model, here, capsys):
    assert main(["kernel", *arguments(model)]) == 0
    first = capsys.readouterr()
    assert "zero-shot" in first.out
    assert "kernel regression (sgd)" in first.out
    assert main(["kernel", *arguments(model)]) == 0
    second = capsys.readouterr()
    assert "computing 0 blocks" in second.err
    assert main(["query", "select * from kernels", "--store", "store", "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["k"], row["num_train"], row["num_dev"], row["num_test"]) == (3, 6, 6, 6)
    assert f"{row['kernel_regression']:.3f}" in first.out
    assert main(["verify", "--store", "store"]) == 0


def test_plan_computes_nothing(model, here, capsys):
    assert main(["plan", *arguments(model)]) == 0
    assert "blocks" in capsys.readouterr().out
    assert not (here / "store").exists()


def test_doctor_examines_the_problem(model, here, capsys):
    assert main(["doctor", *arguments(model)]) == 0
    out = capsys.readouterr().out
    assert "terrible" in out
    assert "padding" in out


def test_versions_of_a_node_differ_by_ray_python_or_a_package():
    """The node's name is no version; what the node lacks differs."""
    here = {"ray": "2.60.0", "python": "3.11.7", "torch": "2.13.0", "node": "client"}
    assert difference(here, here | {"node": "n1"}) is None
    there = {"ray": "2.59.1", "python": "3.11.7", "node": "n2"}
    said = "node n2 has ray 2.59.1 (here 2.60.0), torch None (here 2.13.0)"
    assert difference(here, there) == said


def test_a_projected_kernel_says_its_error_and_the_bound(model, here, capsys):
    changes = {"kernel.projection.method": "rademacher", "kernel.projection.dim": "64"}
    for command in ("doctor", "plan"):
        assert main([command, *arguments(model, **changes)]) == 0
    assert "rademacher to 64" in capsys.readouterr().out
    for _ in range(2):  # computed, then read from the store
        assert main(["kernel", *arguments(model, **changes)]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "rademacher projection to 64: relative error" in out
        assert "on 4 examples, against the exact kernel" in out
        # 18 examples of 2 outputs: the theorem needs more than 64 numbers to say anything.
        assert "Theorem D.2 (Malladi et al. 2023), for 36 gradients" in out
        assert "it says nothing" in out
    assert main(["verify", "--store", "store"]) == 0
    assert main(["kernel", *arguments(model, **changes | {"kernel.projection.dim": "65"})]) == 0
    assert "kernel.projection.dim 64 → 65" in " ".join(capsys.readouterr().err.split())


def test_a_lora_says_its_distance_from_the_full_weights_and_the_bound(model, here, capsys):
    for _ in range(2):  # computed, then read from the store
        assert main(["kernel", *arguments(model, parameters="lora")]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "LoRA of rank 8: relative error" in out
        assert "against the kernel of the 4 full weights" in out
        # 18 examples of 2 outputs, and query and value of two layers.
        assert "Theorem D.5 (Malladi et al. 2023), for 36 gradients in each of 4 modules" in out
        assert "it says nothing" in out
        assert "Remark D.6, for the sum of the 4 modules: nothing either." in out
    (file,) = here.glob("store/kernels/*/lora.json")
    sql = "select lora_error, lora_bound from kernels"
    assert main(["query", sql, "--store", "store", "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    kept = json.loads(file.read_text())
    assert row == {"lora_error": kept["largest_error"], "lora_bound": None}
    assert main(["verify", "--store", "store"]) == 0


def test_layer_groups_that_do_not_exist_are_refused_before_any_block(model, here, capsys):
    command = ["kernel", *arguments(model, solver__groups="[encoder.layr]")]
    fails(capsys, here, command, "encoder.layr", "layer group")


def test_prompt_none_shows_the_linear_probe(model, here, capsys):
    changes = {"prompt": "none", "prompt.template": None, "prompt.words": None}
    assert main(["kernel", *arguments(model, **changes)]) == 0
    assert "linear probe" in capsys.readouterr().out


def test_a_sweep_goes_on_after_a_failing_job_and_says_which(model, here, capsys):
    assert main(["kernel", "-m", *arguments(model, task__k="2,40")]) == 1
    captured = capsys.readouterr()
    assert "1 of 2 runs failed" in captured.err
    assert "kernel regression" in captured.out


def test_help_version_and_unknown_command(capsys):
    assert main(["--help"]) == 0
    assert "raykernel sweep quickstart" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert main(["kernle"]) == 2
    assert "'kernel'" in capsys.readouterr().err
    assert main([]) == 2


def test_help_of_a_command_says_what_it_does_and_may_be_cut_short():
    run = subprocess.run(
        f"{shlex.quote(sys.executable)} -m raykernel finetune --help | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert run.stdout.startswith("raykernel finetune: fine-tunes the same problem")
    assert run.stderr == ""


@pytest.mark.parametrize(
    ("changes", "helps"),
    [
        ({"task": "sst3"}, ["'sst2'"]),
        ({"model": "robert"}, ["'roberta_base'"]),
        ({"task.kk": "3"}, ["'task.k'"]),
        ({"lambda": "3"}, ["spelt `lam`"]),
        ({"task.text": "[reviw]"}, ["'review'", "reviews.tsv"]),
        ({"task.label": "rate"}, ["'rating'"]),
        ({"task.k": "40"}, ["40", "negative"]),
        ({"prompt.words": "{negative: terrible}"}, ["positive"]),
        ({"prompt.words": "{negative: terrible, positive: incomprehensible}"}, ["one token"]),
        ({"prompt.words": "{negative: great, positive: great}"}, ["great"]),
        ({"prompt.template": '"{review} It was"'}, ["{label}"]),
        ({"prompt.template": '"{reviw} It was {label}"'}, ["review"]),
        ({"task.max_length": "5"}, ["task.max_length"]),
        ({"task.train": "missing.tsv"}, ["missing.tsv"]),
        ({"model.name": "someone/no-such-model"}, ["someone/no-such-model"]),
        ({"compute.device": "cuda"}, ["compute.device"]),
        ({"compute.memory_gb": "0.01"}, ["compute.memory_gb"]),
        ({"store.kernel": "0123456789abcdef"}, ["0123456789abcdef"]),
    ],
)
def test_wrong_input_ends_with_code_2_and_says_what_to_do(
    changes, helps, model, here, capsys, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fails(capsys, here, ["kernel", *arguments(model, **changes)], *helps)


@pytest.mark.parametrize("prompt", ["manual", "none"])
@pytest.mark.parametrize(
    ("changes", "helps"),
    [
        ({"parameters": "lora", "parameters.target_modules": "[qeury]"}, ["'query'"]),
        ({"parameters.layers_to_transform": "[2]"}, ["expected -2 to 1"]),
        ({"parameters.include": "[nothing]"}, ["leaves no parameter", "layer.0"]),
    ],
)
def test_parameters_that_fit_nothing_are_refused_before_anything_is_stored(
    changes, helps, prompt, model, here, capsys
):
    if prompt == "none":
        changes = changes | {"prompt": "none", "prompt.template": None, "prompt.words": None}
    for command in ("kernel", "finetune"):
        fails(capsys, here, [command, *arguments(model, **changes)], *helps)
    assert not (here / "store").exists()


def test_an_empty_file(model, here, capsys):
    (here / "reviews.tsv").write_text("")
    fails(capsys, here, ["kernel", *arguments(model)], "reviews.tsv")


def test_an_unreadable_encoding(model, here, capsys):
    (here / "reviews.tsv").write_bytes("review\trating\nsch\xf6n\tpositive\n".encode("latin-1"))
    fails(capsys, here, ["kernel", *arguments(model)], "UTF-8")


def test_a_store_of_another_identity_is_shown_field_by_field(model, here, capsys):
    assert main(["kernel", *arguments(model)]) == 0
    (kernel,) = (here / "store" / "kernels").iterdir()
    capsys.readouterr()
    pinned = arguments(model, task__k="2", **{"store.kernel": kernel.name})
    assert main(["kernel", *pinned]) == 2
    message = capsys.readouterr().err
    assert "task.k" in message
    assert "found 2" in message or "3" in message


def test_a_folder_that_is_no_store(model, here, capsys):
    (here / "store").mkdir()
    (here / "store" / "thesis.tex").write_text("mine")
    fails(capsys, here, ["kernel", *arguments(model)], "store")
    assert [path.name for path in (here / "store").iterdir()] == ["thesis.tex"]


def test_a_corrupt_block_names_its_file_and_the_cure(model, here, capsys):
    assert main(["kernel", *arguments(model)]) == 0
    block = sorted(here.glob("store/kernels/*/block-*"))[0]
    content = bytearray(block.read_bytes())
    content[len(content) // 2] ^= 4
    block.write_bytes(content)
    capsys.readouterr()
    assert main(["kernel", *arguments(model)]) == 2
    assert block.name in capsys.readouterr().err
    assert main(["verify", "--store", "store"]) == 1
    assert main(["verify", "--store", "store", "--remove"]) in (0, 1)
    capsys.readouterr()
    assert main(["kernel", *arguments(model)]) == 0
    assert "computing 1" in capsys.readouterr().err


def test_nan_in_the_model_names_the_layer(model, here, capsys, tmp_path):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    broken = AutoModelForMaskedLM.from_pretrained(model)
    broken.roberta.encoder.layer[1].output.dense.weight.data[0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "broken")
    fails(
        capsys,
        here,
        ["kernel", *arguments(tmp_path / "broken")],
        "encoder.layer.1.output.dense",
    )


def test_the_console_script_is_the_module(here):
    run = subprocess.run(
        [sys.executable, "-m", "raykernel", "kernel", "task=sst3"], capture_output=True, text=True
    )
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    assert run.stderr.count("\n") == 1


FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
from raykernel.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_no_space_left_is_said_and_leaves_nothing_half_written(model, here):
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, "kernel", *arguments(model)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    assert "space" in run.stderr
    assert not list(here.glob("store/kernels/*/block-*"))
    assert not [path for path in here.rglob("*") if path.name.startswith(".")]


def test_no_network_for_a_hub_data_set_names_the_alternatives(model, here, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fails(capsys, here, ["kernel", "task=sst2", "model=hf", f"model.name={model}"], "task.data_dir")
