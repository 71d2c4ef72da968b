"""The site builds without a warning, its links resolve, and the reference is complete."""

import html.parser
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys
import urllib.parse
import zlib

import pytest

import gradreg_optax

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("**/*.md")), ROOT / "CONTRIBUTING.md"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site. Warnings are errors, such as missing references and broken formulas."""
    for module in ("sphinx", "myst_nb", "furo"):
        pytest.importorskip(module)
    out = tmp_path_factory.mktemp("built") / "site"
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "docs", str(out)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert built.returncode == 0, built.stderr
    return out


class Page(html.parser.HTMLParser):
    """The anchors, the links and the loaded files of a page."""

    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loads = set(), set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[name] for name in ("id", "name") if attrs.get(name)}
        if tag == "a" and attrs.get("href"):
            self.links.add(attrs["href"])
        elif tag == "link" and "canonical" not in attrs.get("rel", ""):
            self.loads.add(attrs.get("href", ""))
        elif attrs.get("src"):
            self.loads.add(attrs["src"])


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in site.glob("**/*.html")}


def broken(pages, path, address):
    """Whether an internal link has no file of the site, or no anchor of a page, as its target."""
    url = urllib.parse.urlsplit(address)
    if url.scheme or url.netloc:
        return False
    target = (path.parent / urllib.parse.unquote(url.path)).resolve() if url.path else path
    anchor = urllib.parse.unquote(url.fragment)
    if anchor and target in pages:
        return anchor not in pages[target].anchors
    return not target.is_file()


def test_every_internal_link_and_anchor_resolves(pages):
    unresolved = []
    for path, page in pages.items():
        addresses = sorted(page.links | page.loads)
        unresolved += [(path.name, one) for one in addresses if broken(pages, path, one)]
    assert len(pages) > 20
    assert not unresolved


def test_no_page_loads_anything_from_another_site(pages):
    """Scripts, fonts and figures are local, so the site can be read without a network."""
    loads = set().union(*(page.loads for page in pages.values()))
    assert not {address for address in loads if urllib.parse.urlsplit(address).netloc}


def public_names():
    """Public names by their full name."""
    names = [f"gradreg_optax.{name}" for name in gradreg_optax.__all__ if name != "curvature"]
    for name, value in vars(gradreg_optax.curvature).items():
        if getattr(value, "__module__", "").endswith(".curvature") and not name.startswith("_"):
            names.append(f"gradreg_optax.curvature.{name}")
    return {name: pkgutil.resolve_name(name) for name in names}


PUBLIC = public_names()


def test_every_public_name_is_in_the_reference_with_a_docstring(site):
    """Checked with the inventory that intersphinx reads."""
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    entries = [line.split() for line in zlib.decompress(inventory).decode().splitlines()]
    documented = {entry[0] for entry in entries if entry[3].startswith("reference/api.html")}
    assert set(PUBLIC) <= documented
    assert all(value.__doc__ for value in PUBLIC.values())


SECTIONS = {"Cost:", "Args:", "Returns:", "Raises:", "Example:"}
CHECKING = {"Cost:", "Yields:", "Warns:", "Example:"}  # a context manager without arguments


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_function_states_cost_arguments_errors_and_an_example(name):
    if isinstance(PUBLIC[name], type):  # classes document their attributes
        return
    lines = {line.strip() for line in inspect.getdoc(PUBLIC[name]).splitlines()}
    assert (CHECKING if name.endswith(".checking") else SECTIONS) <= lines


def test_every_test_named_on_a_page_exists():
    """Pages name the tests that hold a guarantee."""
    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"\b(tests/[\w/]+\.py)(?:::(\w+))?", text))
    assert len(named) > 20
    for path, function in named:
        assert (ROOT / path).is_file(), path
        assert f"def {function}" in (ROOT / path).read_text(), f"{path}::{function}"


def test_readme_guide_and_pages_stay_short():
    """README, the guide to choosing, and every page but the reference have a limit of words."""
    limits = {ROOT / "README.md": 750, ROOT / "docs" / "choosing.md": 1100}
    for page in [*PAGES, ROOT / "README.md"]:
        if "reference" not in page.parts:
            assert len(page.read_text().split()) <= limits.get(page, 2000), page
