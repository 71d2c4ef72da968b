"""The faults that are planted are faults, one at a time."""

import pytest

from mutation.operators import faults


@pytest.mark.parametrize(
    ("source", "broken"),
    [
        ("x = a < b", {"x = a <= b"}),
        ("f(a, b=c)", {"pass", "f(a)"}),
        ("if a:\n    raise ValueError(f'{a + 1}')", {"pass"}),
        ('"""Text."""\nx: int = y', set()),
    ],
)
def test_a_fault_changes_one_node(source, broken):
    assert {fault.module for fault in faults(source)} == broken
