"""The studies are trained by the nightly job: their tests that train are slow."""

import dataclasses
import pathlib

import pytest

from gradreg_optax.experiments import results

HERE = pathlib.Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and {"found", "measured"} & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module")
def config(request, tmp_path_factory):
    """The small configuration of a test module, with a folder of its own."""
    return dataclasses.replace(request.module.CONFIG, output=tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def found(request, config):
    """What the study of a test module finds, as it comes back from disk."""
    study = request.module.TestStudy.study
    return results.load(results.save(config.output, "study", config, study.run(config)))
