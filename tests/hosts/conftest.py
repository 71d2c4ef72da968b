"""Trainers may broadcast and warn."""

import pathlib
from collections.abc import Iterator

import jax
import pytest

HERE = pathlib.Path(__file__).parent


@pytest.fixture(autouse=True)
def _lenient() -> Iterator[None]:
    with jax.numpy_rank_promotion("allow"):
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))
