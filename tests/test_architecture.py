"""The import rules of pyproject.toml hold: layers one way, each heavy library in its home."""

from importlinter.cli import lint_imports


def test_import_contracts_hold():
    assert lint_imports() == 0
