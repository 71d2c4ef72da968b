from hypothesis import given
from hypothesis import strategies as st

from gradreg_optax.experiments import tables

cells = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=9)


@given(rows=st.lists(st.lists(cells, min_size=3, max_size=3), min_size=1, max_size=5))
def test_every_column_has_one_edge_whatever_is_in_it(rows):
    lines = tables.aligned(["a", "b", "c"], rows).splitlines()
    widths = [max(len(row[i]) for row in [*rows, ["a", "b", "c"]]) for i in range(3)]
    for line, row in zip(lines, [["a", "b", "c"], *rows], strict=True):
        assert line.split() == row
        assert line.index(row[0]) == 0
        assert len(line) == sum(widths) + 4


def test_a_setting_shows_what_a_row_has_and_nothing_else():
    rows = {"gamma": [0.5], "rho": [float("nan")], "seed": [3]}
    assert tables.setting(rows, {"gamma": "γ", "rho": "ρ", "interval": "k"}) == "γ=0.5"
