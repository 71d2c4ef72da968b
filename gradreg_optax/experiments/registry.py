"""The commands of ``gradreg`` and their modules: each has ``Config``, ``run``, ``table`` and ``plot``."""

from types import ModuleType

from gradreg_optax.experiments import compare, implicit_bias

COMMANDS: dict[str, ModuleType] = {
    "compare": compare,
    "implicit-bias": implicit_bias,
}
