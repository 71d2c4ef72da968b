"""The studies are trained by the nightly job: their tests that train are slow."""

import pathlib

import pytest

HERE = pathlib.Path(__file__).parent
TRAINED = {"found", "made", "measured", "trained"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and TRAINED & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
