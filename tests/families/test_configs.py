"""Configs of transformers that somebody has edited: refused by name, before anything is made of them."""

from __future__ import annotations

from typing import Any

import pytest

from cat_pruning.checkpoints.published import published_models
from cat_pruning.errors import CheckpointError
from cat_pruning.families import family_named, family_of

WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("sd3", {"num_layers": "two"}, r"num_layers is two \(Input should be a valid integer\)"),
    ("sd3", {"num_layers": 2.5}, r"num_layers is 2\.5 \(Input should be a valid integer"),
    ("sd3", {"num_layers": True}, r"num_layers is True \("),
    ("sd3", {"num_layers": None}, r"num_layers is None \("),
    ("sd3", {"num_layers": 0}, r"num_layers is 0 \(Input should be greater than or equal to 1\)"),
    ("sd3", {"num_layers": 10**9}, r"num_layers is 1000000000 \(Input should be less than or equal to 256\)"),
    ("sd3", {"patch_size": 0}, "patch_size is 0"),
    ("sd3", {"patch_size": -2}, "patch_size is -2"),
    ("sd3", {"in_channels": -4, "out_channels": None}, "in_channels is -4 .*; out_channels is None"),
    ("sd3", {"pos_embed_max_size": 10**6}, "pos_embed_max_size is 1000000"),
    ("sd3", {"pos_embed_max_size": 4}, "sample_size is 16, pos_embed_max_size and patch_size allow 8"),
    ("sd3", {"caption_projection_dim": 33}, "caption_projection_dim is 33, num_attention_heads and .* make it 32"),
    ("sd3", {"num_attention_heads": 8}, "caption_projection_dim is 32, .* make it 64"),
    ("sd3.5", {"dual_attention_layers": [0, 7]}, r"dual_attention_layers has \[7\], num_layers is 2"),
    ("sd3.5", {"dual_attention_layers": 0}, "dual_attention_layers is 0"),
    ("sd3.5", {"dual_attention_layers": [-1]}, "dual_attention_layers.0 is -1"),
    ("pixart", {"cross_attention_dim": 47}, "cross_attention_dim is 47, .* make it 48"),
    ("pixart", {"out_channels": 2}, "out_channels is 2, less than in_channels, 4"),
    ("pixart", {"interpolation_scale": -1}, "interpolation_scale is -1"),
    ("pixart", {"interpolation_scale": float("nan")}, "interpolation_scale is nan"),
    ("pixart", {"use_additional_conditions": "no"}, "use_additional_conditions is no"),
    ("pixart", {"caption_channels": []}, r"caption_channels is \[\]"),
    ("flux-dev", {"in_channels": 18}, "in_channels is 18 .*multiple of 4"),
    ("flux-dev", {"axes_dims_rope": [2, 2, 2]}, r"axes_dims_rope is \[2, 2, 2\], expected 3 numbers whose sum .*, 8"),
    ("flux-dev", {"axes_dims_rope": [4, 4]}, r"axes_dims_rope is \[4, 4\], expected 3"),
    ("flux-dev", {"guidance_embeds": 1}, "guidance_embeds is 1"),
    ("flux-dev", {"num_single_layers": -1}, "num_single_layers is -1"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), WRONG, ids=[f"{kind}-{change}" for kind, change, _ in WRONG])
def test_what_is_wrong_is_told(make_tiny: Any, kind: str, changes: dict[str, Any], message: str) -> None:
    family = family_of(make_tiny(kind))
    with pytest.raises(CheckpointError, match=rf"the config is not a {family.transformer_class}'s: .*{message}"):
        family_named(family.name, dict(family.config) | changes)


def test_what_is_left_out_is_told(make_tiny: Any) -> None:
    with pytest.raises(CheckpointError, match=r"num_layers is missing; num_attention_heads is missing; attention_head"):
        family_named("sd3", {})


def test_configs_of_every_kind_are_fine(tiny_transformer: Any) -> None:
    family = family_of(tiny_transformer)
    assert type(family_named(family.name, family.config)) is type(family)


@pytest.mark.parametrize("name", published_models())
def test_published_configs_are_fine(name: str) -> None:
    """Without their weights; what they leave out is as their class has it."""
    import diffusers
    import torch

    published = published_models()[name]
    transformer_class = getattr(diffusers, published.transformer_class)
    few = {"num_layers": 1, "num_single_layers": 1, "dual_attention_layers": ()}
    changes = {key: value for key, value in few.items() if key in published.transformer}
    with torch.device("meta"):
        config = transformer_class(**published.transformer | changes).config
    family_named(published.family.name, dict(config) | published.transformer)
