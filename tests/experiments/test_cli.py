import dataclasses
import subprocess
import sys

import pytest

from gradreg_optax.experiments import cli, results
from gradreg_optax.experiments.registry import COMMANDS


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
            ["sweep", "--dataset", "mnist", "--data-dir", "nowhere"],
            "gradreg sweep: mnist: no train-images",
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
    method = {
        "label": "SGD",
        "settings": {},
        "accuracy": [[0.5, 0.7]],
        "diverged": [[0.0, 0.0]],
        "chosen": 0,
        "report": {"accuracy": [0.6, 0.8]},
    }
    found = {"dataset": "digits", "seeds": [0, 1], "report_seeds": [2, 3], "methods": [method]}
    results.save(tmp_path, "sweep", module.Config(), found)
    monkeypatch.setattr(module, "run", None)
    cli.run(["sweep", "--redraw", "--output", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "70.00 ± 10.00" in shown
    assert (tmp_path / "sweep.png").exists()


def test_an_interrupted_run_ends_without_a_traceback(tmp_path, monkeypatch):
    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS["sweep"], "run", interrupt)
    with pytest.raises(SystemExit) as stop:
        cli.run(["sweep", "--output", str(tmp_path)])
    assert stop.value.code == 130


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
