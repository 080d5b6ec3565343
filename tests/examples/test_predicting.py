"""The example scripts of predictions run, print and draw."""

import pytest

pytestmark = pytest.mark.slow


def test_active_learning(tmp_path, capsys):
    pytest.importorskip("mlxtend")
    from examples.active_learning import STYLES, main

    out = tmp_path / "figure.png"
    main(["--seeds", "1", "--rounds", "2", "--steps", "10", "--out", str(out)])
    printed = capsys.readouterr().out
    assert out.stat().st_size > 0 and all(name in printed for name in STYLES)


def test_out_of_distribution(tmp_path, capsys):
    pytest.importorskip("mlxtend")
    from examples.out_of_distribution import main

    out = tmp_path / "figure.png"
    main(["--seeds", "1", "--epochs", "1", "--out", str(out)])
    assert "epistemic variance, ink" in capsys.readouterr().out and out.stat().st_size > 0


def test_intervals(tmp_path, capsys):
    from examples.data import DataUnavailableError
    from examples.intervals import main

    out = tmp_path / "figure.png"
    try:
        main(["--molecules", "400", "--epochs", "2", "--out", str(out)])
    except DataUnavailableError as error:
        pytest.skip(str(error))
    assert "homo" in capsys.readouterr().out and out.stat().st_size > 0
