"""The benchmark of images runs, and the resize it measures is faster than Pillow's."""

import sys

import pytest

from benchmarks import images


@pytest.mark.slow
def test_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    assert images.main(["--images", "4"]) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    table = {row[0]: row[1:] for row in rows}
    assert table["simplejpeg"][0] == "not installed"
    assert "PyTorch: torch is not installed" in table
    assert table["navil_jax"][2] == "0"  # the largest difference
    assert float(table["navil_jax"][1].rstrip("x")) > 1.5
    assert float(table["navil_jax (uint8 patches)"][1]) > 0


def test_too_few_images_are_refused(capsys: pytest.CaptureFixture) -> None:
    assert images.main(["--images", "3"]) == 2
    assert "--images must be at least 4" in capsys.readouterr().err
