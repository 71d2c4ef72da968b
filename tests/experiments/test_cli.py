import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from gradreg_optax.experiments import cli, results
from gradreg_optax.experiments.cli import COMMANDS
from gradreg_optax.experiments.common import CommandError

COMMITTED = Path(__file__).parents[2] / "notebooks" / "results"


def test_help_lists_every_command_with_what_it_does(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in COMMANDS:
        assert name in text


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_of_a_command_names_every_field_and_its_default(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(COMMANDS[command].Config):
        assert f"--{field.name.replace('_', '-')}" in text
    assert f"results/{command.replace('-', '_')}" in text or f"results/{command}" in text


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_keeps_the_contract(command):
    module = COMMANDS[command]
    fields = {field.name: field.default for field in dataclasses.fields(module.Config)}
    assert {"output", "seed", "redraw"} <= set(fields)
    assert (fields["seed"], fields["redraw"]) == (0, False)
    assert all(callable(getattr(module, name)) for name in ("run", "table", "plot"))


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_what_counts_something_is_no_zero_and_nothing_is_negative(command):
    config = COMMANDS[command].Config()
    for field in dataclasses.fields(config):
        several = field.type == tuple[int, ...]
        if not several and field.type not in (int, int | None):
            continue
        wrong = -1 if field.name in config.from_zero else 0
        with pytest.raises(CommandError, match=rf"^{field.name} must be at least [012], got"):
            dataclasses.replace(config, **{field.name: (wrong,) if several else wrong})


@pytest.mark.parametrize(
    "arguments", [["compar"], ["sweep", "--model", "vit"], ["compare", "--steps", "many"], []]
)
def test_a_wrong_command_line_stops_with_a_message(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(arguments)
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert (shown.err + shown.out).strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "--dataset", "imagenet"], "gradreg sweep: unknown data set 'imagenet'"),
        (
            ["sweep", "--dataset", "fashion-mnist", "--data-dir", "nowhere"],
            "gradreg sweep: fashion-mnist: no train-images",
        ),
        (
            ["sweep", "--batch-size", "500"],
            "gradreg sweep: batch_size must not exceed the 300 training samples",
        ),
        (["compare", "--train-size", "2000"], "gradreg compare: train_size must lie between 1 and"),
        (
            ["compare", "--redraw"],
            "gradreg compare: no results at .*run the command without --redraw first",
        ),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        cli.run([*arguments, "--output", str(tmp_path)])


def test_a_figure_is_redrawn_without_the_run(tmp_path, monkeypatch, capsys):
    module = COMMANDS["sweep"]
    rows = {
        "role": ["choose", "choose", "report", "report"],
        "method": ["SGD"] * 4,
        "seed": [0, 1, 2, 3],
        "gradients": [1] * 4,
        "accuracy": [0.5, 0.7, 0.6, 0.8],
        "diverged": [False] * 4,
    }
    found = {"dataset": "digits", "runs": rows}
    results.save(tmp_path, "sweep", module.Config(), found)
    monkeypatch.setattr(module, "run", None)
    cli.run(["sweep", "--redraw", "--output", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "70.00 ± 10.00" in shown
    assert (tmp_path / "sweep.png").exists()

    (tmp_path / "sweep.png").unlink()
    with pytest.raises(
        SystemExit, match=r"holds results of 'gradreg sweep', not of 'gradreg cost'"
    ):
        cli.run(["cost", "--redraw", "--output", str(tmp_path)])


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_results_without_what_is_drawn_are_named(command, tmp_path):
    results.save(tmp_path, command, COMMANDS[command].Config(), {"runs": {"seed": [1]}})
    with pytest.raises(SystemExit, match=f"does not hold what gradreg {command} draws"):
        cli.run([command, "--redraw", "--output", str(tmp_path)])


@pytest.mark.parametrize("kept", [0, 3])
def test_an_interrupted_run_says_that_the_same_command_goes_on(tmp_path, monkeypatch, capsys, kept):
    def interrupt(config):
        for i in range(kept):
            results.write(config.output / "parts" / f"{i}.json", {})
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS["sweep"], "run", interrupt)
    with pytest.raises(SystemExit) as stop:
        cli.run(["sweep", "--output", str(tmp_path)])
    assert stop.value.code == 130
    said = capsys.readouterr().err
    assert f"{kept} finished parts are in" in said
    assert "the same command goes on where it stopped" in said


@pytest.mark.parametrize("place", ["file", "file/folder"])
def test_a_folder_that_cannot_be_made_is_named_before_the_training(tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(COMMANDS["compare"], "run", None)
    with pytest.raises(SystemExit, match=r"gradreg compare: .*file.* cannot be written to"):
        cli.run(["compare", "--output", str(tmp_path / place)])


@pytest.mark.parametrize("arguments", [["sweep", "--gammas", "-1"], ["sweep", "--gammas"]])
def test_values_that_cannot_be_stop_with_a_message(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run([*arguments, "--output", str(tmp_path)])
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert "gammas must" in shown.err + shown.out
    assert not list(tmp_path.iterdir())


def test_an_error_that_is_not_the_commands_own_keeps_its_trace(tmp_path, monkeypatch):
    def fail(config):
        raise ValueError("a fault of the program")

    monkeypatch.setattr(COMMANDS["sweep"], "run", fail)
    with pytest.raises(ValueError, match="a fault of the program"):
        cli.run(["sweep", "--output", str(tmp_path)])


def test_the_version_is_that_of_the_package(capsys):
    cli.run(["--version"])
    assert capsys.readouterr().out == f"gradreg {importlib.metadata.version('gradreg-optax')}\n"


def test_a_reader_that_has_seen_enough_is_no_error():
    command = [sys.executable, "-m", "gradreg_optax", "sweep", "--redraw", "--output"]
    read, write = os.pipe()
    os.close(read)  # as head does after its lines
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(COMMITTED / "sweep_digits" / "results.json", folder)
        done = subprocess.run(
            [*command, folder], stdout=write, stderr=subprocess.PIPE, timeout=120, check=False
        )
        assert (Path(folder) / "sweep.png").exists()
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_run_without_a_terminal_shows_no_progress(tmp_path, capsys):
    sizes = ["--train-size", "20", "--test-size", "20", "--steps", "2", "--batch-size", "10"]
    seeds = ["--seeds", "1", "--report-seeds", "1", "--methods", "SGD", "--width", "2"]
    cli.run(["sweep", *sizes, *seeds, "--output", str(tmp_path)])
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "\r" not in shown.out
    assert "figure:" in shown.out
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["sources"] == results.sources()


@pytest.mark.parametrize("folder", sorted(path.name for path in COMMITTED.iterdir()))
def test_the_committed_results_are_those_of_their_commands(folder):
    document = json.loads((COMMITTED / folder / "results.json").read_text())
    command = document["command"].removeprefix("gradreg ")
    assert COMMANDS[command].table(results.load(COMMITTED / folder, command))


def test_without_matplotlib_the_command_names_the_extra():
    code = (
        "import sys; sys.modules['matplotlib'] = None; from gradreg_optax.__main__ import main;"
        " main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert 'pip install "gradreg-optax[experiments]"' in done.stderr
    assert "Traceback" not in done.stderr
