"""Quantized bundles of the model that an evaluation is of: their methods stand beside those of its own bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.errors import BundleError, SettingsError
from cat_pruning.runtime.engine_choice import open_signed
from cat_pruning.step_io import Part
from cat_pruning.tools.bundle_diff import Difference, differences

_SAME: Final = ("source", "model", "settings", "shapes")  # sections of `differences`
_OTHERWISE: Final = ("quantization", "calibration", "unquantized")  # of the model, how it was quantized


def open_quantized(
    places: Sequence[Path | str], first: Bundle, public_key: Path | None, engine: str
) -> dict[str, Bundle]:
    """The quantized bundles by the names of their quantizations, each of the first one's model.

    Args:
        places: directories or URLs.
        first: what they are compared with, which is not quantized.
        public_key: what they must be signed with.
        engine: that they are opened for.

    Raises:
        BundleError: a place has no bundle, or one that is not quantized, or of another model, exported otherwise, or
            with schedules that the first one does not have.
        SettingsError: the first one is quantized itself, or two are quantized in the same way.
        CatError: as `open_signed`.
    """
    if places and first.manifest.quantization:
        raise SettingsError(
            f"--quantized: {first.path} is in {first.manifest.quantization}, and the others are compared with it",
            "give the bundle that is not quantized first",
        )
    found: dict[str, Bundle] = {}
    for place in places:
        bundle = open_signed(place, public_key, engine)
        _check_quantized_from(first, bundle)
        name = str(bundle.manifest.quantization)
        if name in found:
            raise SettingsError(
                f"--quantized: {found[name].path} and {bundle.path} are both in {name}", "give one of them"
            )
        found[name] = bundle
    return found


def _check_quantized_from(first: Bundle, bundle: Bundle) -> None:
    """Check that but for its quantization a bundle is what the first one is.

    The graph of the timestep tells the weights: a quantization changes the step alone.
    """
    said = f"--quantized: {bundle.path} "
    if bundle.manifest.quantization is None:
        raise BundleError(said + "is not quantized", "export one by cat-export --quantize or --weights-only")
    found = differences(first, bundle)
    if other := next((each for each in found if each.section in _SAME and each.name not in _OTHERWISE), None):
        raise BundleError(said + f"is of another {_named(other)} than {first.path}", _again(first, bundle))
    if any(each.name == Part.TIMESTEP.onnx for each in found):
        raise BundleError(
            said + f"has other weights than {first.path}, or was exported by another version", _again(first, bundle)
        )
    if own := next((each for each in found if each.section == "schedules" and each.second is not None), None):
        raise BundleError(
            said + f"has a schedule {own.name} that is not one of {first.path}, whose schedules are used for both",
            "take one without schedules",
        )


def _named(other: Difference) -> str:
    return f"{other.section} ({other.name} is {other.second}, not {other.first})"


def _again(first: Bundle, bundle: Bundle) -> str:
    """How the first one is exported quantized as `bundle` is."""
    changes = {name: getattr(bundle.manifest, name) for name in _OTHERWISE}
    manifest = first.manifest.model_copy(update={**changes, "plans": ()})
    return f"export it as the first was: {manifest.export_command(bundle.path)}"
