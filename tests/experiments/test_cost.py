"""The cost experiment: its FLOPs, its figure, and the ratios that it reports."""

from pathlib import Path

import numpy as np
import pytest

from gradreg_optax.experiments import cost, results
from gradreg_optax.experiments.timing import interleave, ratio

COMMITTED = Path(__file__).parents[2] / "notebooks" / "results" / "cost" / "results.json"


def test_interleaved_runs_take_turns_and_none_is_always_first():
    order = []
    runs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = interleave(runs, range(3))
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_the_ratio_is_taken_within_rounds_so_that_a_slow_round_cancels():
    machine = np.array([1.0, 10.0, 1.0, 100.0, 1.0])
    found = ratio(2 * machine, machine)
    assert found == (2.0, 2.0, 2.0)
    assert str(found) == "2.00 [2.00, 2.00]"


@pytest.mark.slow
def test_an_mlp_of_equal_layers_costs_three_matrix_products_per_layer(tmp_path, monkeypatch):
    kept = ("SGD", "F-GR", "DB forward-over-reverse", "DB reverse-over-reverse")
    # the others take a minute to compile, and tests/test_cost_counts.py has their FLOPs
    monkeypatch.setattr(cost, "METHODS", {name: cost.METHODS[name] for name in kept})
    sizes = {"depths": (6,), "hidden": 64, "widths": (1,), "image": 4, "batch": 32, "rounds": 2}
    config = cost.Config(output=tmp_path, **sizes)
    found = results.plain(cost.run(config))
    found = results.load(results.save(tmp_path, "cost", config, found))
    mlp = cost.family_costs(found, "mlp")
    counts = dict(zip(mlp["methods"], (mlp["flops"] / mlp["products"])[0] / 6, strict=True))
    # one product less than 3L: the first layer needs no gradient of its input; activations and
    # updates come on top
    assert 3 - 1 / 6 <= counts["SGD"] <= 3.2
    assert counts["F-GR"] == pytest.approx(2 * counts["SGD"], rel=0.02)
    assert 2.7 <= counts["DB forward-over-reverse"] / counts["SGD"] <= 3.05
    assert [path.name for path in cost.plot(found, tmp_path)] == ["cost.png"]
    assert not list((tmp_path / "parts").iterdir())  # the next run measures anew
    printed = cost.table(found)
    assert all(name in printed for name in cost.METHODS)
    assert "DB forward-over-reverse / F-GR" in printed


def test_the_committed_results_hold_the_ratios_of_the_paper():
    found = results.load(COMMITTED, "cost")
    bounds = dict.fromkeys(("F-GR", "B-GR", "SAM"), (1.96, 2.04))
    bounds |= {"DB forward-over-reverse": (2.7, 3.05)}
    # XLA does not merge all convolutions of its forward pass with those of the gradient
    literal = {"mlp": (2.7, 3.05), "resnet": (3.2, 3.4)}
    bounds |= {"C-GR": (2.94, 3.06), "flooding": (0.99, 1.01)}
    for family in cost.AXES:
        costs = cost.family_costs(found, family)
        ratios = costs["flops"] / costs["flops"][:, :1]
        bounds["DB reverse-over-reverse"] = literal[family]
        for name, (low, high) in bounds.items():
            # at three layers the first one's savings are still felt
            of_sizes = ratios[1:, costs["methods"].index(name)]
            assert np.all((low <= of_sizes) & (of_sizes <= high)), (family, name, of_sizes)
