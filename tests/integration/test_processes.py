"""Several processes: ``examples/distributed.py`` on localhost, with JAX's own runtime and gloo
collectives."""

import os
import pathlib
import runpy
import shutil
import socket
import subprocess
import sys
import types

import pytest

from problems import relative_error

PROGRAM = pathlib.Path(__file__).parents[2] / "examples" / "distributed.py"
OPTIONS = ("--steps=12", "--save-every=6", "--log-every=6", "--batch-size=32")


@pytest.fixture(scope="module")
def example():
    return types.SimpleNamespace(**runpy.run_path(PROGRAM))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def in_two_processes(folder):
    """What process 0 printed in twelve steps on two processes, which do not outlive the test."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    coordinator = f"--coordinator=127.0.0.1:{free_port()}"
    command = [sys.executable, PROGRAM, f"--checkpoints={folder}", "--distributed", coordinator]
    command += ["--processes=2", *OPTIONS]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [
        subprocess.Popen([*command, f"--process={number}"], env=environment, **pipes)
        for number in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)
    return outputs[0].splitlines()


@pytest.mark.slow
def test_two_processes_and_one_end_at_the_same_parameters_also_after_a_restart(
    example, tmp_path, capsys
):
    def trained_here(folder):
        """The state after the same steps in this process, from a checkpoint if there is one."""
        options = [f"--checkpoints={tmp_path / folder}", *OPTIONS]
        return example.train(example.parse_arguments(options))

    printed = in_two_processes(tmp_path / "two")
    alone = trained_here("one")
    report = [line.split("  ")[:3] for line in capsys.readouterr().out.splitlines()]
    assert report == [line.split("  ")[:3] for line in printed if line.startswith("step")]
    together = trained_here("two")  # nothing left to do: restores the last checkpoint
    assert int(together["train"].step) == 12
    shutil.copytree(tmp_path / "two" / "6", tmp_path / "resumed" / "6")
    capsys.readouterr()
    resumed = trained_here("resumed")
    assert "step 12/12" in capsys.readouterr().out
    # 1e-5 over twelve and six steps: the mean over the batch is summed in another order.
    for other in (alone, resumed):
        assert relative_error(other["train"].params, together["train"].params) < 1e-5


def test_the_example_explains_itself(example, capsys):
    with pytest.raises(SystemExit):
        example.parse_arguments(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "srun python distributed.py --distributed" in shown
    assert "regularization coefficient after the warm-up (0.05)" in shown
