"""The examples run, with settings so small that their numbers mean nothing."""

import os
import pathlib
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
# On a busy machine eight threads may take long to meet: by default XLA aborts after 40 seconds.
PATIENCE = {"XLA_FLAGS": "--xla_cpu_collective_call_terminate_timeout_seconds=240"}


def run(name, *options, **env):
    command = [sys.executable, EXAMPLES / name, *options]
    env = os.environ | PATIENCE | env
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_policy_gradient_compares_three_methods_on_fresh_seeds():
    small = ["--steps=10", "--batch-size=8", "--judged=20", "--seeds=2"]
    out = run("policy_gradient.py", *small, "--gammas=0.01", "--kls=0.1")
    assert out.count("gain over none, paired by seed") == 2
    assert "on the evaluation seeds 2 to 3" in out


@pytest.mark.slow
def test_language_model_resumes_and_reports_pairs(tmp_path):
    pytest.importorskip("flax")
    pytest.importorskip("orbax.checkpoint")
    small = ["--pretraining=1", "--watch-every=1", "--seeds=1", "--batch-size=16", "--epsilon=0.3"]
    options = ["--checkpoints", tmp_path, *small, "--mesh", "2", "1"]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    first = run("language_model.py", *options, "--steps", "1", **cache)
    assert "step 1/1" in first
    again = run("language_model.py", *options, "--steps", "2", **cache)
    assert "resumed at step 1" in again
    assert "step 2/2" in again
    assert "step 1/2" not in again
    assert "with minus without (paired)" in again
