from __future__ import annotations

import dataclasses

import pytest

from cat_pruning.bundle.profiles import TYPICAL_STEPS, plan_profiles, profile_spec, step_dims
from cat_pruning.bundle.schema import Geometry, GraphSpec, TensorSpec
from cat_pruning.errors import ShapeError
from cat_pruning.settings import PruneSettings
from cat_pruning.step_io import MAX_TIMESTEPS, Part, StepDims

SD3 = Geometry(pixels_per_latent=8, patch_size=2, latent_channels=16, max_latent_size=384, text_length=333)


def spec(height: int, width: int, prompts: int = 1, *, guidance: bool = True, geometry: Geometry = SD3):  # type: ignore[no-untyped-def]
    return profile_spec(height, width, prompts, geometry=geometry, settings=PruneSettings(), guidance=guidance)


def test_the_papers_shapes() -> None:
    profile = spec(1024, 1024)
    assert (profile.batch, profile.latent_height, profile.latent_width) == (2, 128, 128)
    assert (profile.num_tokens, profile.num_kept, profile.text_length) == (4096, 1228, 333)
    assert profile.name == "1024x1024-p1"
    full, pruned = step_dims(profile, SD3.patch_size)
    assert full == StepDims(
        batch=2, latent_height=128, latent_width=128, num_tokens=4096, joint_rows=4429, text_length=333, num_kept=4096
    )
    assert pruned == dataclasses.replace(full, num_kept=1228)


def test_height_comes_first() -> None:
    profile = spec(768, 1344, 4)
    assert (profile.height, profile.width, profile.latent_height, profile.latent_width) == (768, 1344, 96, 168)
    assert (profile.num_tokens, profile.prompts, profile.batch) == (48 * 84, 4, 8)
    assert profile.name == "768x1344-p4"


def test_without_guidance_a_prompt_is_one_row() -> None:
    assert [spec(512, 512, prompts, guidance=False).batch for prompts in (1, 3)] == [1, 3]


@pytest.mark.parametrize(
    ("size", "near"),
    [((1000, 1024), "992x1024"), ((1024, 1030), "1024x1024"), ((8, 8), "16x16"), ((0, 64), "16x64")],
)
def test_sides_that_are_no_multiples_of_a_token(size: tuple[int, int], near: str) -> None:
    with pytest.raises(ShapeError, match=rf"--resolution {size[0]}x{size[1]}: .*multiples of 16 pixels.*try {near}$"):
        spec(*size)


def test_the_suggested_size_is_a_good_one() -> None:
    spec(992, 1024)


@pytest.mark.parametrize("size", [(3088, 1024), (1024, 4096)])
def test_larger_than_the_position_table(size: tuple[int, int]) -> None:
    with pytest.raises(ShapeError, match="position table holds 3072x3072 pixels at most"):
        spec(*size)
    spec(*size, geometry=SD3.model_copy(update={"max_latent_size": None}))


def test_as_large_as_the_position_table() -> None:
    assert spec(3072, 3072).num_tokens == 192 * 192


def test_fewer_tokens_than_clusters() -> None:
    with pytest.raises(ShapeError, match=r"16 tokens, fewer than num_clusters=20; use a larger resolution"):
        spec(64, 64)


# ------------------------------------------------------------------ what plans are built for


def graph(part: Part, **inputs: tuple[int | str, ...]) -> GraphSpec:
    tensors = tuple(TensorSpec(name=name, dtype="FLOAT", shape=shape) for name, shape in inputs.items())
    return GraphSpec(part=part, file=part.onnx, inputs=tensors, outputs=())


STEP = graph(Part.STEP, keep_indices=("batch", "num_kept"), key_cache_0=("batch", "joint_rows", 64))
PROMPT = graph(Part.PROMPT, encoder_hidden_states=("batch", "text_length", 4096))
TIMESTEPS = graph(Part.TIMESTEP, timestep=("batch",), pooled=("batch", 2048), layer_gates=(24,))


def static(**shapes: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], ...]]:
    return {name: (shape, shape, shape) for name, shape in shapes.items()}


def test_a_step_has_a_full_and_a_pruned_profile_each_static() -> None:
    profiles = plan_profiles(STEP, [spec(1024, 1024), spec(512, 512, 2)], 2)
    assert profiles == [
        static(keep_indices=(2, 4096), key_cache_0=(2, 4429, 64)),
        static(keep_indices=(2, 1228), key_cache_0=(2, 4429, 64)),
        static(keep_indices=(4, 1024), key_cache_0=(4, 1357, 64)),
        static(keep_indices=(4, 307), key_cache_0=(4, 1357, 64)),
    ]


def test_a_pruned_step_that_keeps_every_token_is_no_second_profile() -> None:
    settings = PruneSettings(keep_ratio=1.0)
    profile = profile_spec(1024, 1024, 1, geometry=SD3, settings=settings, guidance=True)
    assert plan_profiles(STEP, [profile], 2) == [static(keep_indices=(2, 4096), key_cache_0=(2, 4429, 64))]


def test_a_pruned_step_that_computes_nothing_has_no_profile() -> None:
    profile = profile_spec(1024, 1024, 1, geometry=SD3, settings=PruneSettings(keep_ratio=0.0), guidance=True)
    assert plan_profiles(STEP, [profile], 2) == [static(keep_indices=(2, 4096), key_cache_0=(2, 4429, 64))]


def test_the_prompt_has_a_profile_for_every_number_of_prompts() -> None:
    profiles = [spec(1024, 1024), spec(512, 512), spec(512, 512, 3)]
    assert plan_profiles(PROMPT, profiles, 2) == [
        static(encoder_hidden_states=(2, 333, 4096)),
        static(encoder_hidden_states=(6, 333, 4096)),
    ]


def test_the_timesteps_are_one_to_many_at_once() -> None:
    assert (TYPICAL_STEPS, MAX_TIMESTEPS) == (28, 64)
    one = {"timestep": ((2,), (56,), (128,)), "pooled": ((2, 2048), (56, 2048), (128, 2048))}
    three = {"timestep": ((6,), (168,), (384,)), "pooled": ((6, 2048), (168, 2048), (384, 2048))}
    gates = static(layer_gates=(24,))
    assert plan_profiles(TIMESTEPS, [spec(1024, 1024), spec(512, 512), spec(512, 512, 3)], 2) == [
        one | gates,
        three | gates,
    ]
