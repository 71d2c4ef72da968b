"""The configuration of the site: ``uv run sphinx-build -W docs build/site``."""

import importlib.util
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

HERE = Path(__file__).parent
ROOT = HERE.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
sys.path.insert(0, str(ROOT))  # benchmarks and studies, whose tables are printed

project = PROJECT["name"]
author = PROJECT["authors"][0]["name"]
project_copyright = author

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
nitpicky = True
# Types of other packages and our own aliases are named, not linked.
nitpick_ignore_regex = [("py:(class|obj|exc|data|attr)", ".*"), ("py:func", "(jax|optax|nnx).*")]

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are stored with their outputs; the tests execute them

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_custom_sections = ["Cost", "Source"]
python_maximum_signature_line_length = 88
viewcode_line_numbers = True
intersphinx_mapping: dict[str, tuple[str, None]] = {}  # the build needs no network

html_theme = "furo"
html_title = "gradreg_optax"
html_baseurl = PROJECT["urls"]["Documentation"]
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_theme_options = {
    "source_edit_link": PROJECT["urls"]["Repository"] + "/edit/main/docs/{filename}",
    "footer_icons": [
        {"name": "Source", "url": PROJECT["urls"]["Repository"], "html": "Source", "class": ""}
    ],
}


class ResultsTable(SphinxDirective):
    """Print the table of a committed run: ``{results-table} compare``."""

    required_arguments = 1

    def run(self):
        """The table as text, by the code of the command that made the run."""
        name = self.arguments[0]
        if name == "benchmarks":
            report = importlib.import_module("benchmarks.report")
            path = report.RESULTS / "cpu.json"
            found = self.parse_text_to_nodes(report.table(json.loads(path.read_text())))
        else:
            path = next(ROOT.glob(f"*/results/{name}/results.json"))
            command = json.loads(path.read_text())["command"].split()[-1].replace("-", "_")
            results = importlib.import_module("gradreg_optax.experiments.results").load(path)
            text = command_module(command).table(results)
            found = [nodes.literal_block(text, text, language="text")]
        self.env.note_dependency(str(path))
        return found


def command_module(command):
    """The module of a command of the package or of a study."""
    for package in ("gradreg_optax.experiments", "studies"):
        if importlib.util.find_spec(package) and importlib.util.find_spec(f"{package}.{command}"):
            return importlib.import_module(f"{package}.{command}")
    raise ModuleNotFoundError(f"conf.py: no module for the results of {command!r}")


# Norms and primes as high as a letter, as TeX sets them.
BAR = '<mo stretchy="false" lspace="0" rspace="0">\u2016</mo>'
PRIME = '<mo stretchy="false" lspace="0" rspace="0">\u2032</mo>'


def formula(as_block):
    """Write formulas as MathML, which needs no script; one in error is a warning."""

    def visit(translator, node):
        tex = re.sub(r"\\([bB]igg?)(?![A-Za-z])", r"\\\1l", node.astext())  # \big: not in docutils
        try:
            markup = tex2mathml(tex, as_block=as_block)
            translator.body.append(
                markup.replace("<mo>\u2016</mo>", BAR).replace("<mo>'</mo>", PRIME)
            )
        except MathError as error:
            logging.getLogger(__name__).warning("formula %r: %s", tex, error, location=node)
        raise nodes.SkipNode

    return visit, None


def link_notebooks(app, docname, source):
    """Links to notebooks hold in the repository; here the notebooks are pages under docs/."""
    source[0] = re.sub(
        r"(\]\((?:\.\./)*)\.\./(?:studies/)?notebooks/(?=[^)]*\.ipynb)", r"\1notebooks/", source[0]
    )


ARRAY_LIKE = (
    r"~[\w.]*Array \| ~numpy\.ndarray \| ~numpy\.bool \| ~numpy\.number \| bool \| int \| float"
)
ARRAY_LIKE += r" \| complex"


def short_types(app, what, name, obj, options, signature, returns):
    """Show ``ArrayLike`` and ``Schedule`` by name; autodoc expands aliases of types."""
    if signature is None:
        return None
    signature = re.sub(ARRAY_LIKE, "ArrayLike", signature)
    schedule = r"~collections\.abc\.Callable\[\[~[\w.]*Array\], ArrayLike\]"
    return re.sub(schedule, "Schedule", signature), returns


def setup(app):
    """Copy the notebooks to where Sphinx finds them, and register the above."""
    target = HERE / "notebooks"
    target.mkdir(exist_ok=True)
    for notebook in (*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("studies/notebooks/*.ipynb")):
        shutil.copy2(notebook, target)
    app.add_html_math_renderer("mathml", formula(as_block=False), formula(as_block=True))
    app.config.html_math_renderer = "mathml"
    app.add_directive("results-table", ResultsTable)
    app.connect("source-read", link_notebooks)
    app.connect("autodoc-process-signature", short_types)
