"""Study full-size: tuning never sees the test images, and a finished run is not trained again."""

import itertools

import jax
import numpy as np
import pytest

from gradreg_optax.experiments import runs
from studies import fashion_mnist, full_size
from study import TunedStudy, images, patched

CONFIG = full_size.Config(
    seeds=2, noises=(0.25,), epochs=1, tuning_size=64, tuning_epochs=1, batch_size=16
)
LABELS = ("SGD", "lazy F-GR", "SAM")


DATASET = images(96, 32)

little = patched(
    (full_size, "WAYS", {label: full_size.WAYS[label] for label in LABELS}),
    (fashion_mnist, "load", lambda *_: DATASET),
)


def test_tuning_runs_never_see_the_test_images():
    task = full_size.split(CONFIG, DATASET, "choose", 0.25, 0)
    assert max(*task.rows, *task.test) < len(DATASET.train_x)
    assert not set(task.rows.tolist()) & set(task.test.tolist())
    evaluation = full_size.split(CONFIG, DATASET, "report", 0.25, 0)
    assert sorted(evaluation.rows.tolist()) == list(range(96))
    assert min(evaluation.test) == 96
    assert np.sum(evaluation.labels != DATASET.labels[evaluation.rows]) == 24


def test_augmented_images_are_shifted_and_flipped_copies():
    image = np.arange(28 * 28, dtype=np.float32).reshape(28, 28) + 1
    copies = np.repeat(image[None, :, :, None], 20, axis=0)
    both = set()
    for made in np.asarray(full_size.augment(jax.random.key(0), copies))[:, 4:24, 4:24, 0]:
        (found,) = [
            which
            for which, one in enumerate((image, image[:, ::-1]))
            for i, j in itertools.product(range(2, 7), repeat=2)
            if np.array_equal(one[i : i + 20, j : j + 20], made)
        ]
        both.add(found)
    assert both == {0, 1}


class TestStudy(TunedStudy):
    study = full_size
    trains = full_size, "train"
    rows = LABELS
    among = ("method",)

    def test_all_methods_cost_what_they_evaluate(self, found):
        reported = runs.by(runs.select(found["runs"], role="report"), "method")
        assert all(np.all(rows["processor_seconds"] > 0) for rows in reported.values())
        cost = {label: rows["gradients"][0] for label, rows in reported.items()}
        assert cost == pytest.approx({"SGD": 1, "lazy F-GR": 1.125, "SAM": 2})
