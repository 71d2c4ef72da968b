"""Gradient regularization for JAX and Optax."""

from gradreg_optax import curvature
from gradreg_optax.gradients import dbp_value_and_grad, fd_value_and_grad
from gradreg_optax.microbatching import microbatched
from gradreg_optax.penalty import adaptive, masked, normalized
from gradreg_optax.training import (
    StepInfo,
    TrainState,
    TrainStep,
    make_nnx_train_step,
    make_train_step,
)
from gradreg_optax.transforms import (
    GradregState,
    asam,
    dbp_gradreg,
    fd_gradreg,
    flooding,
    gradient_norm_penalty,
    sam,
)

__all__ = [
    "GradregState",
    "StepInfo",
    "TrainState",
    "TrainStep",
    "adaptive",
    "asam",
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
    "normalized",
    "sam",
]
