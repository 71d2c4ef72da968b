"""One device and eight: the same parameters, and no more communication than the mathematics asks
for.

``eight_devices.py`` trains for four steps in a process of its own. The collectives are counted in
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
    patience = "--xla_cpu_collective_call_terminate_timeout_seconds=240"
    flags = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {patience}"}
    command = [sys.executable, program]
    return json.loads(subprocess.check_output(command, env=os.environ | flags, timeout=500))


def test_the_answer_does_not_change_with_the_number_of_devices(report):
    assert len(report["runs"]) == 14
    for name, run in report["runs"].items():
        # 1e-5 over four steps: another order of summation in float32, of which gamma / epsilon = 5
        # is taken and Adam normalizes.
        assert run["error"] < 1e-5, name
        # Parameters and Adam's moments are replicated or sharded as they were at the start: no
        # silent gathering on one device.
        assert run["stayed"], name


def test_derivatives_in_shard_map_in_every_argument(report):
    assert len(report["derivatives"]) == 6
    for name, error in report["derivatives"].items():
        assert error < 1e-5, name


ALL_REDUCES = {
    "plain, data-parallel": 1,
    "fd, data-parallel": 2,
    "relative, data-parallel": 2,
    "groups, data-parallel": 1,
    "micro-batches, explicit mesh": 2,
    "groups, explicit mesh": 1,
    "loss, shard_map, common ascent": 2,
    "function, shard_map, own ascent": 1,
}


def test_data_parallel_ascent_takes_two_all_reduces_and_group_ascent_one(report):
    for run, expected in ALL_REDUCES.items():
        assert report["runs"][run]["counts"] == {"all-reduce": expected}, run
    plain, groups, fd = (
        report["runs"][f"{method}, data-parallel"]["elements"]["all-reduce"]
        for method in ("plain", "groups", "fd")
    )
    assert groups == plain + 1  # the mean of the groups' squared norms
    assert fd <= 2 * plain


def test_fsdp_takes_the_collectives_of_the_plain_step_twice(report):
    """Parameters are gathered and gradients reduced once for each gradient; the norm's scalars in
    StepInfo do not double."""
    plain, fd, groups = (
        report["runs"][f"{method}, FSDP"]["counts"] for method in ("plain", "fd", "groups")
    )
    assert fd["all-gather"] == 2 * plain["all-gather"]
    assert fd["all-reduce"] == 2 * plain["all-reduce"] == 2
    assert max(fd.get("scalars", 0), plain.get("scalars", 0)) <= 2  # for StepInfo.grad_norm
    assert (groups["all-gather"], groups["all-reduce"]) == (2 * plain["all-gather"], 1)


def test_parts_that_an_explicit_mesh_does_not_divide_are_named(report):
    parts = "ascent_groups gives 4 parts", "penalty_fraction keeps 4 samples"
    for part, said in zip(parts, report["refusals"], strict=True):
        assert said.startswith(f"make_train_step: {part}, not a multiple of the 8 devices")
        assert "Auto axes" in said
