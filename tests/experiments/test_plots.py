"""Figures: labels and file formats."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradreg_optax.experiments import plots


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=9).map(sorted), st.floats(0.01, 2))
def test_spread_labels_keep_their_order_and_distance_and_stay_near(heights, apart):
    found = np.array(plots.spread(heights, apart))
    assert (np.diff(found) > 0.999 * apart).all()
    assert found.mean() == pytest.approx(np.mean(heights), abs=1e-6)
    if (np.diff(heights) >= apart).all():
        np.testing.assert_allclose(found, heights)


def test_labels_of_overlapping_points_have_the_order_of_the_points_and_a_line_to_each():
    made, (axis,) = plots.figure(1)
    axis.set(xlim=(0, 4), ylim=(60, 100))
    marks = [(2, 84.4, "B-GR"), (2, 86.9, "SAM"), (2, 87.2, "F-GR"), (3, 84.6, "DB (1 of 5 lost)")]
    plots.label(axis, marks)
    made.canvas.draw()
    texts = {text.get_text(): text for text in axis.texts}
    boxes = [texts[name].get_window_extent() for name in ("B-GR", "SAM", "F-GR")]
    assert boxes[0].y1 <= boxes[1].y0
    assert boxes[1].y1 <= boxes[2].y0
    for place, height, name in marks:
        assert texts[name].xy == (place, height)
        assert texts[name].arrow_patch is not None
    assert texts["DB (1 of 5 lost)"].get_color() == plots.color("DB")


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_a_figure_is_written_in_the_wanted_format(suffix, tmp_path):
    (path,) = plots.save(plots.figure(1)[0], tmp_path / "new" / "name", [suffix])
    begins = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
    assert path.name == f"name.{suffix}"
    assert path.read_bytes().startswith(begins[suffix])
