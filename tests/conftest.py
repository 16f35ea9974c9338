"""What every test may use: the packaged miniature exported once, and a tiny transformer of the same class."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the network
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the tools set it; see `cat_pruning.console.run`

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from cat_pruning.exporter.checkpoint import quiet_diffusers
from cat_pruning.exporter.export import ExportConfig, export
from cat_pruning.models import miniatures

PROMPT = "a large red circle left of a small blue star on a plain black background"
TEXT_LENGTH = 48  # what sd3-mini was trained with: 24 CLIP tokens, 24 empty ones in T5's place

logging.getLogger("torch.onnx").setLevel(logging.ERROR)


@pytest.fixture(scope="session")
def mini_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sd3-mini as a bundle with every target that can be built here. Read only: copy it to change it."""
    out = tmp_path_factory.mktemp("bundles") / "sd3-mini"
    export(ExportConfig(model="sd3-mini", out=out, text_length=TEXT_LENGTH))
    return out


@pytest.fixture
def mini_pipeline() -> StableDiffusion3Pipeline:
    """The untouched diffusers pipeline of sd3-mini, fp32."""
    with quiet_diffusers():
        pipe = StableDiffusion3Pipeline.from_pretrained(
            miniatures()["sd3-mini"], dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def make_tiny_sd3() -> Callable[..., SD3Transformer2DModel]:
    """`tiny_sd3`, for tests, which cannot import it from here."""
    return tiny_sd3


def tiny_sd3(**changes: Any) -> SD3Transformer2DModel:
    """A random SD3 transformer of two small layers; the same on every call."""
    config = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 24,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 20,
        "pos_embed_max_size": 24,
    }
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    try:
        model = SD3Transformer2DModel(**{**config, **changes}).eval()
        torch.nn.init.normal_(model.proj_out.weight, std=0.1)  # a new model's output is almost zero
    finally:
        torch.random.set_rng_state(generator_state)
    return model
