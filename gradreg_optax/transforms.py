"""Optax transformations: regularization for chains.

Which loss: ``loss_fn`` given at construction, with its further arguments picked by name from
``update``'s extra arguments, or Optax's ``value_fn=``. Which gradient: the incoming updates are
taken for the gradient of that same loss, so these transformations come first in a chain; with
``reuse_updates=False`` they evaluate their own gradient and add the penalty to whatever came in.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from gradreg_optax._checks import (
    Check,
    at_step,
    check_ascent,
    check_epsilon,
    check_gamma,
    check_interval,
    check_like,
    check_loss,
    check_mode,
    check_params,
    check_scalar,
    check_schedule,
    check_scheme,
)
from gradreg_optax._convolutions import canonical_convolutions
from gradreg_optax._loss import bind
from gradreg_optax._typing import AscentFn, LossFn, Mode, PyTree, ScalarOrSchedule, Scheme, ValueFn
from gradreg_optax.penalty import (
    adaptive,
    add_penalty,
    ascent_direction,
    difference_product,
    exact_product,
    normalized,
    shift,
)

# A number or schedule with the name that the user knows it by, and what it must satisfy
_Named: TypeAlias = tuple[str, ScalarOrSchedule, Check]
# Estimates H d: (value_fn, params, gradient or None to evaluate it, step) -> product
_Product: TypeAlias = Callable[[ValueFn, PyTree, PyTree | None, jax.Array], PyTree]
# The gradient at the point climbed to: (value_fn, params, gradient, step) -> gradient
_Ahead: TypeAlias = Callable[[ValueFn, PyTree, PyTree, jax.Array], PyTree]


class GradregState(NamedTuple):
    """State of every transformation here.

    Attributes:
      step: number of updates so far, skipped ones included; shape (), int32. Schedules and
        ``interval`` go by it.
    """

    step: jax.Array


def fd_gradreg(
    loss_fn: LossFn | None = None,
    *,
    gamma: ScalarOrSchedule,
    epsilon: ScalarOrSchedule,
    scheme: Scheme = "forward",
    ascent: AscentFn | None = None,
    interval: ArrayLike = 1,
    reuse_updates: bool = True,
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient regularization by a finite difference (F-GR, B-GR, C-GR).

    Turns the gradient :math:`g = \nabla L(\theta)` into an estimate of the gradient of
    :math:`L(\theta) + \tfrac{\gamma}{2}\|\nabla L(\theta)\|^2`, with :math:`d = g` or the direction
    that ``ascent`` makes of it:

    ==========  ==================================================================================================  =====  =====
    scheme      result                                                                                              cost   error
    ==========  ==================================================================================================  =====  =====
    forward     :math:`g + \frac{\gamma}{\epsilon}(\nabla L(\theta+\epsilon d) - g)`                                1      O(ε)
    backward    :math:`g + \frac{\gamma}{\epsilon}(g - \nabla L(\theta-\epsilon d))`                                1      O(ε)
    central     :math:`g + \frac{\gamma}{2\epsilon}(\nabla L(\theta+\epsilon d) - \nabla L(\theta-\epsilon d))`     2      O(ε²)
    ==========  ==================================================================================================  =====  =====

    The cost is in gradient evaluations beyond :math:`g` itself; one more with
    ``reuse_updates=False``, and none on the updates that ``interval`` skips (a ``lax.cond``, which
    a ``vmap`` over the step counter turns into a select that computes both).

    Args:
      loss_fn: ``loss_fn(params, ...)``, a real scalar (or ``(scalar, aux)`` with ``has_aux``); its
        further arguments are picked by name from ``update``'s extra arguments. Without it
        ``update`` needs ``value_fn=``, the loss as a function of the parameters.
      gamma: the regularization coefficient :math:`\gamma \ge 0`, in units of 1 / curvature; a
        number or a schedule of the transformation's own step counter.
      epsilon: the ascent step :math:`\epsilon > 0`, in the same units; a number or a schedule. A
        traced or scheduled negative one is the backward difference; at zero there is no correction.
      scheme: "forward" (the paper's choice), "backward" or "central".
      ascent: the direction :math:`d` as a function ``(gradient, params) -> direction``, such as
        ``normalized``, ``adaptive`` or ``masked(mask)``; by default the gradient itself. Of complex
        parameters it receives the direction of steepest ascent, the conjugate of JAX's gradient.
      interval: apply the penalty on every ``interval``-th update, the first included, with ``gamma
        * interval``.
      reuse_updates: take the incoming updates for :math:`g`. With False :math:`g` is evaluated
        here, and the penalty is added to whatever comes in: after clipping, on another batch, with
        accumulated gradients. A keyword ``reuse_updates=`` of ``update`` overrides this for one
        call.
      has_aux: whether ``loss_fn`` returns ``(value, aux)``; ``value_fn`` always returns the value
        alone.

    Returns:
      A transformation with state :class:`GradregState`. Updates keep their structure, shapes and
      dtypes; the difference is formed in float32 or wider.

    Raises:
      ValueError: gamma < 0, epsilon <= 0, interval < 1 (where concrete), an unknown scheme; at
        ``update`` no parameters, no loss, or parameters hidden by ``optax.masked``.
      TypeError: a loss that is no real scalar, a required argument of the loss that was not passed,
        a wrong ``has_aux``.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from gradreg_optax import fd_gradreg
      >>> def loss_fn(params, x):
      ...     return jnp.sum((params * x) ** 2) / 2
      >>> tx = optax.chain(fd_gradreg(loss_fn, gamma=0.5, epsilon=0.1), optax.sgd(0.1))
      >>> params, x = jnp.array([1.0, 2.0]), jnp.array([1.0, 2.0])
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jax.grad(loss_fn)(params, x), state, params, x=x)
      >>> print(updates.round(3))  # -0.1 (g + 0.5 H g)
      [-0.15 -2.4 ]

    References:
      Karakida et al., *Understanding Gradient Regularization in Deep Learning*, ICML 2023.
    """
    named = ("gamma", gamma, check_gamma), ("epsilon", epsilon, check_epsilon)
    return _difference(
        "fd_gradreg", loss_fn, *named, scheme, ascent, interval, reuse_updates, has_aux
    )


def dbp_gradreg(
    loss_fn: LossFn | None = None,
    *,
    gamma: ScalarOrSchedule,
    mode: Mode = "forward_over_reverse",
    ascent: AscentFn | None = None,
    interval: ArrayLike = 1,
    reuse_updates: bool = True,
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient regularization by double backpropagation (DB): exact, for losses that have second
    derivatives.

    Turns :math:`g = \nabla L(\theta)` into :math:`g + \gamma H d` with :math:`d = g` or what
    ``ascent`` makes of it; for the default this is the gradient of
    :math:`L(\theta) + \tfrac{\gamma}{2}\|\nabla L(\theta)\|^2`.

    Cost: one Hessian-vector product, about two gradients beyond :math:`g`; its primal half is
    shared with :math:`g` where both stand under one ``jit``.

    Args:
      loss_fn: as for :func:`fd_gradreg`.
      gamma: the regularization coefficient :math:`\gamma \ge 0`, a number or a schedule.
      mode: "forward_over_reverse" (``jvp`` of ``grad``), or "reverse_over_reverse", the literal
        double backpropagation, for functions without a forward-mode rule.
      ascent: as for :func:`fd_gradreg`.
      interval: as for :func:`fd_gradreg`.
      reuse_updates: as for :func:`fd_gradreg`. The product is linear in :math:`d`, so after
        clipping it stays sane either way.
      has_aux: as for :func:`fd_gradreg`.

    Returns:
      A transformation with state :class:`GradregState`.

    Raises:
      ValueError: gamma < 0, interval < 1 (where concrete), an unknown mode; at ``update`` as for
        :func:`fd_gradreg`.
      TypeError: a loss whose gradient JAX cannot differentiate; otherwise as for
        :func:`fd_gradreg`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from gradreg_optax import dbp_gradreg
      >>> loss = lambda params: jnp.sum(params**4) / 4
      >>> tx, params = dbp_gradreg(gamma=0.5), jnp.array([1.0, 2.0])
      >>> updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
      >>> print(updates)  # p**3 + 0.5 * 3 p**2 * p**3
      [ 2.5 56. ]

    References:
      Drucker and LeCun, *Improving generalization performance using double backpropagation*, 1992.
      Karakida et al., ICML 2023.
    """
    function = "dbp_gradreg"
    check_mode(function, mode)
    check_ascent(function, ascent)

    def product(
        value_fn: ValueFn, params: PyTree, gradient: PyTree | None, step: jax.Array
    ) -> PyTree:
        del step
        own, _, hessian = exact_product(
            function, lambda p: (jax.grad(value_fn)(p), None), params, mode
        )
        return hessian(
            ascent_direction(function, own if gradient is None else gradient, params, ascent)
        )

    return _penalized(
        function, product, loss_fn, ("gamma", gamma, check_gamma), interval, reuse_updates, has_aux
    )


def flooding(
    loss_fn: LossFn | None = None, *, level: ScalarOrSchedule, has_aux: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Flooding: descends above the flood level and ascends below it.

    Multiplies the updates by :math:`\operatorname{sign}(L(\theta) - b)`, which makes them the
    gradient of :math:`|L(\theta) - b| + b`. One ascent step followed by one descent step of plain
    SGD on the same batch is a regularized step: with step size :math:`\eta` they move
    :math:`\theta` by :math:`-\eta^2 (\nabla L(\theta + \eta g) - g)/\eta`, F-GR's correction with
    :math:`\epsilon = \eta`; descent followed by ascent is B-GR's. That does not hold for different
    batches, or with momentum.

    Cost: no gradient; one evaluation of the loss if ``update`` is not given ``value=``, none
      otherwise.

    Args:
      loss_fn: as for :func:`fd_gradreg`; not needed where ``update`` is given ``value=``, the loss
        at the parameters.
      level: the flood level :math:`b`, in units of the loss; a number or a schedule of the
        transformation's own step counter.
      has_aux: whether ``loss_fn`` returns ``(value, aux)``.

    Returns:
      A transformation with state :class:`GradregState`.

    Raises:
      ValueError: at ``update`` neither ``value=`` nor a loss.
      TypeError: a level or a loss that is no real scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from gradreg_optax import flooding
      >>> tx, params = flooding(level=0.3), jnp.array([1.0, 2.0])
      >>> updates, _ = tx.update(jnp.array([0.5, -0.5]), tx.init(params), params, value=0.1)  # below the level
      >>> print(updates)
      [-0.5  0.5]

    References:
      Ishida et al., *Do We Need Zero Training Loss After Achieving Zero Training Error?*, ICML
      2020. Karakida et al., ICML 2023.
    """
    function = "flooding"
    check_loss(function, loss_fn)
    check_schedule(function, "level", level, check_scalar)

    def update(
        updates: PyTree,
        state: optax.OptState,
        params: PyTree | None = None,
        *,
        value: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, GradregState]:
        if value is None and loss_fn is None and extra_args.get("value_fn") is None:
            raise ValueError(
                "flooding: has no loss: pass update(grads, state, params, value=loss), value_fn=,"
                " or flooding(loss_fn, ...)."
            )
        loss = (
            bind(function, loss_fn, has_aux, params, extra_args)(params)
            if value is None
            else check_scalar(function, "value", value)
        )
        sign = jnp.sign(loss - at_step(function, "level", level, check_scalar, state.step))
        return jax.tree.map(lambda u: sign.astype(jnp.result_type(u)) * u, updates), _advance(state)

    # Needs no parameters where update is given value=, so that optax.masked may stand around it.
    return optax.GradientTransformationExtraArgs(lambda params: _start(), update)


def sam(
    loss_fn: LossFn | None = None,
    *,
    rho: ScalarOrSchedule,
    interval: ArrayLike = 1,
    reuse_updates: bool = True,
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Sharpness-aware minimization: the gradient at the worst point nearby,
    :math:`\nabla L(\theta + \rho\, g/\|g\|)`.

    It is :func:`fd_gradreg` along :func:`normalized` with :math:`\gamma = \epsilon = \rho`, where
    :math:`g` drops out of the result. A zero gradient stays zero. With ``interval`` = k the
    difference to :math:`g` is taken on every k-th update and weighted by k.

    Cost: one gradient beyond :math:`g`; the memory of one.

    Args:
      loss_fn: as for :func:`fd_gradreg`.
      rho: the radius :math:`\rho > 0`, in units of the parameters; a number or a schedule.
      interval: as for :func:`fd_gradreg`.
      reuse_updates: as for :func:`fd_gradreg`.
      has_aux: as for :func:`fd_gradreg`.

    Returns:
      A transformation with state :class:`GradregState`.

    Raises:
      ValueError: rho <= 0 or interval < 1 (where concrete); otherwise as for :func:`fd_gradreg`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from gradreg_optax import sam
      >>> loss, params = lambda params: jnp.sum(params**2) / 2, jnp.array([3.0, 4.0])
      >>> tx = sam(rho=0.5)
      >>> updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
      >>> print(updates)  # params + 0.5 * [.6, .8]
      [3.3 4.4]

    References:
      Foret et al., *Sharpness-Aware Minimization for Efficiently Improving Generalization*, ICLR
      2021.
    """
    radius = ("rho", rho, check_epsilon)
    return _difference(
        "sam", loss_fn, radius, radius, "forward", normalized, interval, reuse_updates, has_aux
    )


def asam(
    loss_fn: LossFn | None = None,
    *,
    rho: ScalarOrSchedule,
    interval: ArrayLike = 1,
    reuse_updates: bool = True,
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive SAM: :math:`\nabla L(\theta + \rho\, \theta^2 g / \||\theta| g\|)`, which does not
    depend on how layers are scaled.

    It is :func:`fd_gradreg` along :func:`adaptive` with :math:`\gamma = \epsilon = \rho`.

    Cost: one gradient beyond :math:`g`.

    Args:
      loss_fn: as for :func:`fd_gradreg`.
      rho: the radius :math:`\rho > 0`, relative to the parameters; a number or a schedule.
      interval: as for :func:`fd_gradreg`.
      reuse_updates: as for :func:`fd_gradreg`.
      has_aux: as for :func:`fd_gradreg`.

    Returns:
      A transformation with state :class:`GradregState`.

    Raises:
      ValueError: rho <= 0 or interval < 1 (where concrete); otherwise as for :func:`fd_gradreg`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from gradreg_optax import asam
      >>> loss, params = lambda params: jnp.sum(params**2) / 2, jnp.array([3.0, 0.0])
      >>> tx = asam(rho=0.5)
      >>> updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
      >>> print(updates)  # 3 (1 + 0.5)
      [4.5 0. ]

    References:
      Kwon et al., *ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep
      Neural Networks*, ICML 2021.
    """
    radius = ("rho", rho, check_epsilon)
    return _difference(
        "asam", loss_fn, radius, radius, "forward", adaptive, interval, reuse_updates, has_aux
    )


def gradient_norm_penalty(
    loss_fn: LossFn | None = None,
    *,
    gamma: ScalarOrSchedule,
    epsilon: ScalarOrSchedule,
    scheme: Scheme = "forward",
    interval: ArrayLike = 1,
    reuse_updates: bool = True,
    has_aux: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Penalty on the plain norm (GNP): the gradient of
    :math:`L(\theta) + \gamma \|\nabla L(\theta)\|`, by a finite difference.

    It is :func:`fd_gradreg` along :func:`normalized`, :math:`g + \frac{\gamma}{\epsilon}(\nabla
    L(\theta + \epsilon g/\|g\|) - g)` for the forward scheme; with :math:`\gamma =
    \epsilon` it is :func:`sam`.

    Cost: as for :func:`fd_gradreg`.

    Args:
      loss_fn: as for :func:`fd_gradreg`.
      gamma: the weight of the norm :math:`\gamma \ge 0`, in units of the parameters; a number or a
        schedule.
      epsilon: the length of the ascent step :math:`\epsilon > 0`, in units of the parameters; a
        number or a schedule.
      scheme: "forward", "backward" or "central".
      interval: as for :func:`fd_gradreg`.
      reuse_updates: as for :func:`fd_gradreg`.
      has_aux: as for :func:`fd_gradreg`.

    Returns:
      A transformation with state :class:`GradregState`.

    Raises:
      ValueError: as for :func:`fd_gradreg`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from gradreg_optax import gradient_norm_penalty
      >>> loss, params = lambda params: jnp.sum(params**2) / 2, jnp.array([3.0, 4.0])
      >>> tx = gradient_norm_penalty(gamma=1.0, epsilon=0.5)
      >>> updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params, value_fn=loss)
      >>> print(updates)  # g + H g / |g|
      [3.6 4.8]

    References:
      Zhao, Zhang, Hu, *Penalizing Gradient Norm for Efficiently Improving Generalization in Deep
      Learning*, ICML 2022.
    """
    named = ("gamma", gamma, check_gamma), ("epsilon", epsilon, check_epsilon)
    return _difference(
        "gradient_norm_penalty",
        loss_fn,
        *named,
        scheme,
        normalized,
        interval,
        reuse_updates,
        has_aux,
    )


def _difference(
    function: str,
    loss_fn: LossFn | None,
    gamma: _Named,
    epsilon: _Named,
    scheme: Scheme,
    ascent: AscentFn | None,
    interval: ArrayLike,
    reuse_updates: bool,
    has_aux: bool,
) -> optax.GradientTransformationExtraArgs:
    """A transformation that estimates H d by a difference."""
    check_scheme(function, scheme)
    check_ascent(function, ascent)
    check_schedule(function, *epsilon)

    def product(
        value_fn: ValueFn, params: PyTree, gradient: PyTree | None, step: jax.Array
    ) -> PyTree:
        grad_fn = jax.grad(value_fn)
        if gradient is None:
            gradient = grad_fn(params)
        direction = ascent_direction(function, gradient, params, ascent)
        return difference_product(
            grad_fn, params, gradient, direction, at_step(function, *epsilon, step), scheme
        )

    def ahead(value_fn: ValueFn, params: PyTree, gradient: PyTree, step: jax.Array) -> PyTree:
        direction = ascent_direction(function, gradient, params, ascent)
        return jax.grad(value_fn)(shift(params, direction, at_step(function, *epsilon, step)))

    # SAM: where gamma is epsilon, g + (gamma / epsilon) (ahead - g) is the gradient ahead, and g
    # need not be kept for it.
    sharp = ahead if gamma is epsilon else None
    return _penalized(function, product, loss_fn, gamma, interval, reuse_updates, has_aux, sharp)


def _penalized(
    function: str,
    product: _Product,
    loss_fn: LossFn | None,
    gamma: _Named,
    interval: ArrayLike,
    reuse_updates: bool,
    has_aux: bool,
    ahead: _Ahead | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A transformation that adds gamma H d on every ``interval``-th update, or puts what is
    ``ahead`` in the place of every update.
    """
    check_loss(function, loss_fn)
    check_schedule(function, *gamma)
    interval = check_interval(function, interval)
    reuse_by_default = reuse_updates

    def update(
        updates: PyTree,
        state: optax.OptState,
        params: PyTree | None = None,
        *,
        reuse_updates: bool = reuse_by_default,
        **extra_args: Any,
    ) -> tuple[PyTree, GradregState]:
        value_fn = bind(function, loss_fn, has_aux, params, extra_args)
        check_like(function, "updates", updates, params)
        coefficient = at_step(function, *gamma, state.step) * jnp.asarray(interval)

        def penalize(updates: PyTree) -> PyTree:
            estimate = product(value_fn, params, updates if reuse_updates else None, state.step)
            return add_penalty(updates, coefficient, estimate)

        if isinstance(interval, int) and interval == 1:
            if ahead is not None and reuse_updates:
                gradient = ahead(value_fn, params, updates, state.step)
                return jax.tree.map(
                    lambda g, u: g.astype(jnp.result_type(u)), gradient, updates
                ), _advance(state)
            return penalize(updates), _advance(state)
        due = state.step % jnp.asarray(interval).astype(state.step.dtype) == 0
        return jax.lax.cond(
            due, canonical_convolutions(penalize), lambda updates: updates, updates
        ), _advance(state)

    return optax.GradientTransformationExtraArgs(lambda params: _init(function, params), update)


def _init(function: str, params: PyTree) -> GradregState:
    check_params(function, params)
    return _start()


def _start() -> GradregState:
    return GradregState(step=jnp.zeros([], jnp.int32))


def _advance(state: optax.OptState) -> GradregState:
    return GradregState(step=optax.safe_increment(state.step))
