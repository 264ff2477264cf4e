"""What the code never does, whatever it is given: found in its syntax, so no path is missed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(
    path for name in ("raykernel", "sweeps", "examples") for path in (ROOT / name).rglob("*.py")
)
PICKLES = {"pickle", "cloudpickle", "_pickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}
RUNS_CODE = {"eval", "exec", "compile", "__import__", "execfile"}
CALLS = {"load", "loads", "load_all", "read_pickle", "full_load", "unsafe_load", "system", "popen"}
STUDIES = {"raykernel/sweep.py": "runpy"}
"""Where code that a user wrote is run, and with what: studies are Python files."""


def found_in(source: str) -> Iterator[str]:
    """Everything in a module that could run what a file says."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [getattr(node, "module", None) or "", *(name.name for name in node.names)]
            tops = {module.partition(".")[0] for module in modules}
            yield from tops & (PICKLES | {"yaml", "runpy", "code", "imp"})
        elif isinstance(node, ast.Call):
            yield from _of_call(node)


def _of_call(node: ast.Call) -> Iterator[str]:
    function, options = node.func, {option.arg: option.value for option in node.keywords}
    name = ast.unparse(function)
    owner, _, last = name.rpartition(".")
    if name in RUNS_CODE or (owner in PICKLES | {"os", "torch", "np", "numpy", "yaml", "pd"}
                             and last in CALLS):  # fmt: skip
        yield name
    for option, safe in [("shell", False), ("allow_pickle", False), ("weights_only", True)]:
        value = options.get(option)
        if value is not None and not (isinstance(value, ast.Constant) and value.value is safe):
            yield f"{name}({option}=…)"
    value = options.get("trust_remote_code")
    if value is not None and ast.unparse(value) != "model.trust_remote_code":
        yield f"{name}(trust_remote_code=…)"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_reads_a_pickle_evaluates_text_or_calls_a_shell(path: Path):
    allowed = STUDIES.get(str(path.relative_to(ROOT)))
    assert set(found_in(path.read_text(encoding="utf-8"))) == ({allowed} if allowed else set())


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from joblib import load", "import cloudpickle as c", "import yaml",
        "torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f, allow_pickle=True)",
        "eval(text)", "exec(text)", "run(c, shell=True)", "os.system(c)", "pd.read_pickle(f)",
        "A.from_pretrained(f, trust_remote_code=True)", "read(f, allow_pickle=flag)",
    ],
)  # fmt: skip
def test_each_of_these_would_be_found(source: str):
    assert list(found_in(source))


def dependencies() -> list[Requirement]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.scripts]")[0]
    listed = re.findall(r'^\s+"([^"]+)"[,\]]', text, re.M) + re.findall(r'= \["([^"]+)"\]', text)
    found = [Requirement(one) for one in listed]
    return [one for one in found if one.name != "raykernel"]


UNBOUNDED = {"fsspec", "s3fs", "gcsfs", "adlfs"}
"""Their versions are dates, and those of one day belong together."""


def test_every_dependency_has_a_version_from_which_and_one_below_which():
    names = {one.name for one in dependencies()}
    assert {"ray", "torch", "transformers", "peft", "jinja2", "hypothesis", "wandb"} <= names
    for one in dependencies():
        operators = {bound.operator for bound in one.specifier}
        assert operators == ({">="} if one.name in UNBOUNDED else {">=", "<"}), one
        assert one.url is None
