"""The faults that are planted are faults, one at a time."""

import ast
import inspect

import pytest

from gradreg_optax import curvature
from mutation.operators import faults


@pytest.mark.parametrize(
    ("source", "broken"),
    [
        ("x = a < b", {"x = a <= b"}),
        ("x = a - b", {"x = a + b"}),
        ("x = not a", {"x = a"}),
        ("x = a and b", {"x = a or b"}),
        ("x = f(3)", {"x = f(4)"}),
        ("x = a if c else b", {"x = b if c else a"}),
        ("x = y.astype(d)", {"x = y"}),
        ("x = jnp.sum(y)", {"x = jnp.mean(y)"}),
        ("f(a, b=c)", {"pass", "f(a)"}),
        ("if a:\n    raise ValueError(f'{a + 1}')", {"pass"}),
        ('"""Text."""\nx: int = y', set()),
    ],
)
def test_a_fault_changes_one_node(source, broken):
    assert {fault.module for fault in faults(source)} == broken


def test_every_fault_of_a_module_is_another_program_that_compiles():
    source = inspect.getsource(curvature)
    modules = [fault.module for fault in faults(source)]
    assert len(modules) >= 100
    assert ast.unparse(ast.parse(source)) not in modules
    for module in modules:
        compile(module, "curvature.py", "exec")
