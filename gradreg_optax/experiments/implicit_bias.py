r"""Implicit bias: gradient regularization moves a diagonal linear network to the rich regime.

The network is :math:`f(x) = \langle x, \beta\rangle` with :math:`\beta = u\odot u - v\odot v` and
the loss :math:`L = \frac{1}{4N}\|X\beta - y\|^2`, with fewer samples than features, initialized at
:math:`u = v = \alpha 1`. Let :math:`s = X^\top(X\beta - y)/N`, and :math:`s'` the same vector at
:math:`\theta + \epsilon\nabla L(\theta)`. The flow of the regularized gradient converges to the
solution of :math:`X\beta = y` with the least hyperbolic entropy :math:`\Phi_a` of the scale

.. math::

    \alpha_\text{eff} = \alpha \exp\Big(-\gamma \int_0^\infty s \odot s' \, dt\Big).

A small scale is the rich regime (sparse, near the minimum L1 norm), a large one the lazy regime.
This module integrates the flow in float64 with the package's own gradients, and compares its limit
with the minimizer of the entropy, which it computes independently by convex duality. Sources:
Karakida et al., ICML 2023; Woodworth et al., COLT 2020 (the entropy).
"""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from scipy import optimize

from gradreg_optax import dbp_value_and_grad, fd_value_and_grad
from gradreg_optax.experiments import common, plots, report, runs
from gradreg_optax.experiments.report import Number, Report, Table

Floats: TypeAlias = npt.NDArray[np.float64]
Array: TypeAlias = Any  # of NumPy or of JAX
Pair: TypeAlias = tuple[Any, Any]

# Absolute and relative local error of the integrator per step, in the worst setting; far below the
# resolution of the comparison.
TOLERANCE = 1e-9
# The dual problem is solved if X beta - y is smaller than this, relative to the terms of the sum;
# rounding limits it to about 1e-16.
SOLVED = 1e-13
TITLES = {
    "mean_one": "inputs N(1, 1)",
    "converged": "inputs N(1, 1), few samples, converged flow",
    "mean_zero": "inputs N(0, 1): the bias does not reduce the test loss",
}


@dataclasses.dataclass(frozen=True)
class Config(common.Common):
    """Settings of ``gradreg implicit-bias``."""

    output: Path = Path("results/implicit-bias")
    seeds: int = 5
    """Number of data sets of each kind: inputs of mean one, the same with few samples, inputs of
    mean zero."""
    samples: int = 50
    """Number of samples N."""
    features: int = 100
    """Number of features d > N."""
    support: int = 5
    """Number of nonzero weights of the teacher; they are equal, with norm 3."""
    alpha: float = 0.1
    """Initial scale of the weights."""
    gamma: float = 0.1
    """Regularization coefficient γ. From 0.3 on, every scheme collapses to the saddle at 0."""
    epsilons: tuple[float, ...] = (-0.4, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3)
    """Ascent steps ε in increasing order: negative for B-GR, zero for DB, positive for F-GR. From
    0.3 on, the trend reverses."""
    horizon: float = 120.0
    """End time of the flow."""
    few: int = 15
    """Number of samples of the data sets with few samples, for which the flow converges."""

    def __post_init__(self) -> None:
        """Check the sizes and the order of the ascent steps."""
        super().__post_init__()
        common.at_least(self, 0, "gamma", "horizon")
        common.above_zero(self, "alpha")
        common.at_most(self, self.features, "samples", "few", "support")
        if not self.epsilons or list(self.epsilons) != sorted(set(self.epsilons)):
            raise common.CommandError(f"epsilons must be in increasing order, got {self.epsilons}.")

    def cases(self) -> dict[str, tuple[float, int]]:
        """Return the mean of the inputs and the number of samples of each kind of data set."""
        few = (1.0, self.few)
        return {"mean_one": (1.0, self.samples), "converged": few, "mean_zero": (0.0, self.samples)}


class Flow(NamedTuple):
    """The state of the flow; each array has shape (..., d).

    Attributes:
      u: the weights of the positive part.
      v: the weights of the negative part.
      decay: the integral of s * s' so far.
    """

    u: Array
    v: Array
    decay: Array


def loss_fn(params: Pair, x: Array, y: Array) -> jax.Array:
    r"""Return the loss :math:`\frac{1}{4N}\|X(u\odot u - v\odot v) - y\|^2`."""
    u, v = params
    return jnp.mean((x @ (u**2 - v**2) - y) ** 2) / 4


def slope(params: Pair, x: Array, y: Array) -> jax.Array:
    r"""Return :math:`s = X^\top(X\beta - y)/N`; the gradient is :math:`(u\odot s, -v\odot s)`."""
    u, v = params
    return x.T @ (x @ (u**2 - v**2) - y) / y.size


def velocity(method: str, flow: Flow, data: Pair, gamma: Array, epsilon: Array) -> Flow:
    """Return the time derivative of the flow: minus the regularized gradient, and s * s'.

    Args:
      method: "difference" for F-GR and, with a negative epsilon, B-GR; "product" for DB, which
        ignores epsilon.
      flow: the state, for one data set and one setting.
      data: inputs of shape (N, d), targets of shape (N,).
      gamma: regularization coefficient; zero gives the plain flow.
      epsilon: ascent step.
    """
    x, y = data
    params = (flow.u, flow.v)
    s = slope(params, x, y)
    if method == "product":
        gradient, perturbed = dbp_value_and_grad(loss_fn, gamma=gamma)(params, x, y)[1], s
    else:
        gradient = fd_value_and_grad(loss_fn, gamma=gamma, epsilon=epsilon)(params, x, y)[1]
        perturbed = slope((flow.u + epsilon * flow.u * s, flow.v - epsilon * flow.v * s), x, y)
    return Flow(-gradient[0], -gradient[1], s * perturbed)


@partial(jax.jit, static_argnames="method")
def integrate(method: str, flow: Flow, horizon: Array, data: Pair, settings: Pair) -> Flow:
    """Integrate the flow for all data sets and settings, with common step sizes.

    Args:
      method: as for :func:`velocity`.
      flow: the states, shape (data sets, settings, d).
      horizon: the end time.
      data: inputs and targets, stacked over data sets.
      settings: gamma and epsilon, stacked over settings.
    """
    over_settings = jax.vmap(partial(velocity, method), in_axes=(0, None, 0, 0))
    field = jax.vmap(over_settings, in_axes=(0, 0, None, None))
    term = diffrax.ODETerm(lambda t, flow, args: field(flow, data, *settings))
    control = diffrax.PIDController(rtol=TOLERANCE, atol=TOLERANCE, norm=_worst)
    options: Any = {"stepsize_controller": control, "max_steps": None}
    solution = diffrax.diffeqsolve(term, diffrax.Dopri5(), 0.0, horizon, None, flow, **options)
    return jax.tree.map(lambda a: a[-1], solution.ys)


def _worst(error: Flow) -> jax.Array:
    """Return the largest root mean square over features, of all data sets and settings."""
    return jnp.max(jnp.sqrt(jnp.stack([jnp.mean(part**2, axis=-1) for part in error])))


def least_entropy(x: Floats, y: Floats, scale: Floats, stages: int = 25) -> Floats:
    r"""Minimize the hyperbolic entropy subject to :math:`X\beta = y` by its convex dual.

    The entropy is :math:`\Phi_a(\beta) = \sum_i a_i^2\, q(\beta_i / a_i^2)` with
    :math:`q(z) = 2 - \sqrt{4 + z^2} + z\,\text{asinh}(z/2)`. Its minimizer is
    :math:`\beta = 2a^2\odot\sinh(X^\top\nu)`, where the multiplier :math:`\nu` solves
    :math:`X\beta = y`. The solver follows a path from a large scale, for which the equation is
    nearly linear, along which log a changes in equal steps.

    Args:
      x: inputs of full row rank, shape (N, d).
      y: targets, shape (N,).
      scale: the scale a > 0, shape (d,).
      stages: number of scales on the path.

    Returns:
      The weights, shape (d,).

    Raises:
      RuntimeError: the solver did not converge.
    """
    lazy = np.maximum(scale, np.sqrt(np.abs(np.linalg.lstsq(x, y)[0]).max() + 1e-300))
    nu = np.zeros(len(y))
    for weight in np.linspace(0, 1, stages):
        nu = _multiplier(x, y, 2 * (lazy ** (1 - weight) * scale**weight) ** 2, nu)
    beta = 2 * scale**2 * np.sinh(x.T @ nu)
    error = np.linalg.norm(x @ beta - y)
    if error > SOLVED * np.linalg.norm(np.abs(x) @ np.abs(beta)):
        raise RuntimeError(
            f"least_entropy: the solver stopped at a residual of {error:.1e}. Use more stages."
        )
    return np.asarray(beta)


_predict = np.vectorize(least_entropy, signature="(n,d),(n),(d)->(d)")  # for stacked problems


def _multiplier(x: Floats, y: Floats, factor: Floats, nu: Floats) -> Floats:
    with np.errstate(over="ignore", invalid="ignore"):  # the solver rejects steps that overflow
        solution = optimize.root(
            lambda nu: x @ (factor * np.sinh(x.T @ nu)) - y,
            nu,
            jac=lambda nu: (x * (factor * np.cosh(x.T @ nu))) @ x.T,
            options={"xtol": 1e-15},
        )
    return np.asarray(solution.x)


def draw_data(config: Config, mean: float, samples: int) -> tuple[Floats, Floats, Floats]:
    """Return inputs N(mean, 1), targets and the teacher: shapes (S, N, d), (S, N), (d,)."""
    used = np.arange(config.features) < config.support
    teacher = np.where(used, 3 / np.sqrt(config.support), 0.0)
    draws = [np.random.default_rng(config.seed + i) for i in range(config.seeds)]
    x = np.stack([mean + draw.normal(size=(samples, config.features)) for draw in draws])
    return x, x @ teacher, teacher


def run(config: Config) -> dict[str, Any]:
    """Integrate the plain flow (gamma = 0) and the flow of every epsilon; solve the dual problems.

    Returns:
      "gamma" and "alpha"; "flows", one row for each kind of data set ("case"), seed and "flow",
      with "epsilon" (NaN for the plain flow) and the values of :func:`measure`; and "weights", one
      row for each case, flow and "feature", with the weights "reached" and "predicted" for the
      first data set.
    """
    store = runs.Store(config.output, config=common.settings(config))
    names, flows, weights = labels(config.epsilons), [], []
    seeds, features = config.seed + np.arange(config.seeds), np.arange(config.features)
    with jax.enable_x64(True):
        for name, (mean, samples) in common.progress("flow", "case", config.cases().items()):
            found = store.keep(name, name, partial(measure, config, mean, samples))
            last = {"reached": found.pop("reached"), "predicted": found.pop("predicted")}
            found["epsilon"] = np.broadcast_to([np.nan, *config.epsilons], found["scale"].shape)
            flows.append(runs.tidy({"case": [name], "seed": seeds, "flow": names}, **found))
            weights.append(runs.tidy({"case": [name], "flow": names, "feature": features}, **last))
    chosen = {"gamma": config.gamma, "alpha": config.alpha}
    return chosen | {"flows": runs.stack(*flows), "weights": runs.stack(*weights)}


def case(results: dict[str, Any], name: str) -> dict[str, Floats]:
    """Return the value of :func:`measure` for a kind of data set, with "epsilon"."""
    flows, weights = (runs.select(results[part], case=name) for part in ("flows", "weights"))
    found = runs.blocks(flows, "seed", "flow") | runs.blocks(weights, "flow", "feature")
    return found | {"epsilon": found["epsilon"][0, 1:]}


def labels(epsilons: Sequence[float]) -> list[str]:
    """Return the names of the flows, the plain one first."""
    names = {-1: "B-GR {:g}", 0: "DB", 1: "F-GR {:g}"}
    return ["gamma = 0"] + [names[int(np.sign(e))].format(abs(e)) for e in epsilons]


def settings(config: Config) -> tuple[Floats, Floats]:
    """Return gamma and epsilon of every flow, the plain one first."""
    epsilons = np.array([1.0, *config.epsilons])
    return np.where(np.arange(len(epsilons)) > 0, config.gamma, 0.0), epsilons


def solve_flows(config: Config, x: Floats, y: Floats) -> Flow:
    """Return the states at the horizon, shape (data sets, 1 + epsilons, d); plain flow first."""
    gamma, epsilon = settings(config)
    states = np.full((3, len(x), len(epsilon), config.features), config.alpha)
    states[2] = 0
    for method, chosen in (("difference", epsilon != 0), ("product", epsilon == 0)):
        if chosen.any():
            start, pair = Flow(*states[:, :, chosen]), (gamma[chosen], epsilon[chosen])
            states[:, :, chosen] = integrate(method, start, config.horizon, (x, y), pair)
    return Flow(*states)


def measure(config: Config, mean: float, samples: int) -> dict[str, Any]:
    """Integrate the flows of a kind of data set; compare their limits with the minimizers.

    Args:
      config: the settings.
      mean: mean of the inputs.
      samples: number of samples.

    Returns:
      Arrays of shape (data sets, 1 + epsilons), the plain flow first: ``scale``, the geometric mean
      of alpha_eff / alpha; ``conservation``, the largest relative error of u * v = alpha_eff ** 2;
      ``l1``, the L1 norm relative to the teacher's; ``error``, the squared distance to the teacher
      relative to its squared norm; ``risk``, the same in the norm of the inputs' second moments,
      which is the test loss; ``residual``, the relative residual of X beta = y; ``agreement``, the
      relative distance between the reached weights and those predicted for X beta(T); and
      ``agreement_y``, the same for y. ``reached`` and ``predicted`` are the weights for the first
      data set.
    """
    x, y, teacher = draw_data(config, mean, samples)
    flow, gamma = solve_flows(config, x, y), settings(config)[0][:, None]
    beta, scale = flow.u**2 - flow.v**2, config.alpha * np.exp(-gamma * flow.decay)
    outputs = beta @ np.swapaxes(x, -1, -2)
    targets = np.broadcast_to(y[:, None], outputs.shape)
    predicted = _predict(x[:, None], outputs, scale)
    return {
        "scale": np.exp(np.mean(np.log(scale / config.alpha), axis=-1)),
        "conservation": np.max(np.abs(flow.u * flow.v / scale**2 - 1), axis=-1),
        "l1": np.sum(np.abs(beta), axis=-1) / np.sum(np.abs(teacher)),
        "error": _second_moment(beta - teacher, 0.0) / _second_moment(teacher, 0.0),
        "risk": _second_moment(beta - teacher, mean) / _second_moment(teacher, mean),
        "residual": _relative(outputs, targets),
        "agreement": _relative(beta, predicted),
        "agreement_y": _relative(beta, _predict(x[:, None], targets, scale)),
        "reached": beta[0],
        "predicted": predicted[0],
    }


def _second_moment(beta: Floats, mean: float) -> Floats:
    """Return the mean of <x, beta> ** 2 over inputs N(mean, 1)."""
    return np.asarray(np.sum(beta**2, axis=-1) + (mean * np.sum(beta, axis=-1)) ** 2)


def _relative(found: Floats, expected: Floats) -> Floats:
    return np.asarray(np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1))


def table(results: dict[str, Any]) -> Report:
    """Return a table for each kind of data set: means and the largest deviation from the theory."""
    parts = [part for name in TITLES for part in _parts(results, name)]
    return Report(
        *parts,
        "Means ± standard errors over data sets. Deviation: the largest relative distance of the"
        " reached weights from those predicted for the outputs of the flow, and for y.",
    )


def _parts(results: dict[str, Any], name: str) -> list[Table | str]:
    columns = {
        "alpha_eff / alpha": report.mean("scale", ".4f"),
        "L1 / teacher's": report.mean("l1", ".4f"),
        "squared error": report.mean("error", ".4f"),
        "test loss": report.mean("risk", ".4f"),
        "deviation": lambda rows: Number(rows["agreement"].max(), ".1e"),
        "deviation for y": lambda rows: Number(rows["agreement_y"].max(), ".1e"),
    }
    falls = np.all(np.diff(case(results, name)["scale"][:, 1:], axis=1) < 0, axis=1)
    flows = runs.by(runs.select(results["flows"], case=name), "flow")
    title = f"{TITLES[name]} ({len(falls)} data sets)"
    end = f"alpha_eff decreases strictly with epsilon in {falls.sum()} of {len(falls)} data sets"
    return [report.table(title, flows, columns, of="flow"), end, ""]


def plot(results: dict[str, Any], output: Path, formats: Iterable[str] = ("png",)) -> list[Path]:
    """Draw scale, L1 norm and test loss against epsilon, and reached against predicted weights."""
    made, panels = plots.figure(4, rows=2, width=3.75, height=3.5)
    names = {
        "scale": r"$\alpha_\mathrm{eff}/\alpha$ (geometric mean)",
        "l1": r"$\|\beta\|_1 / \|\beta^*\|_1$",
        "risk": "relative test loss",
    }
    for row, name in zip(panels, ("mean_one", "mean_zero"), strict=True):
        part = case(results, name)
        for panel, (column, label) in zip(row, names.items(), strict=False):
            _draw_column(panel, part["epsilon"], part[column])
            panel.set(xlabel=r"ascent step $\epsilon$ (B-GR < 0 = DB < F-GR)", ylabel=label)
        _draw_weights(row[3], part)
        row[0].set_title(TITLES[name], loc="left")
    panels[0, 2].legend()
    return plots.save(made, output / "implicit_bias", formats)


def _draw_column(panel: Any, epsilon: Floats, values: Floats) -> None:
    panel.plot(epsilon, values[:, 1:].T, color="C0", alpha=0.25, linewidth=1)
    mean, label = values.mean(axis=0), "regularized flow, mean (thin: data sets)"
    panel.plot(epsilon, mean[1:], "o-", color="C0", label=label)
    panel.axhline(mean[0], color="C3", linestyle="--", label=r"plain flow, $\gamma = 0$")
    panel.axvline(0, color="0.8", zorder=0)


def _draw_weights(panel: Any, part: dict[str, Floats]) -> None:
    extent = [float(part["predicted"].min()), float(part["predicted"].max())]
    panel.plot(extent, extent, color="0.7", zorder=0)
    for i, label in enumerate(part["flow"]):
        panel.plot(part["predicted"][i], part["reached"][i], ".", markersize=4, label=label)
    panel.set_xlabel(r"predicted $\beta$: $\mathrm{argmin}\ \Phi_{\alpha_\mathrm{eff}}$")
    panel.set_ylabel(r"reached $\beta$")
    panel.set_title(f"relative distance at most {part['agreement'].max():.0e}", loc="left")
    panel.legend(fontsize=7)
