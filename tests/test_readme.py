"""README tells the truth: its commands compose, and CI runs its test command."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

import raykernel
from raykernel.cli import main
from raykernel.compose import compose_runs
from tests import cases

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
JOINED = README.replace("\\\n", " ")
COMMANDS = sorted(
    set(
        re.findall(
            r"raykernel (?:kernel|plan|doctor|spectrum|select|finetune|behavior) [^`\n|]+", JOINED
        )
    )
)


@pytest.mark.parametrize("command", [c for c in COMMANDS if "--help" not in c])
def test_every_command_composes(command):
    _, name, *arguments = shlex.split(command)
    assert compose_runs(name, arguments)


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 6


def test_ci_runs_the_test_command():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    program = re.search(r"command=\$\(awk '(.*)' README.md\)", script)
    assert program is not None
    found = subprocess.run(
        ["awk", program.group(1), ROOT / "README.md"], capture_output=True, text=True, check=True
    )
    assert "python -m pytest" in found.stdout
    assert found.stdout.count("\n") == 1


def test_the_example_of_peft_methods_runs():
    case = cases.transformer_case("roberta")
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", README, re.S) if "LoraConfig" in c]
    names = {"model": case.model, "readout": case.readout, "batch": case.batch}
    exec(code, names | {"raykernel": raykernel}, names)
    kernels = names["kernels"]
    assert list(kernels) == ["lora, r = 8", "dora, r = 2", "ia3", "bitfit"]
    assert all(block.shape == (5, 2, 5, 2) for own in kernels.values() for block in own.values())


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"\b[A-Z]+_(?:TIME|OUTPUT)\b|\bMEASURED\b", README)


@pytest.mark.packaged
def test_the_tiny_experiment_runs_on_the_packaged_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["kernel", "experiment=tiny"]) == 0
    assert "linear probe" in capsys.readouterr().out
