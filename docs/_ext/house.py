"""What this site does beyond Sphinx: formulas without JavaScript, and parts drawn from the code.

Formulas become MathML when the site is built, by docutils' own converter: browsers draw it without
a script or a font from elsewhere, and a formula with an error in it fails the build.
"""

import ast
import importlib
import inspect
import json
import re
import shutil
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path
from types import ModuleType
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[2]
PACKAGE = "gradreg_optax"
LOGGER = logging.getLogger(__name__)


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers everything below."""
    for folder in ("notebooks", "studies/notebooks"):
        copy_notebooks(ROOT / folder, Path(app.srcdir) / "notebooks")
    app.add_html_math_renderer("mathml", (inline_formula, None), (displayed_formula, None))
    app.config.html_math_renderer = "mathml"
    app.add_directive("floors", Floors)
    app.add_directive("benchmark-tables", BenchmarkTables)
    app.add_directive("test-counts", TestCounts)
    app.connect("source-read", follow_the_notebooks)
    app.connect("source-read", list_public_names)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


# Formulas


def inline_formula(translator: Any, node: nodes.math) -> None:
    """Writes a formula into the line."""
    translator.body.append(mathml(node, node.astext(), as_block=False))
    raise nodes.SkipNode


def displayed_formula(translator: Any, node: nodes.math_block) -> None:
    """Writes a formula on lines of its own, which scroll where the screen is narrower."""
    formula = mathml(node, node.astext(), as_block=True)
    translator.body.append(f'<div class="formula">{formula}</div>\n')
    raise nodes.SkipNode


def mathml(node: nodes.Node, tex: str, as_block: bool) -> str:
    """MathML of a formula; a warning, so no site, where it cannot be read."""
    sided = re.sub(r"\\([bB]igg?)(?![A-Za-z])", r"\\\1l", tex)  # docutils knows \bigl, not \big
    try:
        for opening, closing in ((r"(?<!\\){", r"(?<!\\)}"), (r"\\left\b", r"\\right\b")):
            if len(re.findall(opening, tex)) != len(re.findall(closing, tex)):
                raise MathError("Something is opened and not closed.")
        return spaced(tex2mathml(sided, as_block=as_block))
    except MathError as error:
        LOGGER.warning("formula %r: %s", tex, error, location=node)
        return f"<code>{escape(tex)}</code>"


THIN = '<mspace width="0.17em"/>'


def spaced(formula: str) -> str:
    """Primes, bars of norms as high as a letter, and thin spaces around the names of functions, as
    TeX sets them.
    """
    letters = "m(?:i|n|sub|sup|subsup|sqrt|frac)"
    apply = "<mo>&ApplyFunction;</mo>"
    for plain, mark in (("'", "\u2032"), ("\u2016", "\u2016")):
        formula = formula.replace(
            f"<mo>{plain}</mo>", f'<mo stretchy="false" lspace="0" rspace="0">{mark}</mo>'
        )
    formula = re.sub(rf"(</{letters}>\s*)(<mi>\w\w+</mi>\s*{apply})", rf"\1{THIN}\2", formula)
    return re.sub(rf"{apply}(?=\s*<{letters}\b)", THIN, formula)


# Notebooks lie beside docs/, and are pages of the site all the same


def copy_notebooks(source: Path, target: Path) -> None:
    """Copies the notebooks to where Sphinx finds them; an unchanged one keeps its time."""
    target.mkdir(exist_ok=True)
    for notebook in sorted(source.glob("*.ipynb")):
        copy = target / notebook.name
        if not copy.exists() or copy.read_bytes() != notebook.read_bytes():
            shutil.copy(notebook, copy)


def follow_the_notebooks(app: Sphinx, docname: str, source: list[str]) -> None:
    """Turns links that hold in the repository into links that hold here."""
    source[0] = re.sub(
        r"(\]\((?:\.\./)*)\.\./(?:studies/)?notebooks/(?=[^)]*\.ipynb)", r"\1notebooks/", source[0]
    )


# The reference lists what is public, so nothing can be forgotten

# Sections in the order of reading; a module that is not here comes after those that are, under its
# own name.
TITLES = {
    "gradients": "Gradient functions",
    "losses": "Losses",
    "transforms": "Optax transformations",
    "relative": "The relative penalty",
    "penalty": "Ascent directions",
    "training": "Train steps",
    "nnx": "Flax NNX",
    "microbatching": "Accumulation",
    "_guard": "Debugging",
    "_typing": "Types",
    "curvature": "Curvature",
}


def list_public_names(app: Sphinx, docname: str, source: list[str]) -> None:
    """Puts the public names in the place of ``<!-- public names -->``."""
    source[0] = source[0].replace("<!-- public names -->", "\n".join(reference()))


def reference() -> Iterator[str]:
    """A section for every module that defines public names."""
    package = importlib.import_module(PACKAGE)
    public = [getattr(package, name) for name in package.__all__ if name != "__version__"]
    functions = [p for p in public if not isinstance(p, ModuleType)]
    homes = sorted({p.__module__ for p in functions}, key=reading_order)
    for home in homes:
        yield from section(home, PACKAGE, [p for p in functions if p.__module__ == home])
    for module in (p for p in public if isinstance(p, ModuleType)):
        here = [
            value
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
        ]
        yield from section(module.__name__, module.__name__, here)


def reading_order(module: str) -> tuple[int, str]:
    """Where in the reference a module stands."""
    name = module.removeprefix(PACKAGE + ".")
    return (list(TITLES).index(name) if name in TITLES else len(TITLES)), name


def section(module: str, prefix: str, objects: list[Any]) -> Iterator[str]:
    """A module's heading, its docstring, and its public objects."""
    name = module.removeprefix(PACKAGE + ".")
    yield f"\n## {TITLES.get(name, name.capitalize())}\n"
    yield f"```{{eval-rst}}\n{inspect.getdoc(sys.modules[module])}\n"
    for found in objects:
        kind = "autoclass" if inspect.isclass(found) else "autofunction"
        yield f".. {kind}:: {prefix}.{found.__name__}\n"
    yield "```"


# The floors of the package, drawn from its imports


class Floors(SphinxDirective):
    """Draws which module imports which, a floor above all that it imports."""

    def run(self) -> list[nodes.Node]:
        """The drawing."""
        for path in (ROOT / PACKAGE).glob("**/*.py"):
            self.env.note_dependency(str(path))
        return [nodes.raw("", drawing(imports(ROOT / PACKAGE)), format="html")]


def imports(package: Path) -> dict[str, set[str]]:
    """Which module imports which, by its name in the package; ``experiments`` counts as one."""
    found: dict[str, set[str]] = {}
    for path in sorted(package.glob("**/*.py")):
        name = module_name(path.relative_to(package))
        if name in ("__init__", "__main__"):  # which only gather
            continue
        tree = ast.parse(path.read_text())
        targets = {
            target.removeprefix(PACKAGE + ".").split(".")[0]
            for node in ast.walk(tree)
            for target in imported(node)
            if target.startswith(PACKAGE + ".")
        }
        found.setdefault(name, set()).update(targets - {name})
    return {name: targets & set(found) for name, targets in found.items()}


def module_name(path: Path) -> str:
    """The name that a file goes by in the drawing."""
    return path.parts[0].removesuffix(".py")


def imported(node: ast.AST) -> Iterator[str]:
    """The modules that a statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
        yield from (f"{PACKAGE}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield node.module


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """The floor of every module: one above the highest that it imports."""

    def floor(name: str) -> int:
        return 1 + max((floor(target) for target in graph[name]), default=-1)

    return {name: floor(name) for name in graph}


WIDTH, HEIGHT, STEP, GAP = 128, 30, 74, 14


def drawing(graph: dict[str, set[str]]) -> str:
    """An SVG: the floors from the top down, and the imports that no other import implies."""
    level = floors(graph)
    rows = [sorted(n for n in graph if level[n] == k) for k in range(max(level.values()) + 1)]
    wide = max(map(len, rows)) * (WIDTH + GAP)
    place = {
        name: (
            (wide - len(row) * (WIDTH + GAP)) / 2 + column * (WIDTH + GAP) + GAP / 2,
            (len(rows) - 1 - k) * STEP + 6,
        )
        for k, row in enumerate(rows)
        for column, name in enumerate(row)
    }
    lines = [
        f'<path d="M{x + WIDTH / 2:.0f} {y + HEIGHT} C {x + WIDTH / 2:.0f} {y + STEP * 0.75:.0f}'
        f' {u + WIDTH / 2:.0f} {v - STEP * 0.35:.0f} {u + WIDTH / 2:.0f} {v}"/>'
        for name, targets in graph.items()
        for target in sorted(direct(graph, targets))
        for (x, y), (u, v) in [(place[name], place[target])]
    ]
    boxes = [
        f'<rect x="{x:.0f}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="5"/>'
        f'<text x="{x + WIDTH / 2:.0f}" y="{y + 20}">{escape(name)}</text>'
        for name, (x, y) in place.items()
    ]
    size = f"{wide:.0f} {(len(rows) - 1) * STEP + HEIGHT + 12}"
    return (
        '<div class="floors" tabindex="0"><svg role="img" viewBox="0 0 '
        f'{size}" style="min-width: {wide * 0.8:.0f}px"><title>Imports between the modules, from'
        f" the top down</title>{''.join(lines)}{''.join(boxes)}</svg></div>"
    )


def direct(graph: dict[str, set[str]], targets: set[str]) -> set[str]:
    """The targets that no other target reaches."""
    return targets - set().union(*(reached(graph, target) for target in targets))


def reached(graph: dict[str, set[str]], name: str) -> set[str]:
    """Everything below a module."""
    return graph[name].union(*(reached(graph, target) for target in graph[name]))


# The benchmarks, from the committed run


class BenchmarkTables(SphinxDirective):
    """Prints the tables of the committed benchmark run."""

    def run(self) -> list[nodes.Node]:
        """The tables."""
        sys.path.insert(0, str(ROOT))
        report = importlib.import_module("benchmarks.report")
        path = report.RESULTS / "cpu.json"
        self.env.note_dependency(str(path))
        return self.parse_text_to_nodes(report.table(json.loads(path.read_text())))


# How many tests there are, counted in their files


class TestCounts(SphinxDirective):
    """A sentence with the number of tests; a parametrised one counts once."""

    def run(self) -> list[nodes.Node]:
        """The sentence."""
        parts = {
            "the package": "tests/test_*.py",
            "its company": "tests/integration/test_*.py",
            "the experiments": "tests/experiments/test_*.py",
        }
        counts = [f"{self.count(pattern)} for {what}" for what, pattern in parts.items()]
        sentence = f"There are {', '.join(counts[:-1])} and {counts[-1]}, where one with many cases"
        return [nodes.paragraph(text=f"{sentence} counts once.")]

    def count(self, pattern: str) -> int:
        """The number of test functions in the files."""
        paths = sorted(ROOT.glob(pattern))
        for path in paths:
            self.env.note_dependency(str(path))
        functions = (node for path in paths for node in ast.walk(ast.parse(path.read_text())))
        return sum(
            isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
            for node in functions
        )
