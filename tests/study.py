"""What every module of ``studies`` keeps; ``tests/studies/conftest.py`` runs a small one."""

import pytest

from gradreg_optax.experiments import results
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


def patched(*changes):
    """An automatic fixture of a module: ``(object, name, value)`` for all of its tests."""

    @pytest.fixture(scope="module", autouse=True)
    def patch():
        with pytest.MonkeyPatch.context() as patch:
            for change in changes:
                patch.setattr(*change)
            yield

    return patch
