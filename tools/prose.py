"""Lint the prose of the repository: `python tools/prose.py [PATH ...]`.

proselint checks general English, `vocabulary.toml` the words of this project. Code is left out:
of Markdown, blocks, inline code, formulas and addresses; of Python, all but docstrings, comments
and strings of several words; of notebooks, outputs, while their code is read like Python.
"""

import argparse
import ast
import bisect
import collections
import io
import itertools
import json
import pathlib
import re
import subprocess
import sys
import tokenize
import tomllib

from proselint.checks import __register__
from proselint.config import DEFAULT
from proselint.registry import CheckRegistry
from proselint.registry.checks import Check, CheckFlags, Padding
from proselint.registry.checks.engine import Fancy
from proselint.registry.checks.types import PreferredForms
from proselint.tools import LintFile

ROOT = pathlib.Path(__file__).parents[1]
VOCABULARY = tomllib.loads((ROOT / "tools" / "vocabulary.toml").read_text())
SUFFIXES = {".md", ".py", ".ipynb"}
# Checks of proselint that misfire here: typography asks for curly quotes and signs that code cannot
# have; repeated words are in the vocabulary, since "0 0" in a table is none; "very" is a joke;
# psychology takes p = 0.0002 for p = 0.
OFF = (
    "typography",
    "dates_times",
    "annotations",
    "lexical_illusions",
    "weasel_words",
    "psychology",
)

# What is not prose, in the order in which it is taken out.
BLOCK = re.compile(r"^[ >]*(`{3,}|~{3,}|:{3,})(?!\{).*?^[ >]*\1[ ]*$", re.M | re.S)
DOCTEST = re.compile(r"^[ ]*>>> .*?(?=^[ ]*$|\Z)", re.M | re.S)
NO_PROSE = re.compile(
    r"`{3,}.*|(`+)(?:(?!`).)+?\1|\$\$.*?\$\$|\$[^$\n]+\$|\]\([^)]*\)|<[^>\s][^>]*>"
    r"|https?://\S+|:\w+:`[^`]*`|^\(.*\)=$|\{[^}\n]*\}",
    re.M | re.S,
)
SENTENCE = re.compile(r"\w[\w'-]*,? +\w+")  # at least two words: a label or a sentence
NUMBER = re.compile(r"(^|[\s(±+−-])\.\d+(?!\d|[efg%])")  # not a format such as ".2f"


def blank(match):
    """Replace a match with as many characters that no check looks at."""
    return re.sub(r"[^\n]", "\N{MIDDLE DOT}", match[0])


def markdown(text):
    """The prose of Markdown or of a docstring, every character in its place."""
    for pattern in (BLOCK, DOCTEST, NO_PROSE):
        text = pattern.sub(blank, text)
    return text


def literals(tree):
    """Strings of a module with their lines, format specifications left out."""
    specs = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.FormattedValue) and node.format_spec
        for part in ast.walk(node.format_spec)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in specs:
            yield node.lineno, node.value


def comments(text):
    """Comments with their lines, consecutive ones as one text."""
    blocks = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(("#!", "# type:")):
            line, words = token.start[0], token.string.lstrip("# ")
            start = next((s for s, b in blocks.items() if s + len(b) == line), line)
            blocks.setdefault(start, []).append(words)
    return [(start, "\n".join(words)) for start, words in blocks.items()]


def python(text):
    """Docstrings, comments and strings of several words of a module."""
    strings = [(line, value) for line, value in literals(ast.parse(text))]
    return [(line, markdown(value)) for line, value in strings + comments(text) if prose(value)]


def prose(text):
    """Whether a string is a sentence or a label, not a name, a path, a pattern or a format."""
    code = re.search(r"\\[wdsb.]", text) or re.fullmatch(r"[+]?\.\d+[efg%]", text)
    return bool(SENTENCE.search(text) or NUMBER.search(text)) and not code


def notebook(text):
    """The text and the code's prose of a notebook, with the number of the cell as the line."""
    for number, cell in enumerate(json.loads(text)["cells"], 1):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield number, markdown(source)
        elif not source.lstrip().startswith(("%", "!")):
            yield from ((number, words) for _, words in python(source))


READERS = {
    ".md": lambda text: [(1, markdown(text))],
    ".py": python,
    ".ipynb": notebook,
}


def project_checks():
    """The vocabulary as checks of proselint."""
    for group, terms in VOCABULARY.items():
        if group == "exceptions":
            continue
        padding = Padding.RAW if group == "patterns" else Padding.WORDS_IN_TEXT
        yield Check(
            check_type=PreferredForms({f"(?:{old})": new for old, new in terms.items()}, padding),
            engine=Fancy(),
            path=f"project.{group}",
            message="'{1}': write {0}.",
            flags=CheckFlags(allow_quotes=True),
        )


def config():
    """The defaults of proselint without the checks that are off, and with ours."""
    checks = DEFAULT["checks"] | dict.fromkeys(OFF, False) | {"project": True}
    return {"max_errors": 10_000, "checks": checks}


def findings(path):
    """Yield line, rule and message of every finding in a file; the line of a notebook is a cell."""
    pieces = list(READERS[path.suffix](path.read_text(encoding="utf-8")))
    starts = [0, *itertools.accumulate(len(text) + 2 for _, text in pieces)]
    whole = "\n\n".join(text for _, text in pieces)
    allowed = {
        entry["found"] for entry in VOCABULARY.get("exceptions", ()) if ROOT / entry["path"] == path
    }
    for result in LintFile(str(path), whole).lint(config()) if whole.strip() else ():
        start, end = (
            position - 1 for position in result.check_result.span
        )  # proselint adds a line
        if whole[start:end].lower() not in allowed:
            piece = bisect.bisect_right(starts, start) - 1
            line = pieces[piece][0]
            if path.suffix != ".ipynb":
                line += whole.count("\n", starts[piece], start)
            yield line, result.check_result.check_path, result.check_result.message


def tracked(paths):
    """The files under the given paths that git tracks and that we can read."""
    command = ["git", "ls-files", "--", *map(str, paths)]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    files = (ROOT / name for name in names.stdout.splitlines())
    return [path for path in files if path.suffix in SUFFIXES and path.is_file()]


def main():
    """Print the findings, and exit with 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", default=["."], help="files or directories (all)")
    parser.add_argument("--count", action="store_true", help="print one count per file and rule")
    arguments = parser.parse_args()
    CheckRegistry().register_many((*__register__, *project_checks()))
    counts = collections.Counter()
    for path in tracked(arguments.paths):
        for line, rule, message in findings(path):
            counts[path.relative_to(ROOT), rule] += 1
            if not arguments.count:
                print(f"{path.relative_to(ROOT)}:{line}: {rule}: {message}")
    if arguments.count:
        for (path, rule), number in sorted(counts.items()):
            print(f"{number:5} {path} {rule}")
    print(f"{counts.total()} findings", file=sys.stderr)
    return bool(counts)


if __name__ == "__main__":
    sys.exit(main())
