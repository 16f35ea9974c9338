"""A TensorRT-RTX plan of 1024 tokens, in fp32; `test_build.py` has the tiny ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cat_pruning.bundle.profiles import plan_profiles, profile_spec
from cat_pruning.bundle.schema import Geometry
from cat_pruning.engines.builder.build import build_plan, can_build, plan_specs
from cat_pruning.exporter.export import graph_spec
from cat_pruning.settings import PruneSettings
from cat_pruning.step_io import Part

Make = Callable[..., Any]
TEXT_LENGTH = 48


@pytest.mark.long
@pytest.mark.skipif(not can_build("tensorrt_rtx"), reason="TensorRT-RTX is not installed")
def test_a_middle_size_can_be_built(models: Make, tmp_path: Path) -> None:
    """Its step: the other graphs do not know the number of tokens."""
    model = models("flux-middle")
    family = model.engines["torch"].family
    geometry = Geometry(
        pixels_per_latent=4,
        patch_size=family.patch_size,
        latent_channels=family.latent_channels,
        max_latent_size=family.max_latent_size,
        text_length=TEXT_LENGTH,
    )
    guidance = family.batched_guidance
    profile = profile_spec(256, 256, 1, geometry=geometry, settings=PruneSettings(), guidance=guidance)
    assert (profile.num_tokens, profile.num_kept) == (1024, 307)
    graph = graph_spec(Part.STEP, model.graphs[Part.STEP])
    build_plan(
        plan_specs("tensorrt_rtx")[0],
        model.directory / graph.file,
        tmp_path / "plan",
        plan_profiles(graph, [profile], 2),
    )
    assert (tmp_path / "plan").stat().st_size > (model.directory / f"{graph.file}.data").stat().st_size / 2
