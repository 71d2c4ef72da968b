"""Results on disk: JSON files with the command, versions, machine and a digest of the sources."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gradreg_optax.experiments.common import CommandError

FILE = "results.json"
PACKAGES = [Path(__file__).parents[1]]  # the numbers depend on these sources


def check_writable(output: Path) -> None:
    """Create the directory, and check that files can be written to it.

    Raises:
      CommandError: the directory cannot be created or written to.
    """
    write(output / ".writable", {})
    (output / ".writable").unlink()


def save(output: Path, command: str, config: Any, results: dict[str, Any]) -> Path:
    """Write results to a directory.

    Args:
      output: the directory; created if it does not exist.
      command: the command that computed them, such as "gradreg compare".
      config: its dataclass.
      results: a dict of arrays, numbers, strings, lists and dicts, without None.

    Returns:
      The path of the file.
    """
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key != "output"}
    document = {"command": command, "layout": 2, "config": settings}
    document |= {"versions": versions(), "sources": sources(), "machine": machine()}
    write(output / FILE, document | {"results": results})
    return output / FILE


def load(path: Path, command: str | None = None) -> dict[str, Any]:
    """Read results; lists of numbers, booleans or strings become arrays.

    Args:
      path: a file of :func:`save`, or its directory.
      command: last word of the command that must have computed them; any by default.

    Raises:
      CommandError: the file is missing, broken or of another command.
    """
    path = path / FILE if path.is_dir() else path
    remedy = "Run the command without --redraw"
    if not path.exists():
        raise CommandError(f"no results at {path}. {remedy} first.")
    try:
        document = read(path)
        made, results = document["command"], dict(document["results"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{path} is broken or not a results file. {remedy}.") from error
    if command is not None and made.split()[-1] != command:
        raise CommandError(f"{path} holds results of {made!r}, not of {command!r}.")
    return results


def write(path: Path, document: dict[str, Any]) -> None:
    """Write a JSON file atomically: an interrupt or a full disk leaves no partial file.

    Raises:
      CommandError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            text = json.dumps(plain(document), indent=1, allow_nan=False)
            partial.write_text(re.sub(r"\[\s[^][{}]*\]", _one_line, text) + "\n")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CommandError(
            f"cannot write to {path.parent} ({reason}). Choose another directory with --output."
        ) from error


def read(path: Path) -> dict[str, Any]:
    """Read a file of :func:`write`; null becomes NaN.

    Raises:
      ValueError: the file holds no JSON object.
    """
    document = _arrays(json.loads(path.read_text()))
    if not isinstance(document, dict):
        raise ValueError(f"{path} does not hold a JSON object.")
    return document


def versions() -> dict[str, str]:
    """Return the versions of the packages that the numbers depend on."""
    names = ("jax", "jaxlib", "optax", "numpy", "gradreg-optax")
    packages = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), **packages}


def sources() -> str:
    """Return a digest of all modules of :data:`PACKAGES`."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted(package.rglob("*.py")):
            digest.update(f"{path.relative_to(package).as_posix()}\0".encode())
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


def machine() -> dict[str, Any]:
    """Return the processor and the accelerator, without names of the machine and the user."""
    device, processor = jax.devices()[0], platform.machine()
    cpu = {"processor": processor, "cores": os.cpu_count()}
    return cpu | {"backend": device.platform, "device": device.device_kind}


def plain(value: Any) -> Any:
    """Convert arrays and dicts to JSON values.

    Floats keep nine significant digits; non-finite ones become None.
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return plain(np.asarray(value).tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.9g}") if np.isfinite(value) else None
    return value if isinstance(value, (bool, int, str)) or value is None else str(value)


def _one_line(column: re.Match[str]) -> str:
    return re.sub(r"\s*\n\s*", " ", column[0])  # strings hold no line breaks in JSON


def _arrays(value: Any) -> Any:
    """Convert lists of numbers, booleans or strings to arrays, and None to NaN."""
    if isinstance(value, dict):
        return {key: _arrays(item) for key, item in value.items()}
    if isinstance(value, list):
        items = [_arrays(item) for item in value]
        types = {type(item) for item in np.array(items, object).flat}
        if (types and types <= {int, float}) or types in ({bool}, {str}):
            return np.array(items)
        return items
    return np.nan if value is None else value
