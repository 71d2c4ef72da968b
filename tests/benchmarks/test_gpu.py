"""The GPU benchmark runs at toy size on a CPU and writes what it measured."""

import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu, networks
from benchmarks.report import noise


@pytest.mark.slow
def test_toy_run_has_times_of_every_method_in_both_precisions_and_a_sweep(tmp_path, capsys):
    gpu.main(gpu.Config(output=tmp_path, size="toy", rounds=2))
    document = json.loads((tmp_path / "gpu.json").read_text())
    cases = itertools.product(gpu.SIZES["toy"], ("float32", "bfloat16"))
    assert set(document["steps"]) == {", ".join(case) for case in cases}
    for found in document["steps"].values():
        assert set(found["methods"]) == set(gpu.METHODS)
        assert not found["failed"]
        for row in found["methods"].values():
            assert len(row["seconds"]) == 2
            assert row["flops"] > 0
    assert set(document["sweep"]["runs"]["method"]) == set(gpu.GRID["methods"])
    assert "1 tuning seeds" in capsys.readouterr().out


def test_the_noise_covers_the_true_median_nineteen_times_in_twenty():
    rng = np.random.default_rng(0)
    samples = rng.lognormal(sigma=0.1, size=(400, 30))
    found = np.array([noise(sample) for sample in samples])
    # the interval lies unevenly around the median
    assert np.mean(np.abs(np.median(samples, axis=1) - 1) <= 2 * found) >= 0.95
    # the standard deviation of a median is 1.25 sigma / sqrt(n)
    assert np.mean(found) == pytest.approx(0.1 * 1.25 * 1.96 / np.sqrt(30), rel=0.3)


@pytest.mark.parametrize(
    "name",
    [
        name if "residual" not in name else pytest.param(name, marks=pytest.mark.slow)
        for name in gpu.SIZES["toy"]
    ],
)
def test_bfloat16_computes_in_bfloat16_and_returns_gradients_in_float32(name):
    problem = gpu.BUILDERS[name]("bfloat16", gpu.SIZES["toy"][name])
    gradient = jax.eval_shape(jax.grad(problem.loss_fn), problem.params, problem.batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    text = jax.jit(problem.loss_fn).lower(problem.params, problem.batch).as_text()
    products = [line for line in text.splitlines() if re.search(r"dot_general|convolution\(", line)]
    assert products
    assert all("bf16" in line for line in products)


@pytest.mark.slow
def test_the_sizes_of_the_cpu_benchmark_are_those_of_its_table():
    for name, shape in networks.SHAPES.items():
        problem = networks.problem(name)
        assert jax.tree.leaves(problem.batch)[0].shape[0] == shape[0]
