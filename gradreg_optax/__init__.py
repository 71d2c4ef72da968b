"""Gradient regularization for JAX and Optax."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # names are imported on first use: gradreg --help needs no JAX
    from gradreg_optax import curvature
    from gradreg_optax._ascent import adaptive, masked, normalized
    from gradreg_optax._flax import make_nnx_train_step, nnx_regularized_loss
    from gradreg_optax._gradients import dbp_value_and_grad, fd_value_and_grad
    from gradreg_optax._guard import GradientMismatch, checking
    from gradreg_optax._microbatching import microbatched
    from gradreg_optax._regularized_loss import regularized_loss
    from gradreg_optax._relative import RelativeState, relative_gradreg
    from gradreg_optax._train_step import StepInfo, TrainState, TrainStep, make_train_step
    from gradreg_optax._transforms import (
        GradregState,
        asam,
        dbp_gradreg,
        fd_gradreg,
        flooding,
        gradient_norm_penalty,
        sam,
    )
    from gradreg_optax._types import Weighted

__version__ = "0.2.0"

__all__ = [
    "GradientMismatch",
    "GradregState",
    "RelativeState",
    "StepInfo",
    "TrainState",
    "TrainStep",
    "Weighted",
    "adaptive",
    "asam",
    "checking",
    "curvature",
    "dbp_gradreg",
    "dbp_value_and_grad",
    "fd_gradreg",
    "fd_value_and_grad",
    "flooding",
    "gradient_norm_penalty",
    "make_nnx_train_step",
    "make_train_step",
    "masked",
    "microbatched",
    "nnx_regularized_loss",
    "normalized",
    "regularized_loss",
    "relative_gradreg",
    "sam",
]

_MODULES = {
    "_ascent": ("adaptive", "masked", "normalized"),
    "_flax": ("make_nnx_train_step", "nnx_regularized_loss"),
    "_gradients": ("dbp_value_and_grad", "fd_value_and_grad"),
    "_guard": ("GradientMismatch", "checking"),
    "_microbatching": ("microbatched",),
    "_regularized_loss": ("regularized_loss",),
    "_relative": ("RelativeState", "relative_gradreg"),
    "_train_step": ("StepInfo", "TrainState", "TrainStep", "make_train_step"),
    "_transforms": (
        "GradregState",
        "asam",
        "dbp_gradreg",
        "fd_gradreg",
        "flooding",
        "gradient_norm_penalty",
        "sam",
    ),
    "_types": ("Weighted",),
}
_ORIGINS = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name == "curvature":
        return importlib.import_module(f"{__name__}.curvature")
    if name not in _ORIGINS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(f"{__name__}.{_ORIGINS[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    """List the public names."""
    return [*__all__, "__version__"]
