"""Gradient regularization for JAX and Optax."""

from gradreg_optax import curvature
from gradreg_optax._estimators import adaptive, masked, normalized
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
