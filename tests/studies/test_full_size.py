"""Study full-size: tuning never sees the test images, and a finished run is not trained again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradreg_optax.experiments import data, results, runs
from studies import full_size

CONFIG = full_size.Config(
    seeds=2, noises=(0.25,), epochs=1, tuning_size=64, tuning_epochs=1, batch_size=16
)
LABELS = ("SGD", "lazy F-GR", "SAM")


def images(count, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 28, 28), np.uint8), rng.integers(0, 10, count)


DATASET = data.from_arrays("made up", *images(96, 0), *images(32, 1), classes=10)


@pytest.fixture(scope="module", autouse=True)
def little():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(full_size, "WAYS", {label: full_size.WAYS[label] for label in LABELS})
        patch.setattr(data, "load", lambda *_: DATASET)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return dataclasses.replace(CONFIG, output=tmp_path_factory.mktemp("full_size"))


@pytest.fixture(scope="module")
def found(config):
    path = results.save(config.output, "full-size", config, full_size.run(config))
    return results.load(path)


def test_tuning_runs_never_see_the_test_images():
    task = full_size.split(CONFIG, DATASET, "choose", 0.25, 0)
    assert max(*task.rows, *task.test) < len(DATASET.train_x)
    assert not set(task.rows.tolist()) & set(task.test.tolist())
    evaluation = full_size.split(CONFIG, DATASET, "report", 0.25, 0)
    assert sorted(evaluation.rows.tolist()) == list(range(96))
    assert min(evaluation.test) == 96
    assert np.sum(evaluation.labels != DATASET.labels[evaluation.rows]) == 24


def test_augmented_images_are_shifted_and_flipped_copies():
    image = jnp.arange(28 * 28, dtype=jnp.float32).reshape(1, 28, 28, 1) + 1
    flipped = np.asarray(image)[:, :, ::-1]
    both = set()
    for seed in range(20):
        made = np.asarray(full_size.augment(jax.random.key(seed), image))[0, 4:24, 4:24, 0]
        copies = [
            (which, i, j)
            for which, one in enumerate((np.asarray(image), flipped))
            for i in range(2, 7)
            for j in range(2, 7)
            if np.array_equal(one[0, i : i + 20, j : j + 20, 0], made)
        ]
        assert len(copies) == 1
        both.add(copies[0][0])
    assert both == {0, 1}


def test_all_methods_are_paired_and_cost_what_they_evaluate(found):
    reported = runs.by(runs.select(found["runs"], role="report"), "method")
    assert list(reported) == list(LABELS)
    for rows in reported.values():
        assert rows["seed"].tolist() == [0, 1]
        assert np.all(rows["processor_seconds"] > 0)
    cost = {label: rows["gradients"][0] for label, rows in reported.items()}
    assert cost == pytest.approx({"SGD": 1, "lazy F-GR": 1.125, "SAM": 2})


def test_the_coefficient_is_the_best_of_the_tuning_runs(found):
    tried = runs.by(runs.select(found["runs"], role="choose"), "method")
    assert set(tried) == {"lazy F-GR", "SAM"}
    for label, rows in tried.items():
        (value,) = set(runs.select(found["runs"], role="report", method=label)["value"])
        assert value == rows["value"][np.argmax(rows["accuracy"])]


def test_a_second_start_trains_nothing_and_gives_the_same(config, found, monkeypatch):
    monkeypatch.setattr(full_size, "train", None)
    assert results.plain(full_size.run(config)) == results.plain(found)


def test_table_and_figure_show_every_method(found, tmp_path):
    text = full_size.table(found)
    for label in LABELS:
        assert f"\n{label}  " in text
    (path,) = full_size.plot(found, tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")
