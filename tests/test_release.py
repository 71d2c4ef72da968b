"""What is released: one version everywhere, and distributions with what users need and no more."""

import pathlib
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

import gradreg_optax

ROOT = pathlib.Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The wheel and the source distribution, built as a release builds them."""
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def test_the_version_is_the_same_everywhere():
    version = gradreg_optax.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    sections = re.findall(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[0] == version


def test_the_wheel_holds_the_package_and_nothing_else(distributions):
    wheel, _ = distributions
    names = zipfile.ZipFile(wheel).namelist()
    version = gradreg_optax.__version__
    folders = {name.split("/")[0] for name in names}
    assert folders == {"gradreg_optax", f"gradreg_optax-{version}.dist-info"}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "gradreg_optax").glob("**/*.py")}
    assert sources | {"gradreg_optax/py.typed"} <= set(names)


def test_the_source_distribution_can_be_tested_and_read(distributions):
    """Tests, pages, notebooks with their results; no copy that the site makes, nothing hidden."""
    _, source = distributions
    with tarfile.open(source) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    for folder in ("tests", "docs", "notebooks", "examples", "benchmarks"):
        listing = ["git", "ls-files", folder]
        tracked = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=False)
        assert set(tracked.stdout.split()) <= names
        assert any(name.startswith(folder + "/") for name in names)
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "pyproject.toml"} <= names
    assert not [name for name in names if name.startswith(("docs/notebooks/", "build/", ".venv"))]


def test_links_of_the_readme_hold_on_pypi(distributions):
    """They are absolute there, and lead to files of the repository that is named once."""
    wheel, _ = distributions
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith("/METADATA")]
        text = archive.read(name).decode()
    links = re.findall(r"\]\((.*?)\)", text)
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    owner = urls["Repository"].removeprefix("https://github.com/")
    assert links
    for link in links:
        assert link.startswith("https://")
        if owner in link:
            assert (ROOT / link.split("/main/")[1].partition("#")[0]).exists()


def test_the_distributions_pass_twine(distributions):
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, distributions)]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert checked.returncode == 0, checked.stdout


def test_every_python_that_is_claimed_is_tested():
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    claimed = [c.split(" :: ")[-1] for c in classifiers if re.search(r":: Python :: 3\.\d+", c)]
    matrix = ", ".join(f'"{version}"' for version in claimed)
    assert f"python: [{matrix}]" in (ROOT / ".github/workflows/ci.yml").read_text()


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_every_action_is_pinned_by_commit(workflow):
    used = re.findall(r"uses: (\S+)(.*)", workflow.read_text())
    assert used
    for action, comment in used:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action)
        assert re.fullmatch(r" # v[\d.]+", comment)
