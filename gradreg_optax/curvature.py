r"""What regularization does to the loss surface: Hessian products, eigenvalue, trace, sharpness,
and the error of a difference.

Everywhere ``value_fn(params)`` is a real scalar, with batch and other arguments closed over, and
:math:`H = \nabla^2 L` is its Hessian with respect to real parameters. Estimates carry their error.
All functions can be jitted and vmapped.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from gradreg_optax._batch import split_batch
from gradreg_optax._checks import check_epsilon, check_scheme
from gradreg_optax._convolutions import canonical_convolutions
from gradreg_optax._loss import with_aux
from gradreg_optax._typing import LossFn, PyTree, Scalar, Scheme, ValueFn
from gradreg_optax.penalty import (
    ascent_direction,
    difference_product,
    exact_product,
    global_norm,
    normalized,
    shift,
)


class Eigenvalue(NamedTuple):
    r"""An eigenvalue with its residual.

    Attributes:
      value: the Ritz value :math:`\lambda`; shape ().
      residual: :math:`\|H x - \lambda x\|` at the unit Ritz vector; an eigenvalue of H lies within
        it of ``value``. Shape ().
    """

    value: jax.Array
    residual: jax.Array


class Trace(NamedTuple):
    """A Monte-Carlo estimate of a trace.

    Attributes:
      mean: the estimate; shape ().
      standard_error: its standard error; shape ().
    """

    mean: jax.Array
    standard_error: jax.Array


class DifferenceError(NamedTuple):
    r"""How well a finite difference estimates :math:`Hg`.

    Attributes:
      relative_error: :math:`\|\text{difference} - Hg\| / \|Hg\|`; shape ().
      unmoved: share of the parameters that the ascent step does not move, their gradient not being
        zero, because the sum is rounded back to where it was; shape (), in [0, 1].
    """

    relative_error: jax.Array
    unmoved: jax.Array


def hessian_vector_product(value_fn: ValueFn, params: PyTree, vector: PyTree) -> PyTree:
    """The product of the Hessian with a vector, by ``jvp`` of ``grad``; costs about two gradients.

    Args:
      value_fn: the loss as a function of the parameters.
      params: the parameters.
      vector: a tree like ``params``.

    Returns:
      A tree like ``params``.

    Raises:
      TypeError: a loss that is no real scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from gradreg_optax.curvature import hessian_vector_product
      >>> print(hessian_vector_product(lambda p: jnp.sum(p**3), jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0])))
      [ 6. 12.]
    """
    tangent = jax.tree.map(lambda v, p: jnp.asarray(v, jnp.result_type(p)), vector, params)
    return jax.jvp(_gradient(value_fn, "hessian_vector_product"), (params,), (tangent,))[1]


def gradient_norm(value_fn: ValueFn, params: PyTree) -> jax.Array:
    r"""The norm :math:`\|\nabla L(\theta)\|` over all leaves, in float32 or wider; costs one
    gradient.

    Args:
      value_fn: the loss as a function of the parameters.
      params: the parameters.

    Returns:
      A scalar.

    Raises:
      TypeError: a loss that is no real scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from gradreg_optax.curvature import gradient_norm
      >>> print(gradient_norm(lambda p: jnp.sum(p**2) / 2, jnp.array([3.0, 4.0])))
      5.0
    """
    return global_norm(_gradient(value_fn, "gradient_norm")(params))


def top_hessian_eigenvalue(
    value_fn: ValueFn, params: PyTree, key: jax.Array, *, num_matvecs: int = 30
) -> Eigenvalue:
    r"""The largest algebraic eigenvalue of the Hessian, by the Lanczos iteration with full
    reorthogonalisation.

    The largest Ritz value approaches it from below, and an eigenvalue of H lies within ``residual``
    of it. Where the Krylov space is exhausted (repeated eigenvalues, a Hessian of low rank) the
    iteration goes on from a random direction. Costs ``num_matvecs`` + 1 Hessian-vector products and
    the memory of ``num_matvecs`` copies of the parameters.

    Args:
      value_fn: the loss as a function of the parameters.
      params: the parameters; complex ones count as pairs of real ones.
      key: a key for the random start.
      num_matvecs: dimension of the Krylov space, cut at the number of parameters.

    Returns:
      ``Eigenvalue(value, residual)``.

    Raises:
      ValueError: num_matvecs < 1.
      TypeError: a loss that is no real scalar.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from gradreg_optax.curvature import top_hessian_eigenvalue
      >>> value, residual = top_hessian_eigenvalue(lambda p: p @ (jnp.array([1.0, -7.0, 3.0]) * p) / 2, jnp.ones(3), jax.random.key(0))
      >>> print(value.round(4), residual < 1e-4)
      3.0 True

    References:
      Lanczos, *An iteration method for the solution of the eigenvalue problem*, 1950.
    """
    if num_matvecs < 1:
        raise ValueError(
            f"top_hessian_eigenvalue: num_matvecs must be at least 1, got {num_matvecs}: 30 is the"
            " default."
        )
    product, size, dtype = _flat_product(value_fn, params, "top_hessian_eigenvalue")
    basis, projection = _krylov(
        product, jax.random.normal(key, (min(num_matvecs, size), size), dtype)
    )
    _, vectors = jnp.linalg.eigh(projection, UPLO="U", symmetrize_input=False)
    vector = _unit(_dot(vectors[:, -1], basis))
    image = product(vector)
    value = _dot(vector, image)
    return Eigenvalue(value, jnp.linalg.norm(image - value * vector))


def hessian_trace(
    value_fn: ValueFn, params: PyTree, key: jax.Array, *, num_samples: int = 30
) -> Trace:
    r"""The trace of the Hessian, by Hutchinson's estimator
    :math:`\operatorname{tr} H = \mathbb{E}\, z^\top H z` with random signs z.

    Costs ``num_samples`` Hessian-vector products, one after the other.

    Args:
      value_fn: the loss as a function of the parameters.
      params: the parameters; complex ones count as pairs of real ones.
      key: a key for the random signs.
      num_samples: number of samples, at least two.

    Returns:
      ``Trace(mean, standard_error)``.

    Raises:
      ImportError: matfree is not installed.
      ValueError: fewer than two samples, which carry no error.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from gradreg_optax.curvature import hessian_trace
      >>> mean, error = hessian_trace(lambda p: jnp.sum(p**2), jnp.ones(3), jax.random.key(0))
      >>> print(f"{mean:.3f}", error < 1e-5)  # of a diagonal Hessian every sample is exact
      6.000 True

    References:
      Hutchinson, *A stochastic estimator of the trace of the influence matrix*, 1990. The integrand
      is matfree's.
    """
    if num_samples < 2:
        raise ValueError(
            f"hessian_trace: num_samples must be at least 2, got {num_samples}: one sample carries"
            " no error."
        )
    (stochtrace,) = _matfree("stochtrace")
    product, size, dtype = _flat_product(value_fn, params, "hessian_trace")
    sampler = stochtrace.sampler_signs(jnp.zeros(size, dtype), num=1)
    one = stochtrace.estimator_monte_carlo(stochtrace.monte_carlo_trace(), sampler)
    samples = jax.lax.map(lambda k: one(product, k), jax.random.split(key, num_samples))
    return Trace(jnp.mean(samples), jnp.std(samples, ddof=1) / jnp.sqrt(num_samples))


def perturbed_sharpness(value_fn: ValueFn, params: PyTree, rho: Scalar) -> jax.Array:
    r"""The sharpness :math:`L(\theta + \rho\, g/\|g\|) - L(\theta)`; zero where the gradient is
    zero.

    Costs one gradient and one evaluation of the loss.

    Args:
      value_fn: the loss as a function of the parameters.
      params: the parameters.
      rho: length of the step, in units of the parameters; negative steps descend.

    Returns:
      A scalar.

    Raises:
      TypeError: a loss that is no real scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from gradreg_optax.curvature import perturbed_sharpness
      >>> print(perturbed_sharpness(lambda p: jnp.sum(p**2) / 2, jnp.array([3.0, 4.0]), 1.0))  # (6**2 - 5**2) / 2
      5.5

    References:
      Foret et al., *Sharpness-Aware Minimization*, ICLR 2021.
    """
    loss = with_aux("perturbed_sharpness", value_fn, has_aux=False)
    (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    direction = ascent_direction("perturbed_sharpness", gradient, params, normalized)
    sharpness: jax.Array = loss(shift(params, direction, jnp.asarray(rho)))[0] - value
    return sharpness


def difference_error(
    value_fn: ValueFn, params: PyTree, epsilon: Scalar, scheme: Scheme = "forward"
) -> DifferenceError:
    r"""Tells in one call whether an ascent step is lost in rounding, or too long for the difference
    to be the product.

    Compares the difference along :math:`g` with the exact product :math:`Hg` in the precision of
    ``params``. In float32 the sweet spot is usually :math:`\epsilon` from 1e-3 to 1e-1; in bfloat16
    the rounding swamps all but large steps. Beyond the sweet spot a *truncation* error is no
    defect: F-GR often generalizes best there.

    Args:
      value_fn: the loss as a function of the parameters.
      params: the parameters.
      epsilon: the ascent step.
      scheme: "forward", "backward" or "central".

    Returns:
      ``DifferenceError(relative_error, unmoved)``. Where :math:`Hg = 0` the error is not relative
      but absolute.

    Raises:
      ValueError: epsilon <= 0 (where concrete), or an unknown scheme.
      TypeError: a loss that is no real scalar or has no second derivative.

    Example:
      >>> import jax.numpy as jnp
      >>> from gradreg_optax.curvature import difference_error
      >>> print(difference_error(lambda p: jnp.sum(p**2), jnp.array([1.0, 2.0]), 1e-9).unmoved)  # 1 + 2e-9 == 1
      1.0
    """
    function = "difference_error"
    check_scheme(function, scheme)
    step = check_epsilon(function, "epsilon", epsilon)
    grad_fn = _gradient(value_fn, function)
    gradient, _, product = exact_product(
        function, lambda p: (grad_fn(p), None), params, "forward_over_reverse"
    )
    direction = ascent_direction(function, gradient, params, None)
    exact = product(direction)
    estimate = difference_product(grad_fn, params, gradient, direction, step, scheme)
    error = global_norm(jax.tree.map(lambda a, b: a - b.astype(a.dtype), estimate, exact))
    size = global_norm(exact)
    moved = shift(params, direction, -step if scheme == "backward" else step)
    wanted = sum(jnp.sum(d != 0) for d in jax.tree.leaves(direction))
    lost = sum(
        jnp.sum((d != 0) & (m == p))
        for d, m, p in zip(*map(jax.tree.leaves, (direction, moved, params)), strict=True)
    )
    return DifferenceError(error / jnp.where(size > 0, size, 1), lost / jnp.maximum(wanted, 1))


class PenaltyScale(NamedTuple):
    r"""How gamma shrinks when the penalty moves to a part of the batch.

    Attributes:
      factor: ``whole / part``, the factor on gamma; shape (), in [0, 1]. Where all gradients are
        zero it is 1.
      whole: :math:`\|g_B\|^2`, the squared norm of the batch's gradient; shape ().
      part: the mean of :math:`\|g_b\|^2` over the batch's disjoint parts; shape ().
    """

    factor: jax.Array
    whole: jax.Array
    part: jax.Array


def penalty_scale(
    loss_fn: LossFn, params: PyTree, batch: PyTree, *, penalty_fraction: float
) -> PenaltyScale:
    r"""The factor on gamma that keeps the penalty as strong as it was when it is taken on a
    fraction of the batch.

    On b samples drawn at random, whose gradients have mean :math:`\bar g` and covariance
    :math:`\Sigma`, the penalty is on average :math:`\tfrac{\gamma}{2} \mathbb{E}\|g_b\|^2 =
    \tfrac{\gamma}{2} (\|\bar g\|^2 + \operatorname{tr}\Sigma / b)`. Moving from the batch of B
    samples to fB of them, it stays the same with :math:`\gamma` times

    .. math:: \frac{\mathbb{E}\|g_B\|^2}{\mathbb{E}\|g_{fB}\|^2}
      = \frac{\|\bar g\|^2 + \operatorname{tr}\Sigma / B}{\|\bar g\|^2 + \operatorname{tr}\Sigma /
      (fB)} \in [f, 1],

    which is f where the noise dominates, and 1 where all samples agree. Here it is estimated from
    one batch and its 1/f disjoint parts. One batch is noisy: average ``whole`` and ``part`` over a
    few batches, with ``vmap`` say, and divide the averages. The same factor serves
    ``ascent_groups`` = 1/f, where every group is penalised.

    Costs one gradient of the batch, part by part; the gradient of the whole is the mean of those of
    its parts.

    Args:
      loss_fn: ``loss_fn(params, batch)``, the mean over the batch's samples, a real scalar.
      params: the parameters.
      batch: the batch, whose samples are in no particular order.
      penalty_fraction: the fraction f, one over a whole number that divides the batch.

    Returns:
      ``PenaltyScale(factor, whole, part)``.

    Raises:
      ValueError: a fraction that is not one over a whole number, or that does not divide the batch.
      TypeError: a loss that is no real scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from gradreg_optax.curvature import penalty_scale
      >>> loss_fn = lambda params, batch: jnp.mean(batch @ params)  # its gradient is the batch's mean
      >>> batch = jnp.array([[3.0, 1.0], [3.0, -1.0], [3.0, 1.0], [3.0, -1.0]])
      >>> print(penalty_scale(loss_fn, jnp.zeros(2), batch, penalty_fraction=0.25))  # 9 / (9 + 1)
      PenaltyScale(factor=Array(0.9, dtype=float32), whole=Array(9., dtype=float32), part=Array(10.,
      dtype=float32))
    """
    function = "penalty_scale"
    parts = round(1 / penalty_fraction) if 0 < penalty_fraction <= 1 else 0
    if not parts or abs(parts * penalty_fraction - 1) > 1e-6:
        raise ValueError(
            f"{function}: penalty_fraction must be one over a whole number, such as 0.25, got"
            f" {penalty_fraction}."
        )
    groups = split_batch(function, "1 / penalty_fraction", batch, parts)
    gradients = jax.vmap(lambda group: _gradient(lambda p: loss_fn(p, group), function)(params))(
        groups
    )
    part = jnp.mean(jax.vmap(global_norm)(gradients) ** 2)
    whole = global_norm(jax.tree.map(lambda g: jnp.mean(g, axis=0), gradients)) ** 2
    return PenaltyScale(jnp.where(part > 0, whole / jnp.where(part > 0, part, 1), 1), whole, part)


def _gradient(value_fn: ValueFn, function: str) -> Callable[[PyTree], PyTree]:
    loss = with_aux(function, value_fn, has_aux=False)
    return jax.grad(lambda params: loss(params)[0])


def _flat_product(
    value_fn: ValueFn, params: PyTree, function: str
) -> tuple[Callable[[jax.Array], jax.Array], int, Any]:
    """The Hessian-vector product on one real vector, in float32 or wider, with its size and
    dtype.
    """
    params = jax.tree.map(jnp.asarray, params)
    parts = jax.tree.map(lambda p: (p.real, p.imag) if jnp.iscomplexobj(p) else p, params)
    flat, unravel = ravel_pytree(
        jax.tree.map(lambda p: p.astype(jnp.promote_types(p.dtype, jnp.float32)), parts)
    )

    def whole(vector: jax.Array) -> PyTree:
        return jax.tree.map(
            lambda p, part: (jax.lax.complex(*part) if jnp.iscomplexobj(p) else part).astype(
                p.dtype
            ),
            params,
            unravel(vector),
        )

    grad_fn = _gradient(lambda vector: value_fn(whole(vector)), function)
    return (
        canonical_convolutions(lambda vector: jax.jvp(grad_fn, (flat,), (vector,))[1]),
        flat.size,
        flat.dtype,
    )


def _krylov(
    product: Callable[[jax.Array], jax.Array], noise: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """An orthonormal basis of a Krylov space, as rows, and the upper triangle of the product
    projected on it.

    Row i of ``noise`` takes over where the i-th direction is lost in rounding. (matfree's iteration
    divides by zero there.)
    """
    count, size = noise.shape
    lost = 10 * np.finfo(noise.dtype).eps

    def reject(basis: jax.Array, vector: jax.Array) -> jax.Array:
        return vector - _dot(_dot(basis, vector), basis)

    def extend(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        basis, projection, image = carry
        rest = reject(basis, image)
        known = jnp.linalg.norm(rest) > lost * jnp.linalg.norm(image)
        vector = _unit(reject(basis, _unit(jnp.where(known, rest, noise[i]))))
        vector = _unit(reject(basis, vector))
        basis = basis.at[i].set(vector)
        image = product(vector)
        return basis, projection.at[:, i].set(_dot(basis, image)), image

    empty = (
        jnp.zeros((count, size), noise.dtype),
        jnp.zeros((count, count), noise.dtype),
        jnp.zeros(size, noise.dtype),
    )
    basis, projection, _ = jax.lax.fori_loop(0, count, extend, empty)
    return basis, projection


def _unit(vector: jax.Array) -> jax.Array:
    unit: jax.Array = vector / jnp.linalg.norm(vector)
    return unit


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, precision="highest")


def _matfree(*modules: str) -> list[Any]:
    try:
        return [importlib.import_module(f"matfree.{name}") for name in modules]
    except ImportError as error:
        raise ImportError(
            'hessian_trace needs matfree: pip install "gradreg-optax[curvature]".'
        ) from error
