"""Command lines of ``gradreg`` and ``python -m studies``."""

import csv
import dataclasses
import importlib.metadata
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gradreg_optax.__main__ import PROGRAM
from gradreg_optax.experiments import cli, results
from gradreg_optax.experiments.common import CommandError
from studies.__main__ import PROGRAM as STUDIES

ROOT = Path(__file__).parents[2]
COMMITTED = [*(ROOT / "notebooks/results").iterdir(), *(ROOT / "studies/results").iterdir()]
COMMANDS = [(program, name) for program in (PROGRAM, STUDIES) for name in program.commands]
every_command = pytest.mark.parametrize(("program", "command"), COMMANDS, ids=lambda v: str(v)[:9])


def run(*arguments):
    cli.run(PROGRAM, arguments)


def refused(*arguments):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code != 0
    return str(stop.value.code)


@pytest.mark.parametrize("program", [PROGRAM, STUDIES])
def test_help_lists_every_command_with_what_it_does(program, capsys):
    shown = []
    for option in ("--help", "-h", "--version"):
        with pytest.raises(SystemExit) as stop:
            cli.run(program, [option])
        assert not stop.value.code
        shown.append(" ".join(capsys.readouterr().out.split()))
    assert shown[0] == shown[1]
    assert "--version" in shown[0]
    for name, command in program.commands.items():
        assert f"{name} {command.summary}" in shown[0]
    assert shown[2] == f"{program.name} {importlib.metadata.version('gradreg-optax')}"


@every_command
def test_help_of_a_command_names_every_field_its_duration_and_an_example(program, command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(program, [command, "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(program.module(command).Config):
        assert f"--{field.name.replace('_', '-')}" in text
    assert f"results/{command.replace('-', '_')}" in text or f"results/{command}" in text
    assert program.commands[command].duration in text
    assert f"{program.name} {command} {program.commands[command].example}" in text


@every_command
def test_every_command_keeps_the_contract(program, command):
    module = program.module(command)
    config = module.Config()
    assert (config.seed, config.redraw) == (0, False)
    assert all(callable(getattr(module, name)) for name in ("run", "table", "plot"))
    name, chosen = cli.parse(program, [command, *shlex.split(program.commands[command].example)])
    assert name == command
    assert chosen != config
    for field in dataclasses.fields(config):
        several = field.type == tuple[int, ...]
        if several or field.type in (int, int | None):
            wrong = -1 if field.name in config.from_zero else 0
            with pytest.raises(CommandError, match=rf"^{field.name} must be at least [012], got"):
                dataclasses.replace(config, **{field.name: (wrong,) if several else wrong})


OTHERS = [f"gradreg {name}" for name in PROGRAM.commands if name != "compare"]


@pytest.mark.parametrize(
    ("arguments", "shown", "absent"),
    [
        (["comprae"], ["no command 'comprae'. Did you mean 'compare'?"], []),
        (["train"], ["invalid choice: 'train'", *PROGRAM.commands], []),
        ([], ["a command is required", *PROGRAM.commands], []),
        (["compare", "--sedes", "3"], ["--seeds", "gradreg compare --help"], OTHERS),
        (["sweep", "--model", "vit"], ["--model"], []),
        (["compare", "--steps", "many"], ["--steps"], []),
        (["sweep", "--gammas", "-1"], ["gammas must", "gradreg sweep --help"], ["Config"]),
        (["sweep", "--gammas"], ["gammas must", "gradreg sweep --help"], ["Config"]),
    ],
)
def test_a_wrong_command_line_is_refused_with_a_remedy(
    arguments, shown, absent, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    text = refused(*arguments) + "".join(capsys.readouterr())
    assert [word for word in shown if word not in text] == []
    assert [word for word in absent if word in text] == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["sweep", "--dataset", "imagenet"],
            "gradreg sweep: dataset must be some of digits, mnist1d, got im",
        ),
        (
            ["sweep", "--batch-size", "500"],
            "gradreg sweep: batch_size must be at most 300, the numb",
        ),
        (["compare", "--train-size", "2000"], "gradreg compare: train_size must be between 1 and"),
        (["compare", "--redraw"], "gradreg compare: no results at "),
    ],
)
def test_inconsistent_settings_are_a_one_line_error(arguments, message, tmp_path):
    error = refused(*arguments, "--output", str(tmp_path))
    assert error.startswith(message)
    assert "\n" not in error


def test_an_unwritable_output_names_its_option_before_the_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(PROGRAM.module("compare"), "run", None)
    for place in ("file", "file/folder"):
        error = refused("compare", "--output", str(tmp_path / place))
        assert error.startswith("gradreg compare: cannot write to")
        assert "--output" in error


@pytest.mark.parametrize("command", PROGRAM.commands)
def test_every_command_draws_its_results_in_the_wanted_format_without_a_run(
    command, tmp_path, monkeypatch, capsys
):
    module = PROGRAM.module(command)
    monkeypatch.setattr(module, "run", None)
    name = {"sweep": "sweep_digits_others"}.get(command, command.replace("-", "_"))
    shutil.copy(ROOT / "notebooks/results" / name / "results.json", tmp_path)
    run(command, "--redraw", "--output", str(tmp_path), "--format", "svg")
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".csv", ".svg"}
    table = module.table(results.load(tmp_path, command))
    assert str(table) in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert len(rows) == sum(len(part.rows) for part in table.tables)
    assert not [value for row in rows for value in row.values() if "object at" in value]


@every_command
def test_results_without_the_tables_columns_are_refused(program, command, tmp_path):
    made = f"{program.name} {command}"
    results.save(tmp_path, made, program.module(command).Config(), {"runs": {"seed": [1]}})
    with pytest.raises(SystemExit, match=f"does not hold results of this version of {made}"):
        cli.run(program, [command, "--redraw", "--output", str(tmp_path)])


def test_an_unexpected_error_keeps_its_traceback(tmp_path, monkeypatch):
    def fail(config):
        raise ValueError("a bug")

    monkeypatch.setattr(PROGRAM.module("sweep"), "run", fail)
    with pytest.raises(ValueError, match="a bug"):
        run("sweep", "--output", str(tmp_path))


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_no_jax_and_take_less_than_half_a_second(option):
    code = """
import atexit, sys, gradreg_optax.__main__ as program
atexit.register(lambda: print({"jax", "numpy", "tyro"} & set(sys.modules)))
program.main()
"""
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code, option], check=True, capture_output=True)
    assert done.stdout.endswith(b"set()\n")
    after = os.times()  # processor time, which a busy machine does not change
    used = after.children_user + after.children_system
    assert used - before.children_user - before.children_system < 0.5


def test_a_closed_pipe_is_no_error(tmp_path, monkeypatch):
    shutil.copy(ROOT / "notebooks/results/sweep_digits_others/results.json", tmp_path)
    read, write = os.pipe()
    os.close(read)  # as head does after its lines
    with os.fdopen(write, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        run("sweep", "--redraw", "--output", str(tmp_path))
        monkeypatch.undo()
    assert (tmp_path / "sweep.png").exists()


SMALL = ["--train-size", "40", "--test-size", "20", "--seeds", "1", "--datasets", "digits"]


@pytest.mark.parametrize(
    ("seconds", "times"),
    [(2.0, 2), *(pytest.param(0.7 * i, 1 + i % 2, marks=pytest.mark.slow) for i in range(1, 11))],
)
def test_an_interrupt_at_any_time_exits_with_130_and_without_a_traceback(seconds, times, tmp_path):
    command = [sys.executable, "-m", "gradreg_optax", "compare", *SMALL, "--output", tmp_path]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        time.sleep(seconds)
        for _ in range(times):  # a terminal and uv both send one
            process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=30)[1].decode()
    assert process.returncode == 130
    assert "interrupted: finished parts are kept. Run the same command to resume." in error
    for word in ("Traceback", "terminate", "FATAL", "Exception"):
        assert word not in error
    for part in tmp_path.glob("parts/*.json"):  # no finished part is cut
        json.loads(part.read_text())


def test_a_run_without_a_terminal_shows_no_progress(tmp_path, capsys):
    sizes = ["--train-size", "20", "--test-size", "20", "--steps", "2", "--batch-size", "10"]
    seeds = ["--seeds", "1", "--report-seeds", "1", "--methods", "SGD", "--width", "2"]
    run("sweep", *sizes, *seeds, "--output", str(tmp_path))
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "\r" not in shown.out
    assert "runs" in results.load(tmp_path, "sweep")


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda path: path.name)
def test_committed_results_redraw(folder):
    called, command = json.loads((folder / "results.json").read_text())["command"].rsplit(" ", 1)
    program = {"gradreg": PROGRAM, STUDIES.name: STUDIES}[called]
    assert str(program.module(command).table(results.load(folder, command)))


@pytest.mark.parametrize("package", ["tyro", "matplotlib"])
def test_without_a_package_the_command_names_the_extra_before_the_training(package):
    code = f"import sys; sys.modules['{package}'] = None"
    code += "; import gradreg_optax.__main__ as program; program.main()"
    command = [sys.executable, "-c", code, "compare"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert 'pip install "gradreg-optax[experiments]"' in done.stderr
    assert "Traceback" not in done.stderr
