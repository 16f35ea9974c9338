"""What is in a bundle: its model, its parts and their sizes, plans by GPU and version, schedules."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.manifest import Manifest
from cat_pruning.bundle.plan_sets import plan_sets
from cat_pruning.bundle.schedules import read_schedules, schedule_name, speed_of
from cat_pruning.bundle.signatures import SIGNATURE_NAME
from cat_pruning.names import Flavour


@dataclass(frozen=True, slots=True, kw_only=True)
class PartFiles:
    """The files of one part: a graph and its weights, or a component of the pipeline.

    Attributes:
        name: of the graph, of the folder, or of the file.
        num_files: of it.
        size: in bytes.
        sha256: of its files' names and hashes.
    """

    name: str
    num_files: int
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plans:
    """A set of plans; see `PlanSpec`."""

    name: str
    flavour: Flavour
    version: str
    architectures: tuple[str, ...]
    parts: tuple[str, ...]
    token_ops: str
    refittable: bool
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleOf:
    """A schedule: its name, its steps and how many are full, and how many times as fast as the full run it is."""

    name: str
    num_steps: int
    full_steps: int
    speedup: float
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """All that `cat-bundle inspect` tells; the fields that are no parts are the manifest's.

    Attributes:
        path: of the bundle.
        digest: see `Manifest.digest`.
        signed: whether there is a signature; `cat-bundle verify --public-key` checks it.
        profiles: the names of those that plans are built for.
        size: of all files, in bytes.
    """

    path: str
    format_version: int
    digest: str
    signed: bool
    family: str
    transformer_class: str
    dtype: str
    quantization: str | None
    calibration: str | None
    unquantized: tuple[str, ...]
    guidance: bool
    source: dict[str, Any]
    settings: dict[str, Any]
    profiles: tuple[str, ...]
    text_length: int
    pipeline: dict[str, Any] | None
    parts: tuple[PartFiles, ...]
    plans: tuple[Plans, ...]
    schedules: tuple[ScheduleOf, ...]
    versions: dict[str, str]
    size: int


def contents_of(bundle: Bundle) -> Contents:
    """What a bundle's manifest lists, and its schedules, which are read and checked.

    Raises:
        BundleError: a schedule is missing or was edited.
        ScheduleError: one is of another version, or was made for another model.
    """
    manifest = bundle.manifest
    sizes = {schedule_name(name): manifest.files[name].size for name in manifest.schedules}
    return Contents(
        path=str(bundle.path),
        format_version=manifest.format_version,
        digest=manifest.digest,
        signed=(bundle.path / SIGNATURE_NAME).exists(),
        family=manifest.family,
        transformer_class=manifest.transformer_class,
        dtype=str(manifest.dtype),
        quantization=str(manifest.quantization) if manifest.quantization else None,
        calibration=manifest.calibration,
        unquantized=manifest.unquantized,
        guidance=manifest.guidance,
        source=manifest.source.model_dump(mode="json"),
        settings=manifest.settings.to_dict(),
        profiles=tuple(profile.name for profile in manifest.profiles),
        text_length=manifest.geometry.text_length,
        pipeline=manifest.pipeline.model_dump(mode="json", exclude_none=True) if manifest.pipeline else None,
        parts=parts_of(manifest),
        plans=plans_of(manifest),
        schedules=tuple(
            ScheduleOf(
                name=name,
                num_steps=schedule.num_steps,
                full_steps=len(schedule.full_steps),
                speedup=speed_of(schedule),
                size=sizes.get(name, 0),
            )
            for name, schedule in read_schedules(bundle).items()
        ),
        versions=manifest.versions,
        size=sum(spec.size for spec in manifest.files.values()),
    )


def parts_of(manifest: Manifest) -> tuple[PartFiles, ...]:
    """The parts: all files but plans and schedules, a graph's with its weights, a component's in one."""
    others = {*manifest.schedules, *(plan.file for plan in manifest.plans)}
    groups: dict[str, list[str]] = {}
    for name in manifest.files:
        if name not in others:
            groups.setdefault(_part(name), []).append(name)
    return tuple(
        PartFiles(name=part, num_files=len(names), size=_size(manifest, names), sha256=_hash(manifest, names))
        for part, names in groups.items()
    )


def plans_of(manifest: Manifest) -> tuple[Plans, ...]:
    """The sets of plans."""
    return tuple(
        Plans(
            name=each.name,
            flavour=each.flavour,
            version=each.version,
            architectures=each.architectures,
            parts=tuple(plan.part.value for plan in each.plans),
            token_ops=each.plans[0].token_ops,
            refittable=each.plans[0].refittable,
            size=_size(manifest, [plan.file for plan in each.plans]),
            sha256=_hash(manifest, [plan.file for plan in each.plans]),
        )
        for each in plan_sets(manifest.plans)
    )


def _part(name: str) -> str:
    """step.onnx of step.onnx.data; pipeline/vae of pipeline/vae/config.json; pipeline/model_index.json is its own."""
    folders = name.split("/")
    return "/".join(folders[:2]) if len(folders) > 1 else re.sub(r"(\.onnx)\..*", r"\1", name)


def _size(manifest: Manifest, names: list[str]) -> int:
    return sum(manifest.files[name].size for name in names)


def _hash(manifest: Manifest, names: list[str]) -> str:
    lines = sorted(f"{manifest.files[name].sha256}  {name}\n" for name in names)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
