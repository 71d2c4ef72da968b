"""The commands of ``gradreg`` and their modules: each has ``Config``, ``run``, ``table`` and
``plot``.
"""

from types import ModuleType

from gradreg_optax.experiments import compare, cost, flooding, frontier, implicit_bias, sweep

COMMANDS: dict[str, ModuleType] = {
    "compare": compare,
    "sweep": sweep,
    "cost": cost,
    "implicit-bias": implicit_bias,
    "flooding": flooding,
    "frontier": frontier,
}
