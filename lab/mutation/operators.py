"""The small faults: every place of a module where one operator, constant or statement can be replaced."""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,),
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        file: relative to the checkout.
        kind: the operator that made it.
        line, column, end_line, end_column: the piece that is replaced, as `ast` counts.
        before, after: its text, and the new one.
        function: first and last line of the function around it, `None` outside of functions.
    """

    file: str
    kind: str
    line: int
    column: int
    end_line: int
    end_column: int
    before: str
    after: str
    function: tuple[int, int] | None

    def applied_to(self, source: str) -> str:
        """The module's text with the fault. Sources are ASCII, so columns of `ast` are columns of the text."""
        lines = source.splitlines(keepends=True)
        head = lines[self.line - 1][: self.column]
        tail = lines[self.end_line - 1][self.end_column :]
        return "".join([*lines[: self.line - 1], head + self.after + tail, *lines[self.end_line :]])


def mutants_of(file: str, source: str) -> list[Mutant]:
    """Every mutant of a module that still compiles, in the order of the text.

    Left out is what no test should pin: annotations, docstrings, text of messages, the arguments of decorators, and
    blocks for type checkers.
    """
    tree = ast.parse(source)
    found = []
    for node, function in _places(tree, None):
        for kind, replaced, after in _faults(node):
            mutant = _mutant(file, source, kind, replaced, after, function)
            try:
                compile(mutant.applied_to(source), file, "exec")
            except SyntaxError:
                continue
            found.append(mutant)
    return sorted(set(found), key=lambda one: (one.line, one.column, one.kind, one.after))


def _mutant(
    file: str, source: str, kind: str, node: ast.expr | ast.stmt, after: str, function: tuple[int, int] | None
) -> Mutant:
    before = ast.get_source_segment(source, node) or ""
    end_line, end_column = node.end_lineno or node.lineno, node.end_col_offset or 0
    text = after if isinstance(node, ast.stmt) else f"({after})"
    return Mutant(file, kind, node.lineno, node.col_offset, end_line, end_column, before, text, function)


def _places(node: ast.AST, function: tuple[int, int] | None) -> Iterator[tuple[ast.AST, tuple[int, int] | None]]:
    """Nodes that may be mutated, each with the function around it."""
    if isinstance(node, ast.JoinedStr | ast.Raise | ast.Import | ast.ImportFrom):
        if isinstance(node, ast.Raise):
            yield node, function  # the statement may go; its message is text
        return
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        return
    skipped = _skipped(node)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        function = (node.lineno, node.end_lineno or node.lineno)
    yield node, function
    for child in ast.iter_child_nodes(node):
        if id(child) not in skipped:
            yield from _places(child, function)


def _skipped(node: ast.AST) -> set[int]:
    """Ids of children in which nothing is mutated."""
    parts: list[ast.AST | None] = []
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        parts += [node.returns, *node.decorator_list]
    elif isinstance(node, ast.ClassDef):
        parts += [*node.decorator_list, *node.keywords, *node.bases]
    elif isinstance(node, ast.arg | ast.AnnAssign):
        parts.append(node.annotation)
    elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id[0].isupper():
        parts.append(node.slice)  # a type
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "cast"):
        parts += node.args[1:] if node.func.id == "isinstance" else node.args[:1]
    return {id(part) for part in parts if part is not None}


def _faults(node: ast.AST) -> Iterator[tuple[str, ast.expr | ast.stmt, str]]:
    """(kind, node to replace, its new text) of the faults that one node can have."""
    for kind, types, make in _OPERATORS:
        if isinstance(node, types):
            for replaced, after in make(node):
                yield kind, replaced, after


def _comparison(node: ast.Compare) -> Iterator[tuple[ast.expr, str]]:
    for index, operator in enumerate(node.ops):
        for other in COMPARISONS[type(operator)]:
            operators = [*node.ops[:index], other(), *node.ops[index + 1 :]]
            yield node, ast.unparse(ast.Compare(node.left, operators, node.comparators))


def _boolean(node: ast.BoolOp) -> Iterator[tuple[ast.expr, str]]:
    other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    yield node, ast.unparse(ast.BoolOp(other, node.values))


def _arithmetic(node: ast.BinOp) -> Iterator[tuple[ast.expr, str]]:
    other = ARITHMETIC.get(type(node.op))
    if other is not None and not _is_text(node.left) and not _is_text(node.right):
        yield node, ast.unparse(ast.BinOp(node.left, other(), node.right))


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _negation(node: ast.UnaryOp) -> Iterator[tuple[ast.expr, str]]:
    if isinstance(node.op, ast.Not | ast.USub):
        yield node, ast.unparse(node.operand)


def _constant(node: ast.Constant) -> Iterator[tuple[ast.expr, str]]:
    value = node.value
    if isinstance(value, bool):
        yield node, repr(not value)
    elif isinstance(value, int | float):
        if value + 1 != value:
            yield node, repr(value + 1)
        if isinstance(value, float) and value not in (0.0, 1.0):
            yield node, repr(value / 2)


def _condition(node: ast.If | ast.IfExp) -> Iterator[tuple[ast.expr, str]]:
    test = node.test
    if not (isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)) and not isinstance(test, ast.Compare):
        yield test, ast.unparse(ast.UnaryOp(ast.Not(), test))


def _returned(node: ast.Return) -> Iterator[tuple[ast.expr, str]]:
    value = node.value
    if value is not None and not (isinstance(value, ast.Constant) and value.value in (None, True, False)):
        yield value, "None"


def _removed(node: ast.stmt) -> Iterator[tuple[ast.stmt, str]]:
    if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Call):
        return  # a docstring or a yield
    if isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Attribute | ast.Subscript):
        return  # the name would be missing, which any test sees
    yield node, "pass"


def _swapped(node: ast.Call) -> Iterator[tuple[ast.expr, str]]:
    plain = not any(isinstance(one, ast.Starred) for one in node.args)
    if plain and len(node.args) == 2 and ast.dump(node.args[0]) != ast.dump(node.args[1]):
        yield node, ast.unparse(ast.Call(node.func, node.args[::-1], node.keywords))


def _default(node: ast.arguments) -> Iterator[tuple[ast.expr, str]]:
    """Defaults that are text or nothing; numbers and truth values are constants already."""
    for value in filter(None, [*node.defaults, *node.kw_defaults]):
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield value, repr(value.value + "_")


_OPERATORS: tuple[tuple[str, type | tuple[type, ...], Callable[..., Iterator[tuple[ast.expr | ast.stmt, str]]]], ...]
_OPERATORS = (
    ("comparison", ast.Compare, _comparison),
    ("boolean operator", ast.BoolOp, _boolean),
    ("arithmetic", ast.BinOp, _arithmetic),
    ("negation removed", ast.UnaryOp, _negation),
    ("constant", ast.Constant, _constant),
    ("condition negated", (ast.If, ast.IfExp), _condition),
    ("returned value", ast.Return, _returned),
    ("statement removed", (ast.Expr, ast.Assign, ast.AugAssign, ast.Raise, ast.Continue, ast.Break), _removed),
    ("arguments swapped", ast.Call, _swapped),
    ("default", ast.arguments, _default),
)
