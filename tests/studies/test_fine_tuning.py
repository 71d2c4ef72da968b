"""Study fine-tuning: the halves share no class, LoRA starts at the pretrained network, and the
settings are those of the tuning seeds."""

import jax
import jax.numpy as jnp
import numpy as np

from gradreg_optax.experiments import runs
from studies import fashion_mnist, fine_tuning, networks
from study import TunedStudy, images, patched

CONFIG = fine_tuning.Config(
    seeds=2, choose_seeds=1, labels=(4,), steps=3, pretraining_steps=2, validation_size=20
)
LABELS = (fine_tuning.PLAIN, "lazy F-GR", "SAM", "self-tuned")


DATASET = images(160, 40)
HALVES = fine_tuning.halves(DATASET)

small = patched(
    (fine_tuning, "WAYS", {label: fine_tuning.WAYS[label] for label in LABELS}),
    (fashion_mnist, "load", lambda *_: DATASET),
)


def test_the_halves_are_different_classes_that_count_from_zero():
    assert set(HALVES.first[1]) == set(HALVES.second[1]) == set(HALVES.test[1]) == set(range(5))
    np.testing.assert_array_equal(HALVES.second[0], DATASET.train_x[DATASET.train_y >= 5])
    np.testing.assert_array_equal(HALVES.first[0], DATASET.train_x[DATASET.train_y < 5])


def test_a_seed_draws_the_same_number_of_each_class_and_validates_on_others():
    lab = fine_tuning.Lab(CONFIG, HALVES)
    drawn, (held_out, labels) = lab.split("choose", 4, 0)
    assert np.bincount(HALVES.second[1][drawn]).tolist() == [4] * 5
    seen = {image.tobytes() for image in HALVES.second[0][drawn]}
    assert not seen & {image.tobytes() for image in held_out}
    assert len(labels) == 20
    again, test = lab.split("report", 4, 0)
    np.testing.assert_array_equal(again, drawn)
    assert test is HALVES.test


def test_low_rank_updates_start_at_the_pretrained_layers_and_move_no_other():
    base = jax.jit(networks.strided_cnn(5, (4, 8), norm=False).init)(jax.random.key(0))
    start = fine_tuning.start_of("LoRA", base, jax.random.key(1))
    adapted = fine_tuning.adapted(start, base)
    for layer, kept in zip(adapted["layers"], base["layers"], strict=True):
        np.testing.assert_array_equal(layer["kernel"], kept["kernel"])
    rng = np.random.default_rng(2)
    moved = jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), start["low_rank"])
    changed = fine_tuning.adapted(start | {"low_rank": moved}, base)
    change = changed["layers"][1]["kernel"] - base["layers"][1]["kernel"]
    assert np.linalg.matrix_rank(np.asarray(change)) == fine_tuning.RANK
    sizes = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (start, base))
    assert next(sizes) < next(sizes)

    lab = fine_tuning.Lab(CONFIG, HALVES)
    lab.base = lambda: base
    run = lab.program("LoRA", fine_tuning.WAYS[fine_tuning.PLAIN])
    params = run(jax.random.key(0), jnp.array([1e-2, 0.0, 0.0]), jnp.arange(20), 20, 2)
    assert set(params) == {"low_rank", "head"}
    assert all(np.any(layer["up"]) for layer in params["low_rank"])


class TestStudy(TunedStudy):
    study = fine_tuning
    trains = fine_tuning.Lab, "train"
    rows = LABELS
    among = "layers", "labels", "method"

    def test_all_methods_use_the_optimizer_that_is_best_without_a_penalty(self, found):
        names = ("learning_rate", "weight_decay")
        for _, rows in runs.groups(found["runs"], "layers", "labels"):
            best = runs.best(runs.select(rows, role="choose", method=fine_tuning.PLAIN), *names)
            reported = runs.select(rows, role="report")
            assert {name: set(reported[name]) for name in names} == {n: {best[n]} for n in names}
