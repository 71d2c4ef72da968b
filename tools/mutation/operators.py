"""The faults: each operator looks at one node of the syntax tree and may return it broken."""

import ast
import copy
from collections.abc import Iterator
from typing import Any, NamedTuple


def _both_ways(*pairs: tuple[Any, Any]) -> dict[Any, Any]:
    return dict(pairs) | {b: a for a, b in pairs}


_ORDER = _both_ways((ast.Lt, ast.LtE), (ast.Gt, ast.GtE))
_COMPARISONS = _ORDER | _both_ways((ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.In, ast.NotIn))
_ARITHMETIC = _both_ways((ast.Add, ast.Sub), (ast.Mult, ast.Div)) | {
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
}
_REDUCTIONS = _both_ways(("minimum", "maximum"), ("min", "max"), ("all", "any"), ("sum", "mean"))
_NAMES = _REDUCTIONS | _both_ways(("floor", "ceil"), ("zeros_like", "ones_like"))
_NAMES["sorted"] = "list"
# A call of these is replaced by its first argument, or by the object whose method it is.
_TRANSPARENT = {"abs", "cast", "checkpoint", "conj", "conjugate", "isfinite", "sqrt"}
_TRANSPARENT |= {"astype", "varying", "wide", "widen", "within"}
# Neither text, types nor the message of an error.
_SKIPPED = {"annotation", "returns", "decorator_list", "type_params", "exc", "names"}


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
    for parent, field, index, node in list(_places(tree)):
        for kind, broken in _broken(node):
            _put(parent, field, index, broken)
            whole = ast.unparse(tree)
            _put(parent, field, index, node)
            yield Fault(node.lineno, kind, ast.unparse(node), ast.unparse(broken), whole)


def _places(parent: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, Any]]:
    """The nodes in which a fault may be, each with its place."""
    for field, value in ast.iter_fields(parent):
        several = isinstance(value, list)
        for index, node in enumerate(value if several else [value]):
            skipped = field in _SKIPPED or isinstance(node, ast.JoinedStr) or _is_alias(node)
            if isinstance(node, ast.AST) and not skipped:
                yield parent, field, index if several else None, node
                yield from _places(node)


def _put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def _is_alias(node: object) -> bool:
    return isinstance(node, ast.AnnAssign) and getattr(node.annotation, "id", "") == "TypeAlias"


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
        case ast.If() | ast.Expr(value=ast.Call()):
            yield "check", ast.Pass()
        case ast.Call():
            yield from _calls(node)


def _calls(node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    if name in _TRANSPARENT:
        argument = node.args[0] if node.args and name != "astype" else node.func.value
        yield "call", argument
    if name in _NAMES:
        attribute = isinstance(node.func, ast.Attribute)
        renamed = _with(node.func, **{"attr" if attribute else "id": _NAMES[name]})
        yield "call", _with(node, func=renamed)
    for i, keyword in enumerate(node.keywords):
        if keyword.arg is not None:
            yield "keyword", _with(node, keywords=node.keywords[:i] + node.keywords[i + 1 :])


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed
