"""Command lines of ``gradreg`` and ``python -m studies``."""

import csv
import dataclasses
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
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
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_lists_every_command_with_what_it_does(program, option, capsys):
    cli.run(program, [option])
    text = capsys.readouterr().out
    assert "--version" in text
    for name, command in program.commands.items():
        assert name in text
        assert command.summary in text


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
def test_the_example_of_a_command_parses(program, command):
    import shlex

    example = shlex.split(program.commands[command].example)
    name, config = cli.parse(program, [command, *example])
    assert name == command
    assert config != program.module(command).Config()


@every_command
def test_every_command_keeps_the_contract(program, command):
    module = program.module(command)
    fields = {field.name: field.default for field in dataclasses.fields(module.Config)}
    assert {"output", "seed", "redraw"} <= set(fields)
    assert (fields["seed"], fields["redraw"]) == (0, False)
    assert all(callable(getattr(module, name)) for name in ("run", "table", "plot"))


@every_command
def test_counts_must_be_positive_and_nothing_may_be_negative(program, command):
    config = program.module(command).Config()
    for field in dataclasses.fields(config):
        several = field.type == tuple[int, ...]
        if not several and field.type not in (int, int | None):
            continue
        wrong = -1 if field.name in config.from_zero else 0
        with pytest.raises(CommandError, match=rf"^{field.name} must be at least [012], got"):
            dataclasses.replace(config, **{field.name: (wrong,) if several else wrong})


def test_an_unknown_command_suggests_the_nearest_one(capsys):
    refused("comprae")
    assert "Did you mean compare?" in capsys.readouterr().err
    refused("xyz")
    error = capsys.readouterr().err
    assert "Did you mean" not in error
    assert "gradreg --help" in error


def test_without_a_command_the_listing_is_shown():
    assert "a command is required" in refused()


def test_an_unknown_option_suggests_options_of_the_same_command_only(capsys):
    refused("compare", "--sedes", "3")
    shown = "".join(capsys.readouterr())
    assert "--seeds" in shown
    assert "gradreg compare --help" in shown
    others = [name for name in PROGRAM.commands if name != "compare"]
    assert not [name for name in others if f"gradreg {name}" in shown]


@pytest.mark.parametrize("arguments", [["sweep", "--model", "vit"], ["compare", "--steps", "many"]])
def test_a_wrong_value_names_its_option(arguments, capsys):
    refused(*arguments)
    assert arguments[1] in "".join(capsys.readouterr())


@pytest.mark.parametrize("arguments", [["sweep", "--gammas", "-1"], ["sweep", "--gammas"]])
def test_a_refused_configuration_points_to_the_help_of_its_command(arguments, tmp_path, capsys):
    refused(*arguments, "--output", str(tmp_path))
    shown = "".join(capsys.readouterr())
    assert "gammas must" in shown
    assert "gradreg sweep --help" in shown
    assert "Config" not in shown
    assert not list(tmp_path.iterdir())


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
            "gradreg sweep: batch_size must be at most 300, the number of training samples",
        ),
        (["compare", "--train-size", "2000"], "gradreg compare: train_size must be between 1 and"),
        (["compare", "--redraw"], "gradreg compare: no results at "),
    ],
)
def test_inconsistent_settings_are_a_one_line_error(arguments, message, tmp_path):
    error = refused(*arguments, "--output", str(tmp_path))
    assert error.startswith(message)
    assert "\n" not in error


@pytest.mark.parametrize("place", ["file", "file/folder"])
def test_an_unwritable_output_names_its_option_before_the_training(tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(PROGRAM.module("compare"), "run", None)
    error = refused("compare", "--output", str(tmp_path / place))
    assert error.startswith("gradreg compare: cannot write to")
    assert "--output" in error


def test_a_figure_is_redrawn_without_the_run(tmp_path, monkeypatch, capsys):
    module = PROGRAM.module("sweep")
    rows = {
        "role": ["choose", "choose", "report", "report"],
        "method": ["SGD"] * 4,
        "seed": [0, 1, 2, 3],
        "gradients": [1] * 4,
        "accuracy": [0.5, 0.7, 0.6, 0.8],
        "diverged": [False] * 4,
    }
    found = {"dataset": "digits", "runs": rows}
    results.save(tmp_path, "gradreg sweep", module.Config(), found)
    monkeypatch.setattr(module, "run", None)
    run("sweep", "--redraw", "--output", str(tmp_path))
    shown = capsys.readouterr().out
    assert "70.00 ± 10.00" in shown
    assert (tmp_path / "sweep.png").exists()

    (tmp_path / "sweep.png").unlink()
    error = refused("cost", "--redraw", "--output", str(tmp_path))
    assert "holds results of 'gradreg sweep', not of 'cost'" in error


@pytest.mark.parametrize("command", PROGRAM.commands)
def test_every_command_writes_its_figures_in_each_format_and_its_tables_as_csv(command, tmp_path):
    name = {"sweep": "sweep_digits_others"}.get(command, command.replace("-", "_"))
    shutil.copy(ROOT / "notebooks/results" / name / "results.json", tmp_path)
    run(command, "--redraw", "--output", str(tmp_path), "--format", "svg", "pdf")
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".csv", ".svg", ".pdf"}
    table = PROGRAM.module(command).table(results.load(tmp_path, command))
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


def test_the_version_is_that_of_the_package(capsys):
    run("--version")
    assert capsys.readouterr().out == f"gradreg {importlib.metadata.version('gradreg-optax')}\n"


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_no_jax_and_take_less_than_half_a_second(option):
    code = (
        "import sys; from gradreg_optax.__main__ import main; main();"
        " assert not {'jax', 'numpy', 'tyro'} & set(sys.modules), 'too much is imported'"
    )
    before = os.times()
    subprocess.run([sys.executable, "-c", code, option], check=True, capture_output=True)
    after = os.times()  # processor time, which a busy machine does not change
    used = after.children_user + after.children_system
    assert used - before.children_user - before.children_system < 0.5


def test_a_closed_pipe_is_no_error():
    command = [sys.executable, "-m", "gradreg_optax", "sweep", "--redraw", "--output"]
    read, write = os.pipe()
    os.close(read)  # as head does after its lines
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(ROOT / "notebooks/results/sweep_digits_others/results.json", folder)
        done = subprocess.run(
            [*command, folder], stdout=write, stderr=subprocess.PIPE, timeout=120, check=False
        )
        assert (Path(folder) / "sweep.png").exists()
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


SMALL = ["--train-size", "40", "--test-size", "20", "--seeds", "1", "--datasets", "digits"]


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("seconds", "times"),
    [
        (2.0, 2),
        *(pytest.param(0.7 * i, 1 + i % 2, marks=slow) for i in range(1, 11)),
    ],
)
def test_an_interrupt_at_any_time_exits_with_130_and_without_a_traceback(seconds, times, tmp_path):
    command = [sys.executable, "-m", "gradreg_optax", "compare", *SMALL, "--output", tmp_path]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        time.sleep(seconds)
        for _ in range(times):  # a terminal and uv both send one
            process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=30)[1].decode()
    assert process.returncode == 130
    assert "interrupted" in error
    for word in ("Traceback", "terminate", "FATAL", "Exception"):
        assert word not in error


def test_an_interrupt_prints_the_number_of_finished_parts_and_how_to_resume(tmp_path, capfd):
    for i in range(3):
        results.write(tmp_path / "parts" / f"{i}.json", {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "_exit", sys.exit)
        with pytest.raises(SystemExit) as stop:
            cli._interrupted(tmp_path, signal.SIGINT, None)
    assert stop.value.code == 130
    error = capfd.readouterr().err
    assert f"3 finished parts are in {tmp_path / 'parts'}" in error
    assert "Run the same command to resume" in error


def test_a_run_without_a_terminal_shows_no_progress(tmp_path, capsys):
    sizes = ["--train-size", "20", "--test-size", "20", "--steps", "2", "--batch-size", "10"]
    seeds = ["--seeds", "1", "--report-seeds", "1", "--methods", "SGD", "--width", "2"]
    run("sweep", *sizes, *seeds, "--output", str(tmp_path))
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "\r" not in shown.out
    assert "figure:" in shown.out
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["sources"] == results.sources()
    assert document["command"] == "gradreg sweep"


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda path: path.name)
def test_committed_results_redraw(folder):
    called, command = json.loads((folder / "results.json").read_text())["command"].rsplit(" ", 1)
    program = {"gradreg": PROGRAM, STUDIES.name: STUDIES}[called]
    assert str(program.module(command).table(results.load(folder, command)))


@pytest.mark.parametrize("package", ["matplotlib", "tyro"])
def test_without_a_package_the_command_names_the_extra(package):
    code = (
        f"import sys; sys.modules['{package}'] = None; from gradreg_optax.__main__ import main;"
        " main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "compare"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert 'pip install "gradreg-optax[experiments]"' in done.stderr
    assert "Traceback" not in done.stderr
