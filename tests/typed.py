"""Runtime checks of raykernel's signatures, for the whole suite: shapes and types.

jaxtyping's own import hook wraps every function there is, nested ones each time they are made,
and made the suite four times as slow. Here a function is wrapped for shapes only if its signature
has some; any other of a module or a class is checked by beartype alone, which costs next to
nothing. And of a function that is called all the time, most calls go unchecked.
"""

from __future__ import annotations

import ast
import functools
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray, AbstractDtype, jaxtyped

_DECORATOR = "__checked__"
_FIRST, EVERY = 50, 10
"""Calls of a function in a process that are checked: so many, then each so many-th."""


def install(package: str) -> None:
    """Check a package's signatures from now on; none of it may be imported yet."""
    assert package not in sys.modules, f"{package} is imported already, its functions unchecked"
    sys.meta_path.insert(0, _Finder(package))


def checked(thing: Any) -> Any:
    """A function or class whose annotations hold, or `jaxtyping.TypeCheckError` is raised."""
    if not _has_shapes(thing):
        return thing if isinstance(thing, type) else beartype(thing)
    wrapped = jaxtyped(thing, typechecker=beartype)
    return wrapped if isinstance(thing, type) else _sampled(thing, wrapped)


def _sampled(plain: Callable[..., Any], wrapped: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose first calls are checked, and then some."""
    calls = itertools.count()

    @functools.wraps(plain)
    def sampled(*args: Any, **kwargs: Any) -> Any:
        call = next(calls)
        return (wrapped if call < _FIRST or not call % EVERY else plain)(*args, **kwargs)

    return sampled


def _has_shapes(thing: Any) -> bool:
    """Whether an annotation, which is a string still, names a type of jaxtyping."""
    known = vars(sys.modules[thing.__module__])
    texts = " ".join(map(str, thing.__annotations__.values()))
    return any(_holds_shape(known.get(name)) for name in re.findall(r"[^\W\d]\w*", texts))


def _holds_shape(hint: Any) -> bool:
    """Whether a type is jaxtyping's, or made of one: an alias for a dict of arrays."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray | AbstractDtype):
        return True
    return any(map(_holds_shape, get_args(hint)))


class _Decorate(ast.NodeTransformer):
    """Decorates classes first of all, functions last of all, and nothing inside functions."""

    def __init__(self) -> None:
        self._unknown: set[str] = set()
        """Names that are imported for a type checker only."""

    def visit_If(self, node: ast.If) -> ast.If:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            imports = [n for n in node.body if isinstance(n, ast.Import | ast.ImportFrom)]
            self._unknown |= {alias.asname or alias.name for n in imports for alias in n.names}
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        node.decorator_list.insert(0, _name(_DECORATOR, node))
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.decorator_list.append(_name(_DECORATOR, node))
        for argument in (*node.args.args, *node.args.kwonlyargs):
            argument.annotation = self._known(argument.annotation)
        node.returns = self._known(node.returns)
        return node

    def _known(self, annotation: ast.expr | None) -> ast.expr | None:
        names = {n.id for n in ast.walk(annotation or ast.Pass()) if isinstance(n, ast.Name)}
        is_known = annotation is None or names.isdisjoint(self._unknown)
        return annotation if is_known else _name("object", annotation)


def _name(text: str, where: ast.AST) -> ast.Name:
    return ast.copy_location(ast.Name(text, ast.Load()), where)


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        vars(module)[_DECORATOR] = checked
        super().exec_module(module)

    def get_code(self, fullname: str) -> CodeType:
        """From the source always: the cache on disk is that of the undecorated code."""
        path = self.get_filename(fullname)
        tree = _Decorate().visit(ast.parse(self.get_data(path), path))
        code: CodeType = compile(tree, path, "exec", dont_inherit=True)
        return code


class _Finder(MetaPathFinder):
    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] != self._package:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec
