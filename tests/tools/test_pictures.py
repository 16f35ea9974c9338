from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cat_pruning.errors import OutputError, SettingsError, ShapeError
from cat_pruning.runtime.record import StepRecord
from cat_pruning.schedule import ScheduledStep, StepKind
from cat_pruning.tools.pictures import computed_counts, draw_comparison, draw_token_map, psnr_db, step_pixels


def record(
    step: int, kind: StepKind, grid: tuple[int, int], keep: list[list[int]], *, clusters: bool = True
) -> StepRecord:
    num_tokens = grid[0] * grid[1]
    ids = (torch.arange(num_tokens) % 5).repeat(len(keep), 1)
    return StepRecord(
        step=step,
        row=ScheduledStep(kind=kind),
        timestep=1000.0 - step,
        grid=grid,
        keep_indices=torch.tensor(keep, dtype=torch.int32),
        cluster_ids=ids if clusters else None,
    )


def records(num_pruned: int, grid: tuple[int, int] = (4, 4), *, clusters: bool = True) -> list[StepRecord]:
    num_tokens = grid[0] * grid[1]
    full = [record(step, StepKind.FULL, grid, [list(range(num_tokens))], clusters=False) for step in range(2)]
    keep = [[[step % num_tokens, (step + 5) % num_tokens]] for step in range(num_pruned)]
    return full + [record(2 + step, StepKind.PRUNED, grid, keep[step], clusters=clusters) for step in range(num_pruned)]


def picture(size: tuple[int, int], colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_a_record_knows_its_counts_and_equals_only_itself() -> None:
    one = record(2, StepKind.PRUNED, (3, 4), [[0, 1, 2], [3, 4, 5]])
    assert (one.num_tokens, one.num_kept) == (12, 3)
    assert one == one
    assert one != record(2, StepKind.PRUNED, (3, 4), [[0, 1, 2], [3, 4, 5]])


@pytest.mark.long
@pytest.mark.parametrize(
    ("num_pruned", "grid"), [(1, (4, 4)), (1, (9, 3)), (20, (16, 16)), (20, (3, 9)), (20, (9, 3)), (42, (64, 64))]
)
def test_a_token_map_is_a_png_of_a_size_that_screens_show(
    tmp_path: Path, num_pruned: int, grid: tuple[int, int]
) -> None:
    path = tmp_path / "map.png"
    draw_token_map(records(num_pruned, grid), path, picture((grid[1] * 8, grid[0] * 8), (200, 30, 30)))
    with Image.open(path) as drawn:
        assert drawn.format == "PNG"
        assert 1000 <= drawn.width <= 3000
        assert 400 <= drawn.height <= 3000
        assert drawn.width / drawn.height > 0.6
    assert list(tmp_path.iterdir()) == [path]  # nothing half-written beside it


@pytest.mark.parametrize("clusters", [True, False])
@pytest.mark.parametrize("image", [picture((32, 32), (0, 0, 0)), None])
def test_a_token_map_does_without_image_or_clusters(tmp_path: Path, image: Image.Image | None, clusters: bool) -> None:
    draw_token_map(records(3, clusters=clusters), tmp_path / "map.png", image)
    assert (tmp_path / "map.png").stat().st_size > 0


@pytest.mark.long
def test_the_same_records_draw_the_same_picture(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        draw_token_map(records(4), tmp_path / name, None)
    draw_token_map(records(5)[:-2] + records(5)[-1:], tmp_path / "c.png", None)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()


@pytest.mark.parametrize("image", [picture((32, 16), (0, 0, 0)), picture((32, 16), (255, 255, 255)), None])
def test_computed_tokens_are_orange_and_the_others_grey(image: Image.Image | None) -> None:
    one = record(2, StepKind.PRUNED, (2, 4), [[0, 1], [3, 6]])
    pixels = step_pixels(one, image).astype(int)  # the last row of the batch
    cell = pixels.shape[1] // 4
    assert pixels.shape == (2 * cell, 4 * cell, 3)
    colourful = pixels[..., 0] - pixels[..., 2] > 100
    grey = pixels[..., 0] == pixels[..., 2]
    for token in range(8):
        row, column = divmod(token, 4)
        square = np.s_[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
        assert (colourful if token in (3, 6) else grey)[square].all()


def test_row_chooses_the_row_of_the_batch() -> None:
    steps = [
        record(0, StepKind.FULL, (2, 2), [[0, 1, 2, 3]] * 2),
        record(1, StepKind.PRUNED, (2, 2), [[0, 1], [2, 3]]),
        record(2, StepKind.PRUNED, (2, 2), [[0, 3], [1, 2]]),
    ]
    assert computed_counts(steps, 0).tolist() == [[2, 1], [0, 1]]
    assert computed_counts(steps).tolist() == [[0, 1], [2, 1]]
    with pytest.raises(SettingsError, match="row=2: the batch has 2 rows"):
        computed_counts(steps, 2)


def test_no_pruned_step_says_what_to_change(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="use more steps or fewer full steps"):
        draw_token_map(records(0), tmp_path / "map.png", None)
    assert list(tmp_path.iterdir()) == []


def test_steps_of_two_images_are_refused() -> None:
    with pytest.raises(ShapeError, match="different token grids"):
        computed_counts(records(2, (4, 4)) + records(2, (4, 8)))


def test_a_comparison_enlarges_small_images_by_a_whole_factor(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    panels = [
        (Image.fromarray(noise), "full · 28 steps · 1.23 s"),
        (picture((128, 128), (9, 90, 190)), "CAT keep 0.3 · 0.71 s · 41.2 dB"),
    ]
    draw_comparison(panels, tmp_path / "both.png")
    drawn = np.asarray(Image.open(tmp_path / "both.png"))
    margin = (drawn.shape[1] - 2 * 384) // 3
    left = drawn[margin : margin + 384, margin : margin + 384]
    assert (left == noise.repeat(3, axis=0).repeat(3, axis=1)).all()
    right = drawn[margin : margin + 384, 2 * margin + 384 : 2 * margin + 768]
    assert (right == (9, 90, 190)).all()
    captions = drawn[margin + 384 :]
    for half in (captions[:, : drawn.shape[1] // 2], captions[:, drawn.shape[1] // 2 :]):
        assert half.min() < 64  # ink under each image


def test_a_comparison_takes_images_of_several_sizes_and_long_captions(tmp_path: Path) -> None:
    panels = [(picture((1024, 512), (1, 2, 3)), "a"), (picture((64, 512), (4, 5, 6)), "a long caption " * 12)]
    draw_comparison(panels, tmp_path / "both.png")
    short = [(image, "a") for image, _ in panels]
    draw_comparison(short, tmp_path / "short.png")
    with Image.open(tmp_path / "both.png") as wrapped, Image.open(tmp_path / "short.png") as single:
        assert wrapped.width == single.width >= 1024 + 384
        assert wrapped.height > single.height > 512


def test_an_empty_comparison_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="at least one panel"):
        draw_comparison([], tmp_path / "both.png")


def test_an_existing_picture_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "both.png"
    path.write_bytes(b"old")
    draw_comparison([(picture((8, 8), (0, 0, 0)), "new")], path)
    with Image.open(path) as drawn:
        drawn.verify()


def test_what_is_no_png_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"ends in \.png"):
        draw_comparison([(picture((8, 8), (0, 0, 0)), "")], tmp_path / "both.jpg")


def test_what_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    panels = [(picture((8, 8), (0, 0, 0)), "caption")]
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "missing" / "a.png", tmp_path / "file" / "a.png", tmp_path / "folder.png"):
        with pytest.raises(OutputError, match=r"\.png: cannot write the picture .*give a path"):
            draw_comparison(panels, path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_psnr() -> None:
    black, almost = picture((4, 2), (0, 0, 0)), picture((4, 2), (5, 5, 5))
    assert psnr_db(black, black) == math.inf
    assert psnr_db(black, almost) == psnr_db(almost, black) == pytest.approx(20 * math.log10(255 / 5))
    assert psnr_db(black, picture((4, 2), (255, 255, 255))) == 0.0
    assert psnr_db(black, Image.new("L", (4, 2), 5)) == pytest.approx(psnr_db(black, almost))
    with pytest.raises(ShapeError, match="4x2 and 2x4"):
        psnr_db(black, picture((2, 4), (0, 0, 0)))
