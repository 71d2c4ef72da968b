"""Plants faults in the core, one at a time, and asks which of them the tests find.

    uv run --with pytest-cov python tests/mutation --faults 150
    uv run --with pytest-cov python tests/mutation --again    # the survivors, with today's tests

A first run of the core's tests under coverage says which test executes which line. Then each fault
is planted in a copy of the repository, and the tests that execute its line run there, the quickest
first, until one fails. What survives is either a hole in the tests, to be closed, or changes
nothing that can be seen: then ``equivalent.json`` says why.
"""

import concurrent.futures
import itertools
import json
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import tyro
from operators import Fault, faults
from tqdm import tqdm

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# Neither the site, the wheel nor the notebooks, nor what trains networks: they are not the core's.
IGNORED = [
    "gradreg_optax/experiments",
    "tests/experiments",
    "tests/studies",
    "tests/hosts",
    "tests/mutation",
]
IGNORED += [f"tests/test_{name}.py" for name in ("site", "release", "examples")]
IGNORED += ["tests/integration/test_processes.py"]
PYTEST = ["-m", "pytest", "-o", "addopts=", "--doctest-modules", "--import-mode=importlib", "-q"]
PYTEST += ["-p", "no:cacheprovider"]
# What runs in processes of its own is not seen by coverage.
SHARDING = "tests/integration/test_sharding.py"
ELSEWHERE = {"_batching": [SHARDING], "_sharding": [SHARDING]}
FOUND = Path(tempfile.gettempdir()) / "gradreg-mutation"


def main(
    faults: int = 150,
    seed: int = 0,
    modules: tuple[str, ...] = (),
    jobs: int = 2,
    seconds: float = 60.0,
    again: bool = False,
    output: Path = HERE / "results.json",
    coverage: Path = FOUND,
) -> None:
    """Plants faults and prints planted, killed, equivalent and survived.

    Args:
      faults: how many, spread over the modules by what there is to break in them.
      seed: which ones.
      modules: names of modules; all of the core by default.
      jobs: how many run side by side.
      seconds: how much of the tests to run for one fault, the quickest first; a survivor of some of
        them is not one of all.
      again: plant no new faults, but those that have survived.
      output: where the verdicts go; those that stand there are not tried again.
      coverage: folder of what the first run found out; remove it after the tests have changed.
    """
    core = (path.stem for path in (ROOT / "gradreg_optax").glob("*.py"))
    names = modules or tuple(sorted(name for name in core if not name.startswith("__")))
    known = json.loads(output.read_text()) if output.exists() else []
    verdicts = {key(one): one for one in known}
    if again:
        left = [(old, one["module"], again_of(one)) for old, one in verdicts.items() if alive(one)]
    else:
        chosen = sample(names, faults, seed)
        left = [(key(describe(name, fault)), name, fault) for name, fault in chosen]
        left = [one for one in left if one[0] not in verdicts]
    covering = covering_tests(coverage, seconds)
    copies: queue.Queue[Path] = queue.Queue()
    with tempfile.TemporaryDirectory() as folder:
        for job in range(jobs):
            copies.put(copy_of_repository(Path(folder) / str(job)))
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            futures = {pool.submit(verdict, copies, *one, covering): old for old, *one in left}
            done = concurrent.futures.as_completed(futures)
            for future in tqdm(done, total=len(left), disable=None):
                verdicts.pop(futures[future], None)
                verdicts[key(future.result())] = future.result()
                everything = [verdicts[one] for one in sorted(verdicts)]
                output.write_text(json.dumps(everything, indent=1) + "\n")
    print(report(list(verdicts.values())))


def sample(names: tuple[str, ...], count: int, seed: int) -> list[tuple[str, Fault]]:
    """Some faults of each module, in proportion to the root of how many it has."""
    every = {name: list(faults((ROOT / f"gradreg_optax/{name}.py").read_text())) for name in names}
    weights = {name: len(found) ** 0.5 for name, found in every.items()}
    chosen = []
    for name, found in every.items():
        share = round(count * weights[name] / sum(weights.values()))
        some = random.Random(f"{seed} {name}").sample(found, min(len(found), share))
        chosen += [(name, fault) for fault in some]
    return chosen


def again_of(one: dict[str, Any]) -> Fault:
    """A fault of an earlier run, in the module as it is now; of several alike the nearest."""
    source = (ROOT / f"gradreg_optax/{one['module']}.py").read_text()
    alike = [f for f in faults(source) if (f.before, f.after) == (one["before"], one["after"])]
    if not alike:
        raise SystemExit(f"{one['module']} has changed: {one['before']} is gone, take it out.")
    return min(alike, key=lambda fault: abs(fault.line - one["line"]))


def alive(one: dict[str, Any]) -> bool:
    """Whether the tests did not find a fault."""
    return one["verdict"] == "survived"


def covering_tests(folder: Path, budget: float) -> dict[str, dict[int, list[str]]]:
    """For each module and line the tests that execute it, the quickest first.

    A line that runs at import has all tests of its module. ``budget`` is in seconds.
    """
    data, times = folder / ".coverage", folder / "times.xml"
    if not times.exists():
        folder.mkdir(parents=True, exist_ok=True)
        run = [*PYTEST, "-n", "2", "--cov=gradreg_optax", "--cov-context=test", "--cov-report="]
        run += [f"--junitxml={times}", "tests", "gradreg_optax"]
        run += [f"--ignore={path}" for path in IGNORED]
        subprocess.run([sys.executable, *run], cwd=ROOT, env=environment(ROOT, data), check=True)
    from coverage import CoverageData  # of pytest-cov, which nothing else needs

    seconds = {}
    for case in ElementTree.parse(times).iter("testcase"):
        seconds[case.get("classname", ""), case.get("name", "")] = float(case.get("time", "0"))
    found: dict[str, dict[int, list[str]]] = {}
    measured = CoverageData(str(data))
    measured.read()
    for path in measured.measured_files():
        by_line = {
            line: {context.split("|")[0] for context in contexts if context}
            for line, contexts in measured.contexts_by_lineno(path).items()
        }
        every = set().union(*by_line.values())
        found[Path(path).stem] = {
            line: quickest({test: duration(seconds, test) for test in tests or every}, budget)
            for line, tests in by_line.items()
        }
    return found


def quickest(seconds: dict[str, float], budget: float) -> list[str]:
    """The quickest tests, as many as fit into the budget."""
    tests = sorted(seconds, key=lambda test: seconds[test])
    ends = itertools.accumulate(seconds[test] for test in tests)
    return [test for test, end in zip(tests, ends, strict=True) if end <= budget]


def duration(seconds: dict[tuple[str, str], float], test: str) -> float:
    """How long a test took, by its node id."""
    path, _, name = test.partition("::")
    return seconds.get((path.removesuffix(".py").replace("/", "."), name), 0.0)


def verdict(
    copies: queue.Queue[Path], name: str, fault: Fault, covering: dict[str, dict[int, list[str]]]
) -> dict[str, Any]:
    """Plants one fault and runs the tests of its line."""
    copy = copies.get()
    path = copy / f"gradreg_optax/{name}.py"
    original = path.read_text()
    lines = covering.get(name, {})
    statement = max((line for line in lines if line <= fault.line), default=0)
    tests = [*lines.get(statement, []), *ELSEWHERE.get(name, [])]
    try:
        path.write_text(fault.module)
        outcome = run_tests(copy, tests)
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


def copy_of_repository(folder: Path) -> Path:
    """What the tests of the core need."""
    for name in ("gradreg_optax", "tests", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("_build"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def describe(name: str, fault: Fault) -> dict[str, Any]:
    """A fault as it stands in the results."""
    return {
        "module": name,
        "line": fault.line,
        "kind": fault.kind,
        "before": fault.before,
        "after": fault.after,
    }


def key(one: dict[str, Any]) -> tuple[str, int, str, str]:
    """What makes two faults the same."""
    return one["module"], one["line"], one["before"], one["after"]


def report(verdicts: list[dict[str, Any]]) -> str:
    """Planted, killed, equivalent, and each survivor."""
    reasons = json.loads((HERE / "equivalent.json").read_text())
    same = {(one["module"], one["before"], one["after"]) for one in reasons}
    left = [one for one in verdicts if alive(one)]
    open_ones = [x for x in left if (x["module"], x["before"], x["after"]) not in same]
    killed, equal = len(verdicts) - len(left), len(left) - len(open_ones)
    lines = [
        f"{one['module']}:{one['line']} ({one['by']})\n  {one['before']}\n  {one['after']}"
        for one in open_ones
    ]
    head = (
        f"planted {len(verdicts)}, killed {killed}, equivalent {equal}, survived {len(open_ones)}"
    )
    return "\n".join([head, *lines])


if __name__ == "__main__":
    tyro.cli(main)
