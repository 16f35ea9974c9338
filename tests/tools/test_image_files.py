from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cat_pruning.errors import OutputError
from cat_pruning.tools.image_files import ENDINGS, save_image

# A gradient, which every format keeps.
IMAGE = Image.fromarray(np.stack(np.meshgrid(np.arange(0, 240, 5), np.arange(0, 160, 5)) * 2, -1)[..., :3].astype("u1"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.webp", "WEBP"), ("a.PNG", "PNG")],
)
def test_the_ending_is_the_format(tmp_path: Path, name: str, kind: str) -> None:
    save_image(IMAGE, tmp_path / name)
    with Image.open(tmp_path / name) as read:
        assert read.format == kind
        difference = np.abs(np.asarray(read, dtype=int) - np.asarray(IMAGE, dtype=int))
    assert difference.max() <= (0 if kind == "PNG" else 12)  # of 255
    assert {".png", ".jpg", ".jpeg", ".webp"} == set(ENDINGS)


def test_a_full_disk_leaves_the_picture_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"before")

    def full(path: Path, data: bytes) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match=r"a\.png cannot be written \(No space left on device\); make room"):
        save_image(IMAGE, tmp_path / "a.png")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.png", b"before")]


def test_an_image_too_large_for_the_format(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"a\.webp cannot be written \(.*\); make room, or give another --out"):
        save_image(Image.new("L", (16384, 1)), tmp_path / "a.webp")
    assert list(tmp_path.iterdir()) == []
