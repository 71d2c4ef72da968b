r"""Measurements of the loss surface: Hessian products, eigenvalues, trace, sharpness, difference
error.

``value_fn(params)`` returns a real scalar, with batch and other arguments closed over.
:math:`H = \nabla^2 L` is its Hessian with respect to real parameters. Estimates come with their
error. All functions can be jitted and vmapped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from gradreg_optax import _validation as validation
from gradreg_optax._ascent import ascent_transformation, normalized, stateless
from gradreg_optax._batching import split_batch
from gradreg_optax._convolutions import canonical_convolutions
from gradreg_optax._estimators import Point, difference, product, shift
from gradreg_optax._loss import gradient_fn, mean_of, with_aux, with_weight
from gradreg_optax._numerics import cast, conjugate, global_norm, widen
from gradreg_optax._types import GradFn, LossFn, PyTree, Scalar, Scheme, ValueFn


class Eigenvalue(NamedTuple):
    r"""An eigenvalue with its residual.

    Attributes:
      value: the Ritz value :math:`\lambda`; shape ().
      residual: :math:`\|H x - \lambda x\|` at the unit Ritz vector :math:`x`; the distance of
        ``value`` from an eigenvalue of H is at most this. Shape ().
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
    r"""The error of a finite difference as an estimate of :math:`Hg`.

    Attributes:
      relative_error: :math:`\|\text{difference} - Hg\| / \|Hg\|`; shape ().
      unmoved: the fraction of the parameters with a nonzero gradient that the ascent step leaves
        unchanged because of rounding; shape (), in [0, 1].
    """

    relative_error: jax.Array
    unmoved: jax.Array


def hessian_vector_product(value_fn: ValueFn, params: PyTree, vector: PyTree) -> PyTree:
    r"""Compute the product :math:`H v` of the Hessian and a vector, by ``jvp`` of ``grad``.

    Cost:
      About two gradients.

    Args:
      value_fn: the loss as a function of the parameters.
      params: the parameters.
      vector: the vector :math:`v`, a tree like ``params``.

    Returns:
      A tree like ``params``.

    Raises:
      ValueError: a vector whose structure or shapes are not those of ``params``.
      TypeError: a loss that is not a real scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from gradreg_optax.curvature import hessian_vector_product
      >>> params, ones = jnp.array([1.0, 2.0]), jnp.array([1.0, 1.0])
      >>> print(hessian_vector_product(lambda p: jnp.sum(p**3), params, ones))
      [ 6. 12.]

    References:
      Pearlmutter, *Fast exact multiplication by the Hessian*, Neural Computation 1994.
    """
    caller = "hessian_vector_product"
    grad_fn = _gradient(caller, value_fn, params)
    validation.check_like(caller, "vector", vector, params)
    tangent = jax.tree.map(lambda v, p: cast(jnp.asarray(v), p), vector, params)
    return jax.jvp(grad_fn, (params,), (tangent,), has_aux=True)[1]


def gradient_norm(value_fn: ValueFn, params: PyTree) -> jax.Array:
    r"""Compute the norm :math:`\|\nabla L(\theta)\|` over all leaves, in float32 or wider.

    Cost:
      One gradient.

    Args:
      value_fn: the loss as a function of the parameters.
      params: the parameters.

    Returns:
      The norm, in units of loss / parameters; shape ().

    Raises:
      TypeError: a loss that is not a real scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from gradreg_optax.curvature import gradient_norm
      >>> print(gradient_norm(lambda p: jnp.sum(p**2) / 2, jnp.array([3.0, 4.0])))
      5.0
    """
    return global_norm(_gradient("gradient_norm", value_fn, params)(params)[0])


def top_hessian_eigenvalue(
    value_fn: ValueFn, params: PyTree, key: jax.Array, *, num_matvecs: int = 30
) -> Eigenvalue:
    r"""Estimate the largest (algebraic) eigenvalue of the Hessian by the Lanczos iteration.

    The estimate is the largest Ritz value, which approaches the eigenvalue from below. Its distance
    from some eigenvalue of H is at most ``residual``. If the Krylov space is exhausted (repeated
    eigenvalues, a Hessian of low rank), the iteration continues from a random direction. All
    vectors are reorthogonalised.

    Cost:
      ``num_matvecs`` + 1 Hessian-vector products, about two gradients each, and the memory of
      ``num_matvecs`` copies of the parameters.

    Args:
      value_fn: the loss as a function of the parameters.
      params: the parameters; a complex number counts as two real ones.
      key: a random key for the start.
      num_matvecs: the dimension of the Krylov space, at most the number of parameters.

    Returns:
      ``Eigenvalue(value, residual)``.

    Raises:
      ValueError: num_matvecs < 1.
      TypeError: a loss that is not a real scalar.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from gradreg_optax.curvature import top_hessian_eigenvalue
      >>> loss = lambda p: p @ (jnp.array([1.0, -7.0, 3.0]) * p) / 2
      >>> value, residual = top_hessian_eigenvalue(loss, jnp.ones(3), jax.random.key(0))
      >>> print(value.round(4), residual < 1e-4)
      3.0 True

    References:
      Lanczos, *An iteration method for the solution of the eigenvalue problem*, 1950.
    """
    caller = "top_hessian_eigenvalue"
    num_matvecs = validation.whole_number(caller, "num_matvecs", num_matvecs)
    validation.check_key(caller, key)
    product, size, dtype = _flat_product(caller, value_fn, params)
    noise = jax.random.normal(key, (min(num_matvecs, size), size), dtype)
    basis, projection = _krylov(product, noise)
    _, vectors = jnp.linalg.eigh(projection, UPLO="U", symmetrize_input=False)
    vector = _unit(_dot(vectors[:, -1], basis))
    image = product(vector)
    value = _dot(vector, image)
    return Eigenvalue(value, jnp.linalg.norm(image - value * vector))


def hessian_trace(
    value_fn: ValueFn, params: PyTree, key: jax.Array, *, num_samples: int = 30
) -> Trace:
    r"""Estimate the trace of the Hessian by Hutchinson's method.

    The estimate is the mean of :math:`z^\top H z` over random sign vectors :math:`z`, whose
    expectation is :math:`\operatorname{tr} H`.

    Cost:
      ``num_samples`` Hessian-vector products, about two gradients each, one after the other.

    Args:
      value_fn: the loss as a function of the parameters.
      params: the parameters; a complex number counts as two real ones.
      key: a random key for the signs.
      num_samples: the number of samples, at least two.

    Returns:
      ``Trace(mean, standard_error)``.

    Raises:
      ValueError: fewer than two samples, which have no standard error; empty parameters.
      TypeError: a loss that is not a real scalar.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from gradreg_optax.curvature import hessian_trace
      >>> mean, error = hessian_trace(lambda p: jnp.sum(p**2), jnp.ones(3), jax.random.key(0))
      >>> print(f"{mean:.3f}", error < 1e-5)  # for a diagonal Hessian every sample is exact
      6.000 True

    References:
      Hutchinson, *A stochastic estimator of the trace of the influence matrix*, 1990.
    """
    caller = "hessian_trace"
    num_samples = validation.whole_number(caller, "num_samples", num_samples)
    validation.check_key(caller, key)
    product, size, dtype = _flat_product(caller, value_fn, params)

    def sample(key: jax.Array) -> jax.Array:
        signs = jax.random.rademacher(key, (size,), dtype)
        return _dot(signs, product(signs))

    samples = jax.lax.map(sample, jax.random.split(key, num_samples))
    return Trace(jnp.mean(samples), jnp.std(samples, ddof=1) / num_samples**0.5)


def perturbed_sharpness(value_fn: ValueFn, params: PyTree, rho: Scalar) -> jax.Array:
    r"""Compute the sharpness :math:`L(\theta + \rho\, g/\|g\|) - L(\theta)` along the gradient.

    For a zero gradient it is zero.

    Cost:
      One gradient and one evaluation of the loss.

    Args:
      value_fn: the loss as a function of the parameters.
      params: the parameters.
      rho: the length of the step, in units of the parameters; a negative step descends.

    Returns:
      The sharpness, in units of the loss; shape ().

    Raises:
      TypeError: a loss that is not a real scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from gradreg_optax.curvature import perturbed_sharpness
      >>> loss, params = lambda p: jnp.sum(p**2) / 2, jnp.array([3.0, 4.0])
      >>> print(perturbed_sharpness(loss, params, 1.0))  # (6**2 - 5**2) / 2
      5.5

    References:
      Foret et al., *Sharpness-Aware Minimization*, ICLR 2021.
    """
    caller = "perturbed_sharpness"
    radius = validation.constant(caller, "rho", rho)(None)
    loss = with_aux(caller, value_fn, has_aux=False)
    validation.check_inexact(caller, "the parameters", params)
    (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    direction = normalized(jax.tree.map(conjugate, gradient), params)
    return loss(shift(params, direction, radius))[0] - value


def difference_error(
    value_fn: ValueFn, params: PyTree, epsilon: Scalar, scheme: Scheme = "forward"
) -> DifferenceError:
    r"""Measure the rounding and truncation error of a finite difference.

    Compares the difference along :math:`g` with the exact product :math:`Hg`, in the precision of
    ``params``. In float32 the error is usually smallest for :math:`\epsilon` from 1e-3 to 1e-1. In
    bfloat16 rounding dominates except for large steps. A *truncation* error from a larger step is
    not a defect: F-GR often generalizes best there.

    Cost:
      One Hessian-vector product and one gradient, or two with "central": about three gradients, or
      four.

    Args:
      value_fn: the loss as a function of the parameters.
      params: the parameters.
      epsilon: the ascent step :math:`\epsilon > 0`, in units of 1 / curvature.
      scheme: "forward", "backward" or "central".

    Returns:
      ``DifferenceError(relative_error, unmoved)``. If :math:`Hg = 0`, the error is absolute instead
      of relative.

    Raises:
      ValueError: epsilon <= 0 (if concrete), or an unknown scheme.
      TypeError: a loss that is not a real scalar or has no second derivative.

    Example:
      >>> import jax.numpy as jnp
      >>> from gradreg_optax.curvature import difference_error
      >>> loss, params = lambda p: jnp.sum(p**2), jnp.array([1.0, 2.0])
      >>> print(difference_error(loss, params, 1e-9).unmoved)  # 1 + 2e-9 == 1
      1.0
    """
    caller = "difference_error"
    grad_fn = _gradient(caller, value_fn, params)
    epsilon = validation.constant(caller, "epsilon", epsilon)(None)
    validation.check_choice(caller, "scheme", scheme, Scheme)
    climb = stateless(caller, ascent_transformation(caller, None), params)
    exact = product(caller, Point(grad_fn, params, climb), mode="forward_over_reverse")
    gradient = exact.gradient
    known = Point(grad_fn, params, climb, gradient)
    estimate = difference(known, epsilon=epsilon, scheme=scheme)
    errors = jax.tree.map(lambda a, b: a - b.astype(a.dtype), estimate.product, exact.product)
    error, size = global_norm(errors), global_norm(exact.product)
    direction, _ = climb(gradient)
    moved = shift(params, direction, -epsilon if scheme == "backward" else epsilon)
    wanted = sum(jnp.sum(d != 0) for d in jax.tree.leaves(direction))
    leaves = zip(*map(jax.tree.leaves, (direction, moved, params)), strict=True)
    lost = sum(jnp.sum((d != 0) & (m == p)) for d, m, p in leaves)
    return DifferenceError(error / jnp.where(size > 0, size, 1), lost / jnp.maximum(wanted, 1))


class PenaltyScale(NamedTuple):
    r"""The factor by which gamma changes if the penalty uses a part of the batch.

    Attributes:
      factor: ``whole / part``, the factor on gamma; shape (), in [0, 1]. It is 1 if all gradients
        are zero.
      whole: :math:`\|g_B\|^2`, the squared norm of the gradient of the batch; shape ().
      part: the mean of :math:`\|g_b\|^2` over disjoint parts of the batch; shape ().
    """

    factor: jax.Array
    whole: jax.Array
    part: jax.Array


def penalty_scale(
    loss_fn: LossFn, params: PyTree, batch: PyTree, *, penalty_fraction: float
) -> PenaltyScale:
    r"""Estimate the factor on gamma that keeps the penalty as strong on a fraction of the batch.

    On b random samples, with per-sample gradients of mean :math:`\bar g` and covariance
    :math:`\Sigma`, the penalty is on average :math:`\tfrac{\gamma}{2} \mathbb{E}\|g_b\|^2 =
    \tfrac{\gamma}{2} (\|\bar g\|^2 + \operatorname{tr}\Sigma / b)`. It is the same on B samples and
    on fB of them, if :math:`\gamma` is multiplied by

    .. math:: \frac{\mathbb{E}\|g_B\|^2}{\mathbb{E}\|g_{fB}\|^2}
      = \frac{\|\bar g\|^2 + \operatorname{tr}\Sigma / B}{\|\bar g\|^2 + \operatorname{tr}\Sigma /
      (fB)} \in [f, 1].

    The factor is f if noise dominates, and 1 if all samples agree. The estimate uses one batch and
    its 1/f disjoint parts, and is noisy: average ``whole`` and ``part`` over a few batches, for
    example with ``vmap``, and divide the averages. The factor is also right for ``ascent_groups`` =
    1/f, where every group is penalised.

    Cost:
      One gradient of the batch, computed on its parts.

    Args:
      loss_fn: ``loss_fn(params, batch)``, which returns the mean over the samples of the batch.
      params: the parameters.
      batch: the batch, with its samples in random order.
      penalty_fraction: the fraction f, 1 / n for a whole number n that divides the batch size.

    Returns:
      ``PenaltyScale(factor, whole, part)``.

    Raises:
      ValueError: a fraction that is not 1 / n, or an n that does not divide the batch size.
      TypeError: a loss that is not a real scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from gradreg_optax.curvature import penalty_scale
      >>> loss_fn = lambda params, batch: jnp.mean(batch @ params)  # gradient: mean of the batch
      >>> batch = jnp.array([[3.0, 1.0], [3.0, -1.0], [3.0, 1.0], [3.0, -1.0]])
      >>> print(penalty_scale(loss_fn, jnp.zeros(2), batch, penalty_fraction=0.25))  # 9 / (9 + 1)
      PenaltyScale(factor=Array(0.9, dtype=float32), whole=Array(9., dtype=float32), part=Array(10.,
      dtype=float32))
    """
    caller = "penalty_scale"
    kept = validation.fraction(caller, "penalty_fraction", penalty_fraction)
    parts = round(1 / kept)
    if abs(parts * kept - 1) > 1e-6:
        raise ValueError(
            f"{caller}: penalty_fraction must be 1 / n for a whole number n, got"
            f" {penalty_fraction}. Use 0.5 or 0.25, for example."
        )
    loss = with_weight(caller, loss_fn, has_aux=False)
    validation.check_inexact(caller, "the parameters", params)

    def value(params: PyTree, group: PyTree) -> tuple[jax.Array, jax.Array | None]:
        mean, _ = loss(params, group)
        return mean_of(mean), mean.weight

    groups = split_batch(caller, "1 / penalty_fraction", batch, parts)
    gradients, weights = jax.vmap(jax.grad(value, has_aux=True), (None, 0))(params, groups)
    part = jnp.mean(jax.vmap(global_norm, axis_size=parts)(gradients) ** 2)
    whole = global_norm(jax.tree.map(lambda g: jnp.average(g, 0, weights), gradients)) ** 2
    return PenaltyScale(jnp.where(part > 0, whole / jnp.where(part > 0, part, 1), 1), whole, part)


def _gradient(caller: str, value_fn: ValueFn, params: PyTree) -> GradFn:
    loss = with_aux(caller, value_fn, has_aux=False)
    validation.check_inexact(caller, "the parameters", params)
    return gradient_fn(lambda params: loss(params)[0])


def _flat_product(
    caller: str, value_fn: ValueFn, params: PyTree
) -> tuple[Callable[[jax.Array], jax.Array], int, Any]:
    """Return the Hessian-vector product for a flat real vector, the vector's size and dtype."""
    validation.check_inexact(caller, "the parameters", params)
    params = jax.tree.map(jnp.asarray, params)
    parts = jax.tree.map(lambda p: (p.real, p.imag) if jnp.iscomplexobj(p) else p, params)
    wide = [widen(p) for p in jax.tree.leaves(parts)]
    if not sum(p.size for p in wide):
        raise ValueError(
            f"{caller}: the parameters must not be empty, got no numbers. Pass at least one."
        )
    dtype = np.result_type(*(p.dtype for p in wide))
    flat, unravel = ravel_pytree(jax.tree.map(lambda p: p.astype(dtype), parts))

    def point(vector: jax.Array) -> PyTree:
        def leaf(p: jax.Array, part: Any) -> jax.Array:
            return (jax.lax.complex(*part) if jnp.iscomplexobj(p) else part).astype(p.dtype)

        return jax.tree.map(leaf, params, unravel(vector))

    grad_fn = _gradient(caller, lambda vector: value_fn(point(vector)), flat)
    multiply = jax.jit(lambda vector: jax.jvp(grad_fn, (flat,), (vector,), has_aux=True)[1])
    return canonical_convolutions(multiply), flat.size, dtype


def _krylov(
    product: Callable[[jax.Array], jax.Array], noise: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return an orthonormal basis of a Krylov space, as rows, and the projected product.

    Only the upper triangle of the projection is filled. If the i-th direction is lost in rounding,
    row i of ``noise`` replaces it.
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

    empty = tuple(jnp.zeros(s, noise.dtype) for s in ((count, size), (count, count), size))
    basis, projection, _ = jax.lax.fori_loop(0, count, extend, empty)
    return basis, projection


def _unit(vector: jax.Array) -> jax.Array:
    return vector / jnp.linalg.norm(vector)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, precision="highest")
