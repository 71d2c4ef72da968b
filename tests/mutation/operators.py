"""The faults: each operator looks at one node of the syntax tree and may return it broken."""

import ast
import copy
from collections.abc import Iterator
from typing import NamedTuple

_COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
}
_NAMES = {
    "minimum": "maximum",
    "maximum": "minimum",
    "min": "max",
    "max": "min",
    "all": "any",
    "any": "all",
    "floor": "ceil",
    "ceil": "floor",
    "sum": "mean",
    "mean": "sum",
    "zeros_like": "ones_like",
    "ones_like": "zeros_like",
    "sorted": "list",
}
# A call of these is replaced by its first argument, or by the object whose method it is.
_TRANSPARENT = {
    "abs",
    "astype",
    "cast",
    "checkpoint",
    "conj",
    "conjugate",
    "isfinite",
    "sqrt",
    "varying",
    "wide",
    "widen",
    "within",
}


class Fault(NamedTuple):
    """One broken node.

    Attributes:
      line: where it is.
      kind: the operator.
      before: the source of the node.
      after: the source of the broken one.
      module: the source of the whole module with the fault in it.
    """

    line: int
    kind: str
    before: str
    after: str
    module: str


def faults(source: str) -> Iterator[Fault]:
    """Every fault of a module, in the order of its lines."""
    tree = ast.parse(source)
    for path, node in _nodes(tree):
        for kind, broken in _broken(node):
            after = ast.unparse(ast.fix_missing_locations(broken))
            whole = ast.unparse(ast.fix_missing_locations(_replaced(tree, path, broken)))
            yield Fault(node.lineno, kind, ast.unparse(node), after, whole)


def _nodes(tree: ast.Module) -> Iterator[tuple[tuple, ast.AST]]:
    """The nodes in which a fault would be one: neither text, types nor what an error says."""

    def walk(node: ast.AST, path: tuple) -> Iterator[tuple[tuple, ast.AST]]:
        if isinstance(node, ast.expr | ast.stmt):
            yield path, node
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list", "type_params", "exc", "names"):
                continue
            for index, child in enumerate(value if isinstance(value, list) else [value]):
                skipped = isinstance(child, ast.JoinedStr) or _is_alias(child)
                if isinstance(child, ast.AST) and not skipped:
                    place = (field, index if isinstance(value, list) else None)
                    yield from walk(child, (*path, place))

    yield from walk(tree, ())


def _is_alias(node: object) -> bool:
    return isinstance(node, ast.AnnAssign) and getattr(node.annotation, "id", "") == "TypeAlias"


def _replaced(tree: ast.Module, path: tuple, broken: ast.AST) -> ast.Module:
    tree = copy.deepcopy(tree)
    parent: ast.AST = tree
    for field, index in path[:-1]:
        parent = getattr(parent, field) if index is None else getattr(parent, field)[index]
    field, index = path[-1]
    if index is None:
        setattr(parent, field, broken)
    else:
        getattr(parent, field)[index] = broken
    return tree


def _broken(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    match node:
        case ast.Compare(ops=[operator, *_]) if type(operator) in _COMPARISONS:
            yield "comparison", _with(node, ops=[_COMPARISONS[type(operator)](), *node.ops[1:]])
        case ast.BinOp(op=operator, left=left) if type(operator) in _ARITHMETIC:
            if not isinstance(left, ast.Constant | ast.JoinedStr):
                yield "arithmetic", _with(node, op=_ARITHMETIC[type(operator)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield "sign", operand
        case ast.BoolOp(op=operator):
            opposite = ast.Or() if isinstance(operator, ast.And) else ast.And()
            yield "logic", _with(node, op=opposite)
        case ast.Constant(value=bool(value)):
            yield "constant", ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            yield "constant", ast.Constant(value + 1)
        case ast.IfExp(body=body, orelse=orelse):
            yield "branch", _with(node, body=orelse, orelse=body)
        case ast.If(test=test) if not any(isinstance(s, ast.Raise) for s in node.body):
            yield "branch", _with(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.If():
            yield "check", ast.Pass()
        case ast.Expr(value=ast.Call()):
            yield "check", ast.Pass()
        case ast.Call():
            yield from _calls(node)


def _calls(node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    if name in _TRANSPARENT:
        method = name == "astype"
        yield "call", node.func.value if method else node.args[0] if node.args else node.func.value
    if name in _NAMES:
        renamed = (
            _with(node.func, attr=_NAMES[name])
            if isinstance(node.func, ast.Attribute)
            else ast.Name(_NAMES[name], ast.Load())
        )
        yield "call", _with(node, func=renamed)
    for i, keyword in enumerate(node.keywords):
        if keyword.arg is not None:
            yield "keyword", _with(node, keywords=node.keywords[:i] + node.keywords[i + 1 :])


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed
