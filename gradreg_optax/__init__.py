"""Gradient regularization for JAX and Optax."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradreg_optax._public import *  # noqa: F403 (the names, for type checkers)

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """Import the public names on first use, because ``gradreg --help`` needs no JAX."""
    if name == "__all__" or not name.startswith("_"):
        found = vars(importlib.import_module("gradreg_optax._public"))
        public = {key: value for key, value in found.items() if not key.startswith("_")}
        public["__all__"] = sorted(public)
        if name in public:
            return public[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names."""
    return [*__getattr__("__all__"), "__version__"]
