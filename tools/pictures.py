"""Pictures for people: which tokens each step computed, and images side by side with what they cost."""

from __future__ import annotations

import colorsys
import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cat_pruning.errors import OutputError, SettingsError, ShapeError
from cat_pruning.files import write_whole
from cat_pruning.runtime.record import StepRecord
from cat_pruning.schedule import StepKind

_PANEL_PIXELS = 256  # least length of a token map's longer side, before matplotlib scales it
_COMPUTED = np.array([255, 140, 0], dtype=np.float32)  # orange
_DOTS_PER_INCH = 140
_COMPARISON_PIXELS = 384  # least length of the longer side of a compared image
_MARGIN_PIXELS = 12
_FONT_PIXELS = 18


def draw_token_map(records: Sequence[StepRecord], path: str | Path, image: Image.Image | None, row: int = -1) -> None:
    """Draw which tokens were computed when, as a file: see `token_map`.

    Args:
        records: as there, and so are all others but one.
        path: the PNG; an existing file is replaced at once, never half.
        image: as there.
        row: as there.

    Raises:
        SettingsError: as there, or a path that is no PNG.
        ShapeError: as there.
        OutputError: the file cannot be written.
    """
    path = _png_path(path)
    _write(path, token_map(records, image, row))


def token_map(records: Sequence[StepRecord], image: Image.Image | None, row: int = -1) -> bytes:
    """Draw which tokens were computed when, as one PNG: image, clusters, a heat map, then every pruned step.

    Args:
        records: the steps of one image, in order; full steps are counted in the header only.
        image: what was generated, dimmed under the tokens; None draws them on plain grey.
        row: row of the batch; the default is the last, with guidance the conditional row of the last prompt.

    Copies the records' tensors to the host, which synchronises.

    Raises:
        SettingsError: no pruned step among the records, or a row outside the batch.
        ShapeError: records of different token grids.
    """
    pruned = _pruned_steps(records, row)
    layout = _Layout.of(len(pruned), pruned[0].grid)
    figure = Figure(figsize=(layout.width, layout.height), dpi=_DOTS_PER_INCH, layout="constrained")
    figure.suptitle(_header(records, pruned), fontsize=11, x=0.012, ha="left", linespacing=1.5)
    # Any: matplotlib's annotations know the single figure and axes only, not the arrays of them.
    parts: Any = figure.subfigures(2, 1, height_ratios=[layout.top_height, layout.steps_height])
    _draw_overview(parts[0], pruned, image, row)
    grid: Any = parts[1].subplots(layout.rows, layout.columns, squeeze=False)
    for axes in grid.flat:
        _hide_axes(axes)
    titles = [f"step {record.step} · {record.num_kept}/{record.num_tokens} tokens" for record in pruned]
    font_size = layout.title_size(max(titles, key=len))
    for axes, record, title in zip(grid.flat, pruned, titles, strict=False):
        axes.imshow(step_pixels(record, image, row), interpolation="nearest")
        axes.set_title(title, fontsize=font_size, pad=2)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def draw_comparison(panels: Sequence[tuple[Image.Image, str]], path: str | Path) -> None:
    """Draw images side by side with a caption under each, as one PNG.

    Small images are enlarged by a whole factor, without smoothing, until their longer side has 384 pixels.

    Args:
        panels: images and captions, left to right; long captions wrap.
        path: the PNG; an existing file is replaced at once, never half.

    Raises:
        SettingsError: no panels, or a path that is no PNG.
        OutputError: the file cannot be written.
    """
    if not panels:
        raise SettingsError("no images to compare: expected at least one panel")
    path = _png_path(path)
    font = _font()
    images = [_enlarged(image) for image, _ in panels]
    widths = [max(image.width, _COMPARISON_PIXELS) for image in images]
    captions = [_wrapped(caption, font, width) for (_, caption), width in zip(panels, widths, strict=True)]
    tallest = max(image.height for image in images)
    line_pixels = round(1.35 * _FONT_PIXELS)
    caption_pixels = line_pixels * max(len(lines) for lines in captions)
    sheet = Image.new(
        "RGB",
        (sum(widths) + _MARGIN_PIXELS * (len(panels) + 1), tallest + caption_pixels + 3 * _MARGIN_PIXELS),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    left = _MARGIN_PIXELS
    for image, lines, width in zip(images, captions, widths, strict=True):
        sheet.paste(image, (left + (width - image.width) // 2, _MARGIN_PIXELS))
        for number, line in enumerate(lines):
            top = tallest + 2 * _MARGIN_PIXELS + number * line_pixels
            draw.text((left + width / 2, top), line, fill="black", font=font, anchor="ma")
        left += width + _MARGIN_PIXELS
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    _write(path, buffer.getvalue())


def psnr_db(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio of two images in dB: 10 · log10(255² / mean squared difference of their RGB values).

    Args:
        a: an image of 8 bits per channel; converted to RGB.
        b: another of the same size.

    Returns:
        The ratio in dB; infinity if the images are equal.

    Raises:
        ShapeError: the sizes differ.
    """
    if a.size != b.size:
        raise ShapeError(f"images of {a.width}x{a.height} and {b.width}x{b.height} pixels: expected the same size")
    difference = np.asarray(a.convert("RGB"), dtype=np.float64) - np.asarray(b.convert("RGB"), dtype=np.float64)
    squared = float(np.mean(difference**2))
    return math.inf if squared == 0.0 else 10.0 * math.log10(255.0**2 / squared)


def computed_counts(records: Sequence[StepRecord], row: int = -1) -> NDArray[np.int64]:
    """How often each token was computed over the pruned steps of the records: (height, width).

    Raises:
        SettingsError: no pruned step among the records, or a row outside the batch.
        ShapeError: records of different token grids.
    """
    counts: NDArray[np.int64] = np.sum([_computed(r, row) for r in _pruned_steps(records, row)], axis=0, dtype=np.int64)
    return counts


def step_pixels(record: StepRecord, image: Image.Image | None, row: int = -1) -> NDArray[np.uint8]:
    """One step as RGB pixels: computed tokens orange, the others grey, the image dimmed under both.

    Returns:
        (height * c, width * c, 3) uint8, each token a square of c pixels.
    """
    height, width = record.grid
    cell = max(1, math.ceil(_PANEL_PIXELS / max(height, width)))
    if image is None:
        grey = np.full((height * cell, width * cell, 1), 105.0, dtype=np.float32)
    else:
        scaled = image.convert("L").resize((width * cell, height * cell), Image.Resampling.BICUBIC)
        grey = np.asarray(scaled, dtype=np.float32)[..., None]
    computed = np.kron(_computed(record, row), np.ones((cell, cell), dtype=bool))[..., None]
    # Colour against grey, not light against dark: black and white images must stay readable.
    dimmed = 30.0 + 0.45 * grey
    highlighted = 0.78 * _COMPUTED + 0.22 * grey
    return np.where(computed, highlighted, np.broadcast_to(dimmed, highlighted.shape)).astype(np.uint8)


def _computed(record: StepRecord, row: int) -> NDArray[np.bool_]:
    computed = np.zeros(record.num_tokens, dtype=bool)
    computed[record.keep_indices[row].cpu().numpy()] = True
    return computed.reshape(record.grid)


def _pruned_steps(records: Sequence[StepRecord], row: int) -> list[StepRecord]:
    pruned = [record for record in records if record.kind is StepKind.PRUNED]
    if not pruned:
        raise SettingsError(
            f"all {len(records)} steps were full, so there is no pruned step to draw",
            "use more steps or fewer full steps (full_steps)",
        )
    if len(grids := {record.grid for record in pruned}) > 1:
        raise ShapeError(f"records of different token grids {sorted(grids)}: expected the steps of one image")
    batch = min(record.keep_indices.shape[0] for record in pruned)
    if not -batch <= row < batch:
        raise SettingsError(f"row={row}: the batch has {batch} rows")
    return pruned


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Sizes of a token map, in inches."""

    columns: int
    rows: int
    width: float
    top_height: float
    steps_height: float

    @property
    def height(self) -> float:
        return self.top_height + self.steps_height + 0.75  # the header

    def title_size(self, title: str) -> float:
        """Points at which a step's title is no wider than its column; a character is 0.62 of that on average."""
        return min(8.0, 72.0 * self.width / self.columns / (0.62 * len(title)))

    @classmethod
    def of(cls, num_steps: int, grid: tuple[int, int]) -> _Layout:
        """Seven columns for 20 square panels, nine for 42, fewer and wider ones for wide images."""
        ratio = grid[0] / grid[1]  # height over width
        columns = max(1, min(num_steps, round(math.sqrt(num_steps * 2.45 * ratio))))
        rows = math.ceil(num_steps / columns)
        columns = math.ceil(num_steps / rows)  # the last row as full as it gets
        width = 10.0 + 1.2 * max(0, columns - 7)
        step_width = min(width / columns, 2.2, 2.2 / ratio)
        return cls(
            columns=columns,
            rows=rows,
            width=width,
            top_height=min(width / 3.5, 3.6 / ratio) * ratio + 0.4,
            steps_height=rows * (step_width * ratio + 0.2),
        )


def _header(records: Sequence[StepRecord], pruned: Sequence[StepRecord]) -> str:
    share = sum(record.num_kept for record in pruned) / sum(record.num_tokens for record in pruned)
    return (
        f"{len(records)} steps: {len(records) - len(pruned)} computed every token, "
        f"{len(pruned)} computed {share:.0%} of them\n"
        "Orange tokens were computed on that step, grey ones kept their last output. Steps count from 0."
    )


def _draw_overview(figure: Any, pruned: Sequence[StepRecord], image: Image.Image | None, row: int) -> None:
    """The panels of the first row; `figure` is a SubFigure."""
    cluster_ids = next((record.cluster_ids for record in pruned if record.cluster_ids is not None), None)
    panels = ["image"] * (image is not None) + ["clusters"] * (cluster_ids is not None) + ["counts"]
    axes: dict[str, Axes] = dict(zip(panels, figure.subplots(1, len(panels), squeeze=False).flat, strict=True))
    for panel in axes.values():
        _hide_axes(panel)
    if image is not None:
        axes["image"].imshow(image.convert("RGB"))
        axes["image"].set_title("image", fontsize=10)
    if cluster_ids is not None:
        ids = cluster_ids[row].cpu().numpy().reshape(pruned[0].grid)
        present, dense = np.unique(ids, return_inverse=True)
        axes["clusters"].imshow(_cluster_colours(len(present))[dense.reshape(ids.shape)], interpolation="nearest")
        axes["clusters"].set_title(f"{len(present)} clusters", fontsize=10)
    counts = computed_counts(pruned, row)
    heat = axes["counts"].imshow(counts, cmap="inferno", vmin=0, vmax=len(pruned), interpolation="nearest")
    axes["counts"].set_title(f"times computed in {len(pruned)} pruned step{'s' * (len(pruned) > 1)}", fontsize=10)
    bar = figure.colorbar(heat, ax=axes["counts"], fraction=0.046, pad=0.03, ticks=MaxNLocator(integer=True))
    bar.ax.tick_params(labelsize=8)


def _hide_axes(axes: Any) -> None:
    """Without ticks too: matplotlib measures those that it does not draw, for half of a map's time."""
    axes.set_axis_off()
    axes.set(xticks=[], yticks=[])


def _cluster_colours(count: int) -> NDArray[np.float64]:
    """Distinct colours, (count, 3) in [0, 1]: hues a golden angle apart, in four brightnesses in turn."""
    hues = [(number * 0.618034) % 1.0 for number in range(count)]
    values = [(0.97, 0.60, 0.78, 0.42)[number % 4] for number in range(count)]
    return np.array([colorsys.hsv_to_rgb(hue, 0.62, value) for hue, value in zip(hues, values, strict=True)])


def _font() -> ImageFont.FreeTypeFont:
    # The one matplotlib ships: Pillow's own has no "·", and what a system has differs.
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), _FONT_PIXELS)


def _enlarged(image: Image.Image) -> Image.Image:
    factor = max(1, math.ceil(_COMPARISON_PIXELS / max(image.size)))
    return image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _wrapped(caption: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    fits = max(8, int(width / (font.getlength("0123456789 abcdefghij") / 21)))
    return [line for part in caption.splitlines() for line in textwrap.wrap(part, fits)]


def _png_path(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise SettingsError(f"{path}: pictures are written as PNG", "give a path that ends in .png")
    return path


def _write(path: Path, content: bytes) -> None:
    try:
        write_whole(path, content)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot write the picture ({error.strerror or error})",
            "give a path in a folder that exists, is writable and has space left",
        ) from error
