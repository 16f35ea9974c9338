"""The shapes that an engine is built for.

For every resolution and number of prompts the step's engine has two profiles, one for full and one for pruned steps
(none where those compute nothing), each static (min = opt = max): wide dynamic ranges are slow and have given NaN in
DiT engines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from cat_pruning.bundle.schema import ComponentSpec, ComponentTensor, Geometry, GraphSpec, ProfileSpec
from cat_pruning.errors import ShapeError
from cat_pruning.settings import PruneSettings
from cat_pruning.step_io import MAX_TIMESTEPS, Part, Shape, StepDims

TYPICAL_STEPS = 28  # the pipelines' default
PlanProfile = dict[str, tuple[Shape, Shape, Shape]]  # input name -> min, opt, max


def profile_spec(
    height: int, width: int, prompts: int, *, geometry: Geometry, settings: PruneSettings, guidance: bool
) -> ProfileSpec:
    """The shapes of one resolution (pixels) and number of prompts.

    Raises:
        ShapeError: the size is no multiple of a token's, the position table does not hold it, or it has fewer
            tokens than there are clusters.
    """
    token = geometry.pixels_per_latent * geometry.patch_size
    if height <= 0 or width <= 0 or height % token or width % token:
        near = "x".join(str(max(token, round(side / token) * token)) for side in (height, width))
        raise ShapeError(
            f"--resolution {height}x{width}: both sides must be multiples of {token} pixels "
            f"({geometry.pixels_per_latent} per latent, {geometry.patch_size} latents per token)",
            f"try {near}",
        )
    latent_height, latent_width = height // geometry.pixels_per_latent, width // geometry.pixels_per_latent
    if geometry.max_latent_size is not None and max(latent_height, latent_width) > geometry.max_latent_size:
        largest = geometry.max_latent_size * geometry.pixels_per_latent
        raise ShapeError(
            f"--resolution {height}x{width}: the model's position table holds {largest}x{largest} pixels at most"
        )
    num_tokens = (latent_height // geometry.patch_size) * (latent_width // geometry.patch_size)
    return ProfileSpec(
        name=f"{height}x{width}-p{prompts}",
        height=height,
        width=width,
        prompts=prompts,
        batch=prompts * (2 if guidance else 1),
        latent_height=latent_height,
        latent_width=latent_width,
        num_tokens=num_tokens,
        num_kept=settings.num_kept(num_tokens),
        text_length=geometry.text_length,
    )


def step_dims(profile: ProfileSpec, patch_size: int) -> tuple[StepDims, StepDims]:
    """The dimensions of a full and of a pruned step at `profile`; `num_kept` of a pruned step may be 0: no step."""
    full = StepDims.of(
        batch=profile.batch,
        latent_height=profile.latent_height,
        latent_width=profile.latent_width,
        patch_size=patch_size,
        text_length=profile.text_length,
        num_kept=profile.num_tokens,
    )
    return full, dataclasses.replace(full, num_kept=profile.num_kept)


def plan_profiles(graph: GraphSpec, profiles: Sequence[ProfileSpec], patch_size: int) -> list[PlanProfile]:
    """The profiles that a plan of `graph` is built with, without repetitions.

    The step's: each profile twice, full and pruned, static. The prompt's: static. The timestep's: any number of steps
    at once, from one to `MAX_TIMESTEPS`, best at a schedule of `TYPICAL_STEPS`.
    """
    plan_profiles: list[PlanProfile] = []
    for profile in profiles:
        for dims in step_dims(profile, patch_size):
            if not dims.num_kept:
                continue
            steps = (1, TYPICAL_STEPS, MAX_TIMESTEPS) if graph.part is Part.TIMESTEP else (1, 1, 1)
            lowest, best, highest = (
                graph.input_shapes(dataclasses.replace(dims, batch=profile.batch * count)) for count in steps
            )
            plan_profile = {name: (lowest[name], best[name], highest[name]) for name in lowest}
            if plan_profile not in plan_profiles:
                plan_profiles.append(plan_profile)
    return plan_profiles


def component_profiles(spec: ComponentSpec, profiles: Sequence[ProfileSpec]) -> list[PlanProfile]:
    """The profiles that a plan of a component is built with, without repetitions.

    A text encoder's: from one prompt to as many as a batch has, of any of its lengths. An autoencoder's: the sizes and
    batches of the step's, static, so its tiles are none of them; and one image of each size, as slices, previews and
    the image that a batch begins with are.
    """
    prompts = [profile.prompts for profile in profiles]
    if spec.text_lengths is not None:
        rows = zip((1, prompts[0], max(prompts)), spec.text_lengths, strict=True)
        ranges = [{"batch": batch, "text_length": length} for batch, length in rows]
        return [{tensor.name: _at(tensor, ranges) for tensor in spec.inputs}]
    plan_profiles: list[PlanProfile] = []
    for profile, batch in [(each, batch) for each in profiles for batch in (each.prompts, 1)]:
        sizes = {
            "batch": batch,
            "latent_height": profile.latent_height,
            "latent_width": profile.latent_width,
            "height": profile.height,
            "width": profile.width,
        }
        plan_profile = {tensor.name: _at(tensor, [sizes] * 3) for tensor in spec.inputs}
        if plan_profile not in plan_profiles:
            plan_profiles.append(plan_profile)
    return plan_profiles


def _at(tensor: ComponentTensor, sizes: Sequence[Mapping[str, int]]) -> tuple[Shape, Shape, Shape]:
    lowest, best, highest = (tensor.shape_at(each) for each in sizes)
    return lowest, best, highest
