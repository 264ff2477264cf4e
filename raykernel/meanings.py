"""The strings below fields and members of classes, which say what these mean."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from functools import cache


@cache
def meanings(cls: type) -> dict[str, str]:
    """Strings below the fields of a dataclass or the members of an enumeration.

    Python keeps the string of a class and drops these, so that they are read from its source.

    Args:
        cls: the class.

    Returns:
        By name, on one line; without those that have none.
    """
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef), "the source of a class"
    found: dict[str, str] = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        names = _names(field)
        if names and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found |= dict.fromkeys(names, " ".join(str(below.value.value).split()))
    return found


def first_sentence(text: str) -> str:
    """A text up to its first full stop that ends a sentence."""
    return re.split(r"(?<=\.)\s+(?=[A-Z])", text, maxsplit=1)[0]


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []
