"""Two bundles compared, by their manifests: what was exported, settings, shapes, weights, parts, plans, schedules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.manifest import Manifest
from cat_pruning.bundle.schedules import schedule_name
from cat_pruning.console import file_size
from cat_pruning.tools.bundle_contents import parts_of, plans_of

_HASH_DIGITS = 12  # of a hash, shown beside a size


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One thing that is not the same in two bundles; None where one of them does not have it."""

    section: str
    name: str
    first: Any
    second: Any


def differences(first: Bundle, second: Bundle) -> tuple[Difference, ...]:
    """What differs, in the order of `_sections`. Nothing but the manifests is read: files are told by their hashes."""
    ours, theirs = _sections(first.manifest), _sections(second.manifest)
    return tuple(found for section in ours for found in _of_section(section, ours[section], theirs[section]))


def _of_section(section: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Difference]:
    for name in {**ours, **theirs}:
        if (first := ours.get(name)) != (second := theirs.get(name)):
            yield Difference(section=section, name=name, first=first, second=second)


def _sections(manifest: Manifest) -> dict[str, dict[str, Any]]:
    config = {f"config {name}": value for name, value in manifest.transformer_config.items()}
    others = manifest.pipeline.model_dump(mode="json", exclude_none=True) if manifest.pipeline else {}
    return {
        "source": manifest.source.model_dump(mode="json"),
        "model": {
            "family": manifest.family,
            "class": manifest.transformer_class,
            "dtype": str(manifest.dtype),
            "quantization": str(manifest.quantization) if manifest.quantization else None,
            "calibration": manifest.calibration,
            "unquantized": " ".join(manifest.unquantized) or None,
            "guidance": manifest.guidance,
            **manifest.geometry.model_dump(mode="json"),
            **config,
        },
        "settings": manifest.settings.to_dict(),
        "shapes": {each.name: f"{each.num_tokens} tokens, {each.num_kept} kept" for each in manifest.profiles},
        "parts": {each.name: _shown(each.size, each.sha256) for each in parts_of(manifest)}
        | {f"pipeline {name}": value for name, value in others.items()},
        "plans": {each.name: _shown(each.size, each.sha256) for each in plans_of(manifest)},
        "schedules": {
            schedule_name(name): _shown(manifest.files[name].size, manifest.files[name].sha256)
            for name in manifest.schedules
        },
        "versions": dict(manifest.versions),
    }


def _shown(size: int, sha256: str) -> str:
    return f"{file_size(size)}, {sha256[:_HASH_DIGITS]}"
