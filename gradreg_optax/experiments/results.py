"""Results on disk: small json files that carry the command, the versions and the machine that made
them.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np

FILE = "results.json"


def save(output: Path, command: str, config: Any, results: dict[str, Any]) -> Path:
    """Writes ``results`` under ``output`` in one move, so that an interrupted run leaves no half of
    a file.

    Args:
      output: the folder, made if need be.
      command: the subcommand that made them.
      config: its dataclass.
      results: a dict of arrays, numbers, strings, lists and dicts.

    Returns:
      The path of the file.
    """
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key != "output"}
    document = {
        "command": f"gradreg {command}",
        "config": settings,
        "versions": versions(),
        "machine": machine(),
        "results": results,
    }
    path = output / FILE
    write(path, document)
    return path


def load(path: Path) -> dict[str, Any]:
    """Reads the ``results`` of a file, or of the file in a folder, with lists of numbers as arrays.

    Raises:
      FileNotFoundError: nothing has been saved there.
    """
    path = path / FILE if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"no results at {path}: run the command without --redraw first.")
    results: dict[str, Any] = read(path)["results"]
    return results


def write(path: Path, document: dict[str, Any]) -> None:
    """Writes a file in one move, so that an interrupted run leaves no half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(plain(document), indent=1) + "\n")
    partial.replace(path)


def read(path: Path) -> dict[str, Any]:
    """Reads a file of :func:`write`, with lists of numbers as arrays."""
    document: dict[str, Any] = _arrays(json.loads(path.read_text()))
    return document


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {
        name: importlib.metadata.version(name)
        for name in ("jax", "jaxlib", "optax", "numpy", "gradreg-optax")
    }
    return {"python": platform.python_version(), **found}


def machine() -> dict[str, Any]:
    """The processor and the accelerator, without names of hosts or users."""
    device = jax.devices()[0]
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "backend": device.platform,
        "device": device.device_kind,
    }


def plain(value: Any) -> Any:
    """Arrays and dataclasses as lists, numbers and dicts, to nine significant digits; what is not
    finite becomes None.
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, jax.Array)):
        return plain(np.asarray(value).tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    if isinstance(value, (float, np.number)):
        number = float(value)
        return float(f"{number:.9g}") if np.isfinite(number) else None
    return str(value)


def _arrays(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _arrays(item) for key, item in value.items()}
    if isinstance(value, list):
        numbers = (
            np.array([np.nan if item is None else item for item in value])
            if _numeric(value)
            else None
        )
        return [_arrays(item) for item in value] if numbers is None else numbers
    return value


def _numeric(value: list[Any]) -> bool:
    if value and all(isinstance(item, list) for item in value):
        return len({len(item) for item in value}) == 1 and all(map(_numeric, value))
    return bool(value) and all(
        item is None or (isinstance(item, (int, float)) and not isinstance(item, bool))
        for item in value
    )
