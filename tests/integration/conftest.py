"""Other people's networks broadcast as NumPy does, so here JAX may."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _broadcasting_as_in_numpy():
    with jax.numpy_rank_promotion("allow"):
        yield
