"""Finished parts of a long run on disk, so that a second start continues where the first one
ended.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gradreg_optax.experiments import data, results


class Parts:
    """Keeps each part under a digest of everything that its numbers depend on, so that a changed
    configuration uses no stale one.
    """

    def __init__(self, output: Path, dataset: data.Dataset, done: Callable[[], Any]) -> None:
        """Looks at nothing yet.

        Args:
          output: the folder of the run.
          dataset: the data, on which every part depends.
          done: called once per part, made or found, for a progress bar.
        """
        self._folder, self._done = output / "parts", done
        versions = {
            name: version for name, version in results.versions().items() if name != "python"
        }
        self._common = {
            "data": fingerprint(dataset),
            "versions": versions,
            "machine": results.machine(),
        }

    def keep(
        self, label: str, what: dict[str, Any], make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """What ``make`` makes, from the disk if it is there.

        Args:
          label: what kind of part it is; begins the name of its file.
          what: everything that the numbers depend on, beside data, versions and machine.
          make: returns a dict of arrays.

        Returns:
          The dict, with numbers to nine significant digits.
        """
        depends = json.dumps(results.plain(self._common | what), sort_keys=True)
        path = self._folder / f"{label}-{hashlib.sha256(depends.encode()).hexdigest()[:20]}.json"
        if not path.exists():
            results.write(path, make())
        self._done()
        return results.read(path)


def fingerprint(dataset: data.Dataset) -> str:
    """A digest of all inputs, all labels, and how they are read."""
    digest = hashlib.sha256(
        f"{dataset.shape} {dataset.classes} {dataset.scale} {dataset.resplit}".encode()
    )
    for array in (dataset.train_x, dataset.train_y, dataset.test_x, dataset.test_y):
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
