"""Several processes: ``examples/distributed.py`` on localhost, with JAX's own runtime and gloo
collectives."""

import contextlib
import importlib.util
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

PROGRAM = pathlib.Path(__file__).parents[2] / "examples" / "distributed.py"
OPTIONS = ("--steps=12", "--save-every=6", "--log-every=6", "--batch-size=32")


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("distributed_example", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def processes(count, *options):
    """``count`` processes of the example, one CPU device each; in every case, no process
    outlives the test."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    command = [
        sys.executable,
        PROGRAM,
        "--distributed",
        f"--coordinator=127.0.0.1:{free_port()}",
        f"--processes={count}",
        *options,
    ]
    started = []
    try:
        for number in range(count):
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            started.append(
                subprocess.Popen([*command, f"--process={number}"], env=environment, **pipes)
            )
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()
            process.stdout.close()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """(folder of the checkpoints, what process 0 printed) of twelve steps on two processes."""
    folder = tmp_path_factory.mktemp("two")
    with processes(2, f"--checkpoints={folder}", *OPTIONS) as started:
        outputs = [process.communicate(timeout=240)[0] for process in started]
        assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    return folder, outputs[0]


def trained_here(example, folder):
    """The state after the same steps in this process, which resumes from ``folder`` if it holds a
    checkpoint."""
    return example.train(example.parse_arguments([f"--checkpoints={folder}", *OPTIONS]))


def vector(state):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state["train"].params)])


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.slow
def test_two_processes_and_one_end_at_the_same_parameters(example, two_processes, tmp_path, capsys):
    folder, printed = two_processes
    alone = trained_here(example, tmp_path)
    together = trained_here(example, folder)  # nothing left to do: restores the last checkpoint
    # 1e-5 over twelve steps: the mean over the batch is summed in another order.
    assert relative(vector(together), vector(alone)) < 1e-5
    assert int(together["train"].step) == 12
    report = [line.split("  ")[:3] for line in capsys.readouterr().out.splitlines()]
    assert report == [
        line.split("  ")[:3] for line in printed.splitlines() if line.startswith("step")
    ]


@pytest.mark.slow
def test_one_process_resumes_what_two_have_begun(example, two_processes, tmp_path, capsys):
    folder, _ = two_processes
    shutil.copytree(folder / "6", tmp_path / "6")
    resumed = trained_here(example, tmp_path)
    assert "step 12/12" in capsys.readouterr().out
    # 1e-5: six further steps with another order of summation.
    assert relative(vector(resumed), vector(trained_here(example, folder))) < 1e-5


def test_the_example_explains_itself(example, capsys):
    with pytest.raises(SystemExit):
        example.parse_arguments(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "srun python distributed.py --distributed" in shown
    assert "regularization coefficient after the warm-up (0.05)" in shown
