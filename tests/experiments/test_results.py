import dataclasses
import json
import os
import platform
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gradreg_optax.experiments import results


@dataclasses.dataclass(frozen=True)
class Config:
    output: Path = Path("somewhere")
    gammas: tuple[float, ...] = (1.0, 2.0)
    data_dir: Path | None = None


@given(
    array=hnp.arrays(
        np.float64, hnp.array_shapes(max_dims=3, max_side=4), elements=st.floats(-1e6, 1e6)
    )
)
def test_what_is_saved_is_loaded_to_nine_digits(array, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    loaded = results.load(
        results.save(
            folder, "test", Config(), {"array": array, "deep": [{"name": "x", "values": array[0]}]}
        )
    )
    np.testing.assert_allclose(loaded["array"], array, rtol=1e-8)  # nine significant digits
    np.testing.assert_allclose(loaded["deep"][0]["values"], array[0], rtol=1e-8)


def test_what_is_not_finite_comes_back_as_nan_and_the_file_is_plain_json(tmp_path):
    path = results.save(
        tmp_path,
        "test",
        Config(),
        {"accuracy": jnp.array([0.5, jnp.nan, jnp.inf]), "diverged": np.array([False, True, True])},
    )
    assert "NaN" not in path.read_text()
    loaded = results.load(tmp_path)
    np.testing.assert_array_equal(loaded["accuracy"], [0.5, np.nan, np.nan])
    assert list(loaded["diverged"]) == [False, True, True]


def test_a_file_says_how_it_was_made_and_not_where(tmp_path):
    document = json.loads(results.save(tmp_path, "test", Config(), {}).read_text())
    assert document["command"] == "gradreg test"
    assert document["config"] == {"gammas": [1.0, 2.0], "data_dir": None}
    assert {"jax", "optax", "numpy", "gradreg-optax", "python"} <= set(document["versions"])
    assert document["machine"]["cores"] == os.cpu_count()
    text = json.dumps(document)
    assert str(tmp_path) not in text
    assert not platform.node() or platform.node() not in text


def test_nothing_but_the_results_is_left_in_the_folder(tmp_path):
    results.save(tmp_path, "test", Config(), {"a": 1})
    results.save(tmp_path, "test", Config(), {"a": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert results.load(tmp_path) == {"a": 2}


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the command without --redraw first"):
        results.load(tmp_path)
