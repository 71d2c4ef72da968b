"""The public names."""

from gradreg_optax import curvature as curvature
from gradreg_optax._ascent import adaptive as adaptive
from gradreg_optax._ascent import masked as masked
from gradreg_optax._ascent import normalized as normalized
from gradreg_optax._flax import make_nnx_train_step as make_nnx_train_step
from gradreg_optax._flax import nnx_regularized_loss as nnx_regularized_loss
from gradreg_optax._gradients import dbp_value_and_grad as dbp_value_and_grad
from gradreg_optax._gradients import fd_value_and_grad as fd_value_and_grad
from gradreg_optax._guard import GradientMismatch as GradientMismatch
from gradreg_optax._guard import checking as checking
from gradreg_optax._microbatching import microbatched as microbatched
from gradreg_optax._regularized_loss import regularized_loss as regularized_loss
from gradreg_optax._relative import RelativeState as RelativeState
from gradreg_optax._relative import relative_gradreg as relative_gradreg
from gradreg_optax._special_cases import asam as asam
from gradreg_optax._special_cases import flooding as flooding
from gradreg_optax._special_cases import gradient_norm_penalty as gradient_norm_penalty
from gradreg_optax._special_cases import sam as sam
from gradreg_optax._train_step import StepInfo as StepInfo
from gradreg_optax._train_step import TrainState as TrainState
from gradreg_optax._train_step import TrainStep as TrainStep
from gradreg_optax._train_step import make_train_step as make_train_step
from gradreg_optax._transforms import GradregState as GradregState
from gradreg_optax._transforms import dbp_gradreg as dbp_gradreg
from gradreg_optax._transforms import fd_gradreg as fd_gradreg
from gradreg_optax._types import Weighted as Weighted
