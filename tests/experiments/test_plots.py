"""Figures: file formats."""

import pytest

from gradreg_optax.experiments import plots


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_a_figure_is_written_in_the_wanted_format(suffix, tmp_path):
    (path,) = plots.save(plots.figure(1)[0], tmp_path / "new" / "name", [suffix])
    begins = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}
    assert path.name == f"name.{suffix}"
    assert path.read_bytes().startswith(begins[suffix])
