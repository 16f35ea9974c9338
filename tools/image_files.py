"""Images as files, in the format of the file's ending."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cat_pruning.errors import OutputError
from cat_pruning.files import write_whole

if TYPE_CHECKING:
    from PIL import Image

# By the ending: Pillow's format and its options. What is not PNG loses some; at 95, nothing that one sees.
_FORMATS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95}),
    ".jpeg": ("JPEG", {"quality": 95}),
    ".webp": ("WEBP", {"quality": 95}),
}
ENDINGS: Final = tuple(_FORMATS)


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image in the format of the path's ending, one of `ENDINGS`; a file that is there is replaced at once.

    Raises:
        OutputError: the file cannot be written; what was there is as it was.
    """
    kind, options = _FORMATS[path.suffix.lower()]
    buffer = io.BytesIO()
    try:
        image.save(buffer, kind, **options)
        write_whole(path, buffer.getvalue())
    except (OSError, ValueError) as error:  # ValueError: more pixels than the format takes
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"{path} cannot be written ({reason})", "make room, or give another --out") from error
