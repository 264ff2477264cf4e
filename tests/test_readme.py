"""README tells the truth: its commands compose, and CI runs its test command."""

from __future__ import annotations

import csv
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import raykernel
from raykernel.cli import main
from raykernel.compose import compose_runs
from raykernel.store.blocks import Store
from tests import cases, tiny

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


def test_four_commands_lead_from_a_csv_to_an_adapter_that_peft_loads(here, monkeypatch, capsys):
    """README's own lines, on a tiny encoder in place of the packaged one."""
    from peft import LoraConfig

    (block,) = re.findall(r"<!-- path -->\n```bash\n(.*?)```", README, re.S)
    commands = [shlex.split(line) for line in block.splitlines()]
    assert len(commands) <= 5
    table = tiny.write_reviews(here / "reviews.tsv", num=100).read_text("utf-8")
    rows = [line.split("\t") for line in table.splitlines()]
    with (here / "reviews.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    tiny.save_masked_lm(here / "encoder")
    for _, *words in commands:
        model = ["model=hf", "model.name=encoder"]
        swapped = [[word] if not word.startswith("model=") else model for word in words]
        assert main([word for part in swapped for word in part]) == 0
    adapter, *_ = Store("raykernel-store").results("selections").to_pylist()
    folder = here / "raykernel-store" / adapter["adapter"]
    assert LoraConfig.from_pretrained(str(folder)).r == 8
    assert adapter["adapter"] in capsys.readouterr().out
    assert (here / "raykernel-report" / "index.html").exists()


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"\b[A-Z]+_(?:TIME|OUTPUT)\b|\bMEASURED\b", README)


@pytest.mark.packaged
def test_the_tiny_experiment_runs_on_the_packaged_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["kernel", "experiment=tiny"]) == 0
    assert "linear probe" in capsys.readouterr().out


WORKLOADS = {
    "RoBERTa d=128, 32 texts of 16 to 32 tokens": "W1",
    "RoBERTa d=768, 16 texts of 12 to 24 tokens": "W2",
    "RoBERTa d=128, 32 texts of 64 to 128 tokens": "W3",
    "SmolLM2-135M, 16 reviews of up to 64 tokens": "W4",
    "RoBERTa d=128, 512 texts of 8 to 16 tokens": "W5",
}
LOOP = "loop of backward passes"


def test_speeds_are_those_of_the_committed_run():
    """The readme's table, from the rows of benchmarks/RESULTS.md."""
    results = (ROOT / "benchmarks/RESULTS.md").read_text("utf-8")
    for title, workload in WORKLOADS.items():
        section = re.split(r"^## ", results.split(f"\n## {workload}: ")[1], flags=re.MULTILINE)[0]
        rows = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in section.splitlines()
            if line.startswith("| ")
        ]
        by_name = {row[0]: row[1:] for row in rows if row[1].replace(".", "").isdigit()}
        seconds, _, floors = map(float, by_name["raykernel"][:3])
        peers = {
            name: float(row[1])
            for name, row in by_name.items()
            if not name.startswith(("raykernel", "floor"))
        }
        best = min(peers, key=lambda name: peers[name])
        shown = [
            title,
            f"{seconds:.2f}" if seconds < 1 else f"{seconds:.1f}",
            f"{floors:.1f}",
            f"{peers[best]:.1f} ({'the loop' if best == LOOP else best.split()[0]})",
            f"{peers[LOOP]:.1f}",
        ]
        assert f"| {' | '.join(shown)} |" in README.replace(" times slower (", " ("), shown
