"""One device and eight: the same parameters, and no more communication than the mathematics asks
for.

``eight_devices.py`` trains for ten steps in a process of its own. The collectives are counted in
the compiled program of one step.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def report():
    program = pathlib.Path(__file__).with_name("eight_devices.py")
    # On a busy machine eight threads may take long to meet: by default XLA aborts after 40 seconds.
    patience = {"XLA_FLAGS": "--xla_cpu_collective_call_terminate_timeout_seconds=240"}
    done = subprocess.run(
        [sys.executable, program],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | patience,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


RUNS = [
    *(
        f"{method}, {layout}"
        for method in ("plain", "fd", "groups", "relative")
        for layout in ("data-parallel", "FSDP")
    ),
    "dbp, data-parallel",
    "self-tuned, data-parallel",
    "micro-batches, data-parallel",
    "shard_map, common ascent",
    "shard_map, own ascent",
    *(f"{method}, explicit mesh" for method in ("fd", "groups", "micro-batches", "loss")),
    "loss, data-parallel",
    "loss, FSDP",
    "loss, pmap",
    "loss, shard_map, common ascent",
    "loss, shard_map, own ascent",
]


@pytest.mark.parametrize("run", RUNS)
def test_the_answer_does_not_change_with_the_number_of_devices(report, run):
    # 1e-5 over ten steps: another order of summation in float32, of which gamma / epsilon = 5 is
    # taken and Adam normalizes.
    assert report[run]["error"] < 1e-5
    # Parameters and Adam's moments are replicated or sharded as they were at the start: no silent
    # gathering on one device.
    assert report[run]["stayed"]


@pytest.mark.parametrize(
    ("run", "reductions"),
    [
        ("plain, data-parallel", 1),
        ("fd, data-parallel", 2),
        ("dbp, data-parallel", 2),
        ("relative, data-parallel", 2),
        ("groups, data-parallel", 1),
        ("micro-batches, data-parallel", 2),
        ("shard_map, common ascent", 2),
        ("shard_map, own ascent", 1),
        ("fd, explicit mesh", 2),
        ("groups, explicit mesh", 1),
    ],
)
def test_data_parallel_ascent_takes_two_all_reduces_and_group_ascent_one(report, run, reductions):
    assert report[run]["counts"] == {"all-reduce": reductions}


def test_group_ascent_moves_as_many_elements_as_a_plain_step(report):
    plain, groups, fd = (
        report[f"{method}, data-parallel"]["elements"]["all-reduce"]
        for method in ("plain", "groups", "fd")
    )
    assert groups == plain + 1  # the mean of the groups' squared norms
    assert fd <= 2 * plain


def test_fsdp_takes_the_collectives_of_the_plain_step_twice(report):
    """Parameters are gathered and gradients reduced once for each gradient; the norm's scalars in
    StepInfo do not double."""
    plain, fd, groups = (
        report[f"{method}, FSDP"]["counts"] for method in ("plain", "fd", "groups")
    )
    assert fd["all-gather"] == 2 * plain["all-gather"]
    assert fd["all-reduce"] == 2 * plain["all-reduce"] == 2
    assert max(fd.get("scalars", 0), plain.get("scalars", 0)) <= 2  # for StepInfo.grad_norm
    assert (groups["all-gather"], groups["all-reduce"]) == (2 * plain["all-gather"], 1)


@pytest.mark.parametrize(
    ("option", "parts"),
    [("ascent_groups", "gives 4 parts"), ("penalty_fraction", "keeps 4 samples")],
)
def test_parts_that_an_explicit_mesh_does_not_divide_are_named(report, option, parts):
    said = report["refusals"][option]
    assert said.startswith(f"make_train_step: {option} {parts}, not a multiple of the 8 devices")
    assert "Auto axes" in said
