"""The site's configuration: ``uv run sphinx-build -W docs build/site``."""

import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))
PROJECT = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]

project = PROJECT["name"]
author = PROJECT["authors"][0]["name"]
project_copyright = author

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "house",
]
exclude_patterns = ["_ext"]
nitpicky = True
# Types of other packages and the aliases of our own are named, not linked.
nitpick_ignore_regex = [("py:(class|obj|exc|data|attr)", ".*"), ("py:func", "(jax|optax|nnx).*")]

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks come with their outputs; the tests execute them

autodoc_typehints = "none"  # the arguments are described in words
autodoc_member_order = "bysource"
napoleon_use_ivar = True
napoleon_attr_annotations = False
python_maximum_signature_line_length = 88
viewcode_line_numbers = True
intersphinx_mapping: dict[str, tuple[str, None]] = {}  # the build needs no network

html_theme = "furo"
html_title = "gradreg_optax"
html_baseurl = PROJECT["urls"]["Documentation"]
html_static_path = ["_static"]
html_css_files = ["house.css"]
html_show_sphinx = False
html_theme_options = {
    "source_edit_link": PROJECT["urls"]["Repository"] + "/edit/main/docs/{filename}",
    "footer_icons": [
        {"name": "Source", "url": PROJECT["urls"]["Repository"], "html": "Source", "class": ""}
    ],
}
