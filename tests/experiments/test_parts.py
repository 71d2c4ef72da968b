"""Parts on disk: made once, found again, and never under another name's numbers."""

import dataclasses

import numpy as np
import pytest

from gradreg_optax.experiments import data, parts


def test_the_fingerprint_sees_every_label():
    digits = data.load("digits")
    labels = digits.train_y.copy()
    labels[-1] += 1
    assert parts.fingerprint(digits) != parts.fingerprint(
        dataclasses.replace(digits, train_y=labels)
    )


def test_a_part_is_made_once_and_comes_back_with_its_nans(tmp_path):
    seen, done = [], []

    def make():
        seen.append(1)
        return {"accuracy": np.array([0.5, np.nan]), "norm": np.array([[1.0, 2.0]])}

    for _ in range(2):
        kept = parts.Parts(tmp_path, data.load("digits"), lambda: done.append(1)).keep(
            "F-GR", {"gamma": 1.0}, make
        )
        np.testing.assert_array_equal(kept["accuracy"], [0.5, np.nan])
        np.testing.assert_array_equal(kept["norm"], [[1.0, 2.0]])
    assert (len(seen), len(done)) == (1, 2)
    assert [path.name.startswith("F-GR-") for path in (tmp_path / "parts").iterdir()] == [True]


@pytest.mark.parametrize(
    ("label", "what"),
    [
        ("DB", {"gamma": 1.0}),
        ("F-GR", {"gamma": 2.0}),
        ("F-GR", {"gamma": 1.0, "seeds": np.arange(2)}),
    ],
)
def test_what_the_numbers_depend_on_makes_another_part(tmp_path, label, what):
    keep = parts.Parts(tmp_path, data.load("digits"), lambda: None).keep
    keep("F-GR", {"gamma": 1.0}, lambda: {"accuracy": np.zeros(1)})
    assert keep(label, what, lambda: {"accuracy": np.ones(1)})["accuracy"] == 1
