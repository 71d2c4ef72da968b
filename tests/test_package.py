"""The package's namespace: public names only, imported on first use."""

import inspect
import subprocess
import sys
import typing

import pytest

import gradreg_optax


def test_every_public_name_is_there_and_no_other_is_listed():
    assert {"curvature", "fd_gradreg", "make_train_step"} < set(gradreg_optax.__all__)
    assert sorted(gradreg_optax.__all__) == gradreg_optax.__all__
    assert set(dir(gradreg_optax)) == {*gradreg_optax.__all__, "__version__"}
    for name in gradreg_optax.__all__:
        public = getattr(gradreg_optax, name)
        assert public.__name__.endswith(name)
        if inspect.isfunction(public):  # help() can be read
            assert len(str(inspect.signature(public))) < 400
            assert "return" in typing.get_type_hints(public)
    with pytest.raises(AttributeError, match="has no attribute 'fd_gradregs'"):
        _ = gradreg_optax.fd_gradregs


def test_the_package_alone_imports_no_jax_and_a_star_import_has_every_name():
    code = """
import sys, gradreg_optax
assert "jax" not in sys.modules
from gradreg_optax import *
assert set(gradreg_optax.__all__) <= set(globals())
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
