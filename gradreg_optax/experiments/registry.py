"""The commands of ``gradreg`` and their modules: each has ``Config``, ``run``, ``table`` and ``plot``."""

from types import ModuleType

COMMANDS: dict[str, ModuleType] = {}
