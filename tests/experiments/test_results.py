import dataclasses
import errno
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
from gradreg_optax.experiments.common import CommandError

FLOATS = st.floats(-1e6, 1e6)


@dataclasses.dataclass(frozen=True)
class Config:
    output: Path = Path("somewhere")
    gammas: tuple[float, ...] = (1.0, 2.0)
    data_dir: Path | None = None


@given(hnp.arrays(np.float64, hnp.array_shapes(max_dims=3, max_side=4), elements=FLOATS))
def test_what_is_saved_is_loaded_to_nine_digits(tmp_path_factory, array):
    made = {"array": array, "deep": [{"name": "x", "values": array[0]}]}
    loaded = results.load(results.save(tmp_path_factory.mktemp("a"), "test", Config(), made))
    np.testing.assert_allclose(loaded["array"], array, rtol=1e-8)
    np.testing.assert_allclose(loaded["deep"][0]["values"], array[0], rtol=1e-8)


def test_what_is_not_finite_comes_back_as_nan_and_the_file_is_plain_json(tmp_path):
    made = {"accuracy": jnp.array([0.5, jnp.nan, jnp.inf]), "column": np.arange(1000)}
    text = results.save(tmp_path, "test", Config(), made).read_text()
    assert "NaN" not in text
    assert len(text.splitlines()) < 40  # a column is one line
    np.testing.assert_array_equal(results.load(tmp_path)["accuracy"], [0.5, np.nan, np.nan])


def test_a_file_holds_how_it_was_made_and_no_paths(tmp_path):
    document = json.loads(results.save(tmp_path, "gradreg test", Config(), {}).read_text())
    assert document["command"] == "gradreg test"
    assert document["config"] == {"gammas": [1.0, 2.0], "data_dir": None}
    assert document["sources"] == results.sources()
    assert {"jax", "optax", "numpy", "gradreg-optax", "python"} <= set(document["versions"])
    assert document["machine"]["cores"] == os.cpu_count()
    text = json.dumps(document)
    assert str(tmp_path) not in text
    assert not platform.node() or platform.node() not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"command": "gradreg test", "layout"', "results.json is broken"),
        ("[1, 2]", "results.json is broken"),
        ('{"results": {}}', "results.json is broken"),
        ('{"command": "gradreg cost", "results": {}}', "of 'gradreg cost', not of"),
        (b"\xff\xfe\x00", "results.json is broken"),
    ],
)
def test_a_broken_file_and_one_of_another_command_are_named(tmp_path, content, message):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(CommandError, match=message):
        results.load(tmp_path, "test")


def test_booleans_large_integers_strings_and_lists_survive(tmp_path):
    written = {
        "truth": np.bool_(True),
        "large": np.int64(2**62 + 1),
        "larger": 2**70,
        "truths": np.array([True, False]),
        "integers": np.array([2**62 + 1, -(2**62) - 1]),
        "unsigned": np.array([2**64 - 1], np.uint64),
        "strings": np.array(["SGD", ""]),
        "single": np.float32(0.5),
        "brackets": ["a [ b", "c ] d", "e,\n f"],
        "empty": [],
    }
    loaded = results.load(results.save(tmp_path, "test", Config(), written | {"ragged": [[1], []]}))
    for name, value in written.items():
        assert np.asarray(loaded[name]).tolist() == np.asarray(value).tolist()
    assert [list(row) for row in loaded["ragged"]] == [[1], []]


def test_a_full_disk_is_an_error_and_leaves_no_file(tmp_path, monkeypatch):
    def full(self, text):
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CommandError, match=r"cannot write to .*No space left"):
        results.save(tmp_path, "test", Config(), {})
    assert not list(tmp_path.iterdir())


def test_a_second_save_replaces_the_first_and_leaves_nothing_else(tmp_path):
    with pytest.raises(CommandError, match="Run the command without --redraw first"):
        results.load(tmp_path)
    for value in (1, 2):
        results.save(tmp_path, "test", Config(), {"a": value})
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert results.load(tmp_path) == {"a": 2}
