"""What every module of ``studies`` keeps; ``tests/studies/conftest.py`` runs a small one."""

import numpy as np
import pytest

from gradreg_optax.experiments import data, results, runs
from gradreg_optax.experiments.trainer import Trainer


class Study:
    """Tests of a study.

    Attributes:
      study: its module.
      trains: the object and the name of the attribute through which every training passes.
      rows: the labels that begin a row of its table.
    """

    trains = Trainer, "states"
    rows: tuple[str, ...]

    def test_a_second_start_trains_nothing_and_gives_the_same(self, config, found, monkeypatch):
        def refuse(*_, **__):
            raise AssertionError("a finished part was trained again")

        monkeypatch.setattr(*self.trains, refuse)
        assert results.plain(self.study.run(config)) == results.plain(found)

    def test_table_and_figure_show_every_row(self, found, tmp_path):
        text = self.study.table(found)
        assert [label for label in self.rows if f"\n{label}  " not in text] == []
        (path,) = self.study.plot(found, tmp_path)
        assert path.read_bytes().startswith(b"\x89PNG")


class TunedStudy(Study):
    """Tests of a study with tuning seeds.

    Attributes:
      roles: of the tuning runs, and of those with the best setting.
      among: the columns that name what is tuned separately.
      setting: the column of the setting.
    """

    roles = "choose", "report"
    among: tuple[str, ...]
    setting = "value"

    def test_settings_are_the_best_of_the_tuning_seeds_and_evaluated_on_others(self, found):
        tried, reported = (runs.select(found["runs"], role=role) for role in self.roles)
        assert not set(tried["seed"]) & set(reported["seed"])
        tuned = 0
        for names, rows in runs.groups(reported, *self.among):
            assert rows["seed"].tolist() == [0, 1]
            where = dict(zip(self.among, names, strict=True))
            best = runs.best(runs.select(tried, **where), self.setting)
            if best:
                tuned += 1
                assert set(rows[self.setting]) == {best[self.setting]}
        assert tuned


def images(train, test):
    """A data set of random images, as many of each class."""
    draws = np.random.default_rng(0)

    def part(size):
        return draws.integers(0, 256, (size, 28, 28), np.uint8), np.arange(size) % 10

    return data.from_arrays("made up", *part(train), *part(test), classes=10)


def patched(*changes):
    """An automatic fixture of a module: ``(object, name, value)`` for all of its tests."""

    @pytest.fixture(scope="module", autouse=True)
    def patch():
        with pytest.MonkeyPatch.context() as patch:
            for change in changes:
                patch.setattr(*change)
            yield

    return patch
