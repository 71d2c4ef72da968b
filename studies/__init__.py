"""Studies beyond the paper: run from a clone with ``python -m studies NAME``.

Each study is a module with ``Config``, ``run``, ``table`` and ``plot``, like the commands of
:mod:`gradreg_optax.experiments`. ``studies/results`` holds the committed results and
``studies/notebooks`` the notebooks that draw them.
"""

from pathlib import Path

from gradreg_optax.experiments import results

results.PACKAGES.append(Path(__file__).parent)
