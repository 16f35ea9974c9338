"""The soak's shapes, its criterion and its picture; what it measures is for `make soak`."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from soak_memory import draw, quarter_means, resident_mib, shapes


def test_shapes_are_as_many_as_asked_for_and_always_the_same() -> None:
    assert len(set(shapes(40))) == 40
    assert shapes(40) == shapes(40)
    assert all(height % 16 == width % 16 == 0 for height, width, _ in shapes(40))


def test_quarters() -> None:
    assert quarter_means([1.0, 3.0, 5.0, 5.0, 4.0, 6.0, 7.0, 9.0]) == [2.0, 5.0, 5.0, 8.0]


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    assert resident_mib() > 10
    with Image.open(draw([resident_mib()] * 8, tmp_path / "curve.png", "onnxruntime")) as picture:
        assert picture.width > picture.height > 100
