"""What a comparison of a full and a pruned run says, as numbers."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.profiles import profile_spec
from cat_pruning.errors import OutputError
from cat_pruning.exporter.export import profile_macs
from cat_pruning.exporter.macs import ImageMacs
from cat_pruning.families import family_named
from cat_pruning.files import write_whole
from cat_pruning.settings import PruneSettings
from cat_pruning.tools.generate import GenerateConfig, Run, never_pruned
from cat_pruning.tools.pictures import psnr_db


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A full and a pruned run of one configuration.

    engine: its name. full_step_ms, pruned_step_ms: medians, selection included; None where there is no such step.
    step_speedup: their ratio. mac_bound: MACs of a full step over those of a pruned one, attention scores included;
        None where a pruned step computes nothing.
    full_macs, pruned_macs: of one run. psnr_db: of each image, pruned against full. versions: that made the bundle.
    """

    engine: str
    full_step_ms: float | None
    pruned_step_ms: float | None
    full_image_s: float
    pruned_image_s: float
    mac_bound: float | None
    full_macs: int
    pruned_macs: int
    psnr_db: list[float]
    versions: dict[str, str]

    @property
    def step_speedup(self) -> float | None:
        """A full step's time over a pruned one's."""
        return self.full_step_ms / self.pruned_step_ms if self.full_step_ms and self.pruned_step_ms else None

    @property
    def step_speedup_text(self) -> str:
        """The same for people."""
        if self.step_speedup is None:
            return "–, no step was pruned"
        return f"{self.step_speedup:.2f}×" if self.mac_bound else "–"

    @property
    def mac_bound_text(self) -> str:
        """The bound for people."""
        return f"{self.mac_bound:.2f}×" if self.mac_bound else "–, a pruned step computes nothing"

    @property
    def image_psnr_db(self) -> float:
        """Mean over the images; infinite where they are equal."""
        return statistics.fmean(self.psnr_db)

    @property
    def psnr_text(self) -> str:
        """The same for people."""
        return f"{self.image_psnr_db:.1f} dB" if math.isfinite(self.image_psnr_db) else "infinite: equal images"


def summarise(
    bundle: Bundle, engine: str, settings: PruneSettings, config: GenerateConfig, full: Run, pruned: Run
) -> Comparison:
    """Compare two runs of `config`; the MACs are counted from the bundle's graph at the runs' own shapes."""
    manifest = bundle.manifest
    family = family_named(manifest.family, manifest.transformer_config)
    profile = profile_spec(
        config.height,
        config.width,
        len(config.prompts),
        geometry=manifest.geometry,
        settings=settings,
        guidance=config.guidance_scale > 1.0 and family.batched_guidance,
    )
    spec = profile_macs(bundle.path, manifest.graphs, profile, manifest.geometry.patch_size)
    macs = ImageMacs(spec.full_total, spec.pruned_total, spec.prompt_linear, spec.timestep_linear)
    return Comparison(
        engine=engine,
        full_step_ms=full.median_ms(full=True),
        pruned_step_ms=pruned.median_ms(full=False),
        full_image_s=full.seconds,
        pruned_image_s=pruned.seconds,
        mac_bound=macs.full / macs.pruned if macs.pruned else None,
        full_macs=macs.pruned_image(config.steps, never_pruned(settings, config.steps)),
        pruned_macs=macs.pruned_image(config.steps, settings),
        psnr_db=[psnr_db(a, b) for a, b in zip(full.images, pruned.images, strict=True)],
        versions=manifest.versions,
    )


def write_summary(comparison: Comparison, path: Path) -> None:
    """Write the numbers as JSON; an infinite PSNR, which JSON does not know, as null.

    Raises:
        OutputError: the file cannot be written.
    """
    fields = dataclasses.asdict(comparison) | {
        "step_speedup": comparison.step_speedup,
        "image_psnr_db": comparison.image_psnr_db if math.isfinite(comparison.image_psnr_db) else None,
        "psnr_db": [value if math.isfinite(value) else None for value in comparison.psnr_db],
    }
    try:
        write_whole(path, json.dumps(fields, indent=2) + "\n")
    except OSError as error:
        raise OutputError(f"--summary {path} cannot be written ({error.strerror})", "give another path") from error
