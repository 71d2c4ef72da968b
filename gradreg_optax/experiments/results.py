"""Results on disk: small json files that carry the command, the versions, the machine and a digest
of the sources that made them.
"""

import dataclasses
import functools
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

from gradreg_optax.experiments.common import CommandError, MissingError

FILE = "results.json"
LAYOUT = 2  # of the file; 1 nested a dict for each method
PACKAGES = [Path(__file__).parents[1]]  # whose sources the numbers depend on


def prepare(output: Path) -> None:
    """Makes the folder, tries to write there, and removes what a killed run left half written.

    Raises:
      CommandError: the folder cannot be made or written to.
    """
    write(output / ".writable", {})
    (output / ".writable").unlink()
    for left in [*output.glob(".*.partial"), *output.glob("parts/.*.partial")]:
        if not _alive(int(left.name.split(".")[-2])):
            left.unlink(missing_ok=True)


def save(output: Path, command: str, config: Any, results: dict[str, Any]) -> Path:
    """Writes ``results`` under ``output``.

    Args:
      output: the folder, made if need be.
      command: the command that made them, such as "gradreg compare".
      config: its dataclass.
      results: a dict of arrays, numbers, strings, lists and dicts, of which none is None.

    Returns:
      The path of the file.
    """
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key != "output"}
    document = {"command": command, "layout": LAYOUT, "config": settings}
    document |= {"versions": versions(), "sources": sources(), "machine": machine()}
    write(output / FILE, document | {"results": results})
    return output / FILE


def load(path: Path, command: str | None = None) -> dict[str, Any]:
    """Reads the ``results`` of a file, or of the file in a folder, with lists of equals as arrays.

    Args:
      path: a file of :func:`save`, or its folder.
      command: last word of the command that must have made them; any by default.

    Raises:
      MissingError: nothing has been saved there.
      CommandError: the file is broken, of an older layout, or of another command.
    """
    path = path / FILE if path.is_dir() else path
    again = "run the command without --redraw"
    if not path.exists():
        raise MissingError(f"no results at {path}: {again} first.")
    try:
        document = read(path)
        made, layout, results = document["command"], document.get("layout", 1), document["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{path} is broken or no file of results: {again}.") from error
    if command is not None and made.split()[-1] != command:
        raise CommandError(f"{path} holds results of {made!r}, not of {command!r}.")
    if layout != LAYOUT or not isinstance(results, dict):
        raise CommandError(f"{path} has layout {layout!r}, this version reads {LAYOUT}: {again}.")
    return results


def write(path: Path, document: dict[str, Any]) -> None:
    """Writes a file in one move, so that an interrupted run or a full disk leaves no half of it.

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
    """Reads a file of :func:`write`; lists of numbers, truths or strings become arrays, and null
    NaN.

    Raises:
      ValueError: it holds no json, or no object.
    """
    document = _arrays(json.loads(path.read_text()))
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds no object.")
    return document


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("jax", "jaxlib", "optax", "numpy", "gradreg-optax")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), **found}


def sources() -> str:
    """Return a digest of all modules of :data:`PACKAGES`: an edited module makes new numbers."""
    return _digest(*PACKAGES)


@functools.cache
def _digest(*packages: Path) -> str:
    digest = hashlib.sha256()
    for package in packages:
        for path in sorted(package.rglob("*.py")):
            digest.update(f"{path.relative_to(package).as_posix()}\0".encode())
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:20]


def machine() -> dict[str, Any]:
    """The processor and the accelerator, without names of hosts or users."""
    device, processor = jax.devices()[0], platform.machine()
    found = {"processor": processor, "cores": os.cpu_count()}
    return found | {"backend": device.platform, "device": device.device_kind}


def plain(value: Any) -> Any:
    """Arrays and dataclasses as lists, numbers and dicts; floats to nine significant digits, and
    None where they are not finite.
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
    return re.sub(r"\s*\n\s*", " ", column[0])  # a line break is never within a string


def _arrays(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _arrays(item) for key, item in value.items()}
    if isinstance(value, list):
        found = np.array(value, object)
        dtype = _dtype({type(item) for item in found.flat}, found)
        return [_arrays(item) for item in value] if dtype is None else found.astype(dtype)
    return np.nan if value is None else value


def _dtype(kinds: set[type], found: Any) -> Any:
    """What an array of numbers, of truths or of strings is made of; None for any other list."""
    if kinds == {int}:  # beyond 64 bits an object, never a rounded float
        return np.int64 if all(-(2**63) <= item < 2**63 for item in found.flat) else object
    if kinds and kinds <= {int, float, type(None)}:
        return float
    return next(iter(kinds)) if kinds in ({bool}, {str}) else None


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
