"""Plants faults in the core, one at a time, and asks which of them the tests find.

    uv run --with pytest-cov python tools/mutation --faults 150
    uv run --with pytest-cov python tools/mutation --again    # the survivors, with today's tests

A first run of the core's tests under coverage says which test executes which line. Then each fault
is planted in a copy of the repository, and the tests that execute its line run there until one
fails. What survives is either a hole in the tests, to be closed, or changes nothing that can be
seen: then ``equivalent.json`` says why.
"""

import collections
import concurrent.futures
import json
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import operators
import tyro
from operators import Fault
from tqdm import tqdm

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# Neither the site, the wheel nor the notebooks, nor what trains networks: they are not the core's.
IGNORED = ["gradreg_optax/experiments", "tests/integration/test_processes.py"]
IGNORED += [f"tests/{name}" for name in ("experiments", "studies", "hosts")]
IGNORED += [
    f"tests/test_{name}.py" for name in ("site", "release", "examples", "mutation_operators")
]
PYTEST = ["-m", "pytest", "-o", "addopts=", "--doctest-modules", "--import-mode=importlib", "-q"]
PYTEST += ["-p", "no:cacheprovider"]
# What runs in processes of its own is not seen by coverage.
SHARDING = "tests/integration/test_sharding.py"
ELSEWHERE = {"_batching": [SHARDING], "_sharding": [SHARDING]}
FOUND = Path(tempfile.gettempdir()) / "gradreg-mutation"
Tests = dict[str, dict[int, list[str]]]


def main(
    faults: int = 150,
    seed: int = 0,
    modules: tuple[str, ...] = (),
    jobs: int = 2,
    tests: int = 60,
    again: bool = False,
    output: Path = HERE / "results.json",
    coverage: Path = FOUND,
) -> None:
    """Plants faults and prints planted, killed, equivalent and survived.

    Args:
      faults: how many, of all that there are in the modules.
      seed: which ones.
      modules: names of modules; all of the core by default.
      jobs: how many run side by side.
      tests: how many to run for one fault, those that execute the fewest lines first; a survivor
        of some of them is not one of all.
      again: plant no new faults, but those that have survived.
      output: where the verdicts go; those that stand there are not tried again.
      coverage: file of what the first run found out; remove it after the tests have changed.
    """
    core = (path.stem for path in (ROOT / "gradreg_optax").glob("*.py"))
    names = modules or tuple(sorted(name for name in core if not name.startswith("__")))
    known = json.loads(output.read_text()) if output.exists() else []
    verdicts = {key(one): one for one in known}
    if again:
        left = [(old, one["module"], again_of(one)) for old, one in verdicts.items() if alive(one)]
    else:
        every = [(name, fault) for name in names for fault in operators.faults(source_of(name))]
        chosen = random.Random(seed).sample(every, min(faults, len(every)))
        left = [(key(describe(name, fault)), name, fault) for name, fault in chosen]
        left = [one for one in left if one[0] not in verdicts]
    covering = covering_tests(coverage, tests)
    copies: queue.Queue[Path] = queue.Queue()
    with tempfile.TemporaryDirectory() as folder:
        for job in range(jobs):
            ignored = shutil.ignore_patterns(".*", "build", "notebooks", "studies")
            copies.put(shutil.copytree(ROOT, Path(folder) / str(job), ignore=ignored))
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            futures = {pool.submit(verdict, copies, *one, covering): old for old, *one in left}
            done = concurrent.futures.as_completed(futures)
            for future in tqdm(done, total=len(left), disable=None):
                verdicts.pop(futures[future], None)
                verdicts[key(future.result())] = future.result()
                everything = [verdicts[one] for one in sorted(verdicts)]
                output.write_text(json.dumps(everything, indent=1) + "\n")
    print(report(list(verdicts.values())))


def source_of(module: str) -> str:
    """The source of a module of the core."""
    path = ROOT / f"gradreg_optax/{module}.py"
    if not path.exists():
        raise SystemExit(f"There is no module {module}: take its faults out of the results.")
    return path.read_text()


def again_of(one: dict[str, Any]) -> Fault:
    """A fault of an earlier run, in the module as it is now; of several alike the nearest."""
    every = operators.faults(source_of(one["module"]))
    alike = [f for f in every if (f.before, f.after) == (one["before"], one["after"])]
    if not alike:
        raise SystemExit(f"{one['module']} has changed: {one['before']} is gone, take it out.")
    return min(alike, key=lambda fault: abs(fault.line - one["line"]))


def alive(one: dict[str, Any]) -> bool:
    """Whether the tests did not find a fault."""
    return one["verdict"] == "survived"


def covering_tests(data: Path, count: int) -> Tests:
    """For each module and line, ``count`` tests that execute it, the most special first.

    A line that runs at import has all tests of its module.
    """
    if not data.exists():
        run = [*PYTEST, "-n", "2", "--cov=gradreg_optax", "--cov-context=test", "--cov-report="]
        run += ["tests", "gradreg_optax", *(f"--ignore={path}" for path in IGNORED)]
        subprocess.run([sys.executable, *run], cwd=ROOT, env=environment(ROOT, data), check=True)
    from coverage import CoverageData  # of pytest-cov, which nothing else needs

    measured = CoverageData(str(data))
    measured.read()
    found = {}
    for path in measured.measured_files():
        lines = measured.contexts_by_lineno(path).items()
        found[Path(path).stem] = {
            line: {context.split("|")[0] for context in contexts if context}
            for line, contexts in lines
        }
    sizes = collections.Counter(
        test for lines in found.values() for tests in lines.values() for test in tests
    )
    return {
        name: {
            line: sorted(tests or set().union(*lines.values()), key=sizes.__getitem__)[:count]
            for line, tests in lines.items()
        }
        for name, lines in found.items()
    }


def verdict(copies: queue.Queue[Path], name: str, fault: Fault, covering: Tests) -> dict[str, Any]:
    """Plants one fault and runs the tests of its line."""
    copy = copies.get()
    path = copy / f"gradreg_optax/{name}.py"
    original = path.read_text()
    lines = covering.get(name, {})
    statement = max((line for line in lines if line <= fault.line), default=0)
    try:
        path.write_text(fault.module)
        outcome = run_tests(copy, [*lines.get(statement, []), *ELSEWHERE.get(name, [])])
    finally:
        path.write_text(original)
        copies.put(copy)
    return describe(name, fault) | outcome


def run_tests(copy: Path, tests: list[str]) -> dict[str, str]:
    """Runs tests in a copy until one fails."""
    if not tests:
        return {"verdict": "survived", "by": "no test executes the line"}
    listed = copy / "tests.txt"
    listed.write_text("\n".join(tests))
    run = [sys.executable, *PYTEST, "-x", "--tb=no", f"@{listed}"]
    try:
        done = subprocess.run(
            run, cwd=copy, env=environment(copy), capture_output=True, text=True, timeout=900
        )
    except subprocess.TimeoutExpired:
        return {"verdict": "killed", "by": "does not end"}
    if done.returncode == 0:
        return {"verdict": "survived", "by": f"{len(tests)} tests"}
    lines = [x for x in done.stdout.splitlines() if x.startswith(("FAILED", "ERROR"))]
    return {"verdict": "killed", "by": lines[0].split(" - ")[0] if lines else "at import"}


def environment(root: Path, coverage: Path | None = None) -> dict[str, str]:
    """The environment of a run in ``root``."""
    more = {} if coverage is None else {"COVERAGE_FILE": str(coverage)}
    return os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"} | more


def describe(name: str, fault: Fault) -> dict[str, Any]:
    """A fault as it stands in the results."""
    return {"module": name} | {k: v for k, v in fault._asdict().items() if k != "module"}


def key(one: dict[str, Any]) -> tuple[str, int, str, str]:
    """What makes two faults the same."""
    return one["module"], one["line"], one["before"], one["after"]


def report(verdicts: list[dict[str, Any]]) -> str:
    """Planted, killed, equivalent, and each survivor."""
    reasons = json.loads((HERE / "equivalent.json").read_text())
    same = {(one["module"], one["before"], one["after"]) for one in reasons}
    left = [one for one in verdicts if alive(one)]
    open_ones = [x for x in left if (x["module"], x["before"], x["after"]) not in same]
    lines = [
        f"planted {len(verdicts)}, killed {len(verdicts) - len(left)},"
        f" equivalent {len(left) - len(open_ones)}, survived {len(open_ones)}"
    ]
    for one in open_ones:
        lines += [f"{one['module']}:{one['line']} ({one['by']})", one["before"], one["after"]]
    return "\n".join(lines)


if __name__ == "__main__":
    tyro.cli(main)
