"""Impossible settings of the studies are errors of the command."""

import pytest

from gradreg_optax.experiments.common import CommandError
from studies import frontier, language, late, strength, unseen


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (frontier.Config, {"fractions": (0.25,)}, "must begin with 1"),
        (frontier.Config, {"intervals": (4, 1)}, "must begin with 1"),
        (frontier.Config, {"fractions": (1.0, 2.0)}, "must be at most 1"),
        (frontier.Config, {"optimizers": ()}, "optimizers must not be empty"),
        (language.Config, {"width": 6}, "width must be a multiple of 4, got 6"),
        (late.Config, {"shares": (3,)}, "even, got 3"),
        (strength.Config, {"tasks": ("mnist",)}, "tasks must be some of .*got 'mnist'"),
        (unseen.Config, {"tasks": ("chess",)}, "tasks must be some of .*got 'chess'"),
    ],
)
def test_impossible_settings_are_refused(config, change, message):
    with pytest.raises(CommandError, match=message):
        config(**change)
