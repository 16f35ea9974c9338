"""Random transformers of PixArt, FLUX and SD3.5 in two sizes, exported, and their pipelines around both engines."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

from cat_pruning.checkpoints.checkpoint import quiet_diffusers
from cat_pruning.engines.onnxruntime_engine import OnnxRuntimeStepEngine
from cat_pruning.engines.step_engine import StepEngine
from cat_pruning.engines.torch_engine import TorchStepEngine
from cat_pruning.exporter.split import Graph
from cat_pruning.exporter.step_graph import export_step_graph
from cat_pruning.families import family_of
from cat_pruning.families.interception import StepModule
from cat_pruning.models import miniatures
from cat_pruning.runtime.transformer import CatTransformer
from cat_pruning.settings import PruneSettings
from cat_pruning.step_io import Part

TEXT_LENGTH = 24  # of CLIP in sd3-mini; T5 takes any

# Name -> pipeline, transformer, config but for the widths of the text. "tiny" is for odd shapes; "middle" has at least
# six layers and, at 64 x 64 latents, 1024 tokens.
_KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "pixart-tiny": (
        PixArtSigmaPipeline,
        PixArtTransformer2DModel,
        {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 8, "sample_size": 32},
    ),
    "pixart-middle": (
        PixArtSigmaPipeline,
        PixArtTransformer2DModel,
        {"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 16, "sample_size": 128},
    ),
    "flux-tiny": (  # as schnell: no guidance
        FluxPipeline,
        FluxTransformer2DModel,
        {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16},
    ),
    "flux-middle": (  # as dev
        FluxPipeline,
        FluxTransformer2DModel,
        {"num_layers": 3, "num_single_layers": 3, "num_attention_heads": 4, "attention_head_dim": 16}
        | {"guidance_embeds": True},
    ),
    "sd35-tiny": (
        StableDiffusion3Pipeline,
        SD3Transformer2DModel,
        {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 8, "dual_attention_layers": (0,)}
        | {"sample_size": 32, "pos_embed_max_size": 24},
    ),
    "sd35-middle": (
        StableDiffusion3Pipeline,
        SD3Transformer2DModel,
        {"num_layers": 6, "num_attention_heads": 4, "attention_head_dim": 16, "dual_attention_layers": (0, 1, 2)}
        | {"sample_size": 64, "pos_embed_max_size": 48},
    ),
}


@dataclass
class Model:
    """A random transformer, its pipeline's class and other parts, its exported graphs, and both engines over it."""

    name: str
    transformer: Any
    pipeline_class: Any
    parts: dict[str, Any]
    directory: Path
    graphs: dict[Part, Graph]
    engines: dict[str, StepEngine] = field(default_factory=dict)

    def pipeline(self, transformer: Any = None, scheduler: Any = None, pipeline_class: Any = None) -> Any:
        """The pipeline around a transformer, or the untouched one; a scheduler of its own."""
        scheduler = scheduler or self.parts["scheduler"]
        parts = self.parts | {
            "scheduler": type(scheduler).from_config(scheduler.config),
            "transformer": self.transformer if transformer is None else transformer,
        }
        pipe = (pipeline_class or self.pipeline_class)(**parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def drop_in(self, engine: str, scheduler: Any = None, pipeline_class: Any = None, **settings: Any) -> Any:
        """The pipeline with a new `CatTransformer` over an engine."""
        transformer = CatTransformer(self.engines[engine], PruneSettings(**settings))
        return self.pipeline(transformer, scheduler, pipeline_class)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """A model by name; made and exported when it is first asked for. Read only."""

    @functools.cache
    def make(name: str) -> Model:
        pipeline_class, transformer_class, config = _KINDS[name]
        parts = _parts(pipeline_class)
        transformer = _random(transformer_class, config | _text_widths(pipeline_class, config, parts))
        family = family_of(transformer)
        directory = tmp_path_factory.mktemp(name)
        graphs = export_step_graph(StepModule(transformer, family), directory)
        engines = {
            "onnxruntime": OnnxRuntimeStepEngine(directory, family, torch.float32),
            "torch": TorchStepEngine(transformer),
        }
        return Model(name, transformer, pipeline_class, parts, directory, graphs, engines)

    return make


@functools.cache
def _parts(pipeline_class: Any) -> dict[str, Any]:
    """Everything but the transformer, from the packaged miniatures."""
    pixart, sd3 = miniatures()["pixart-mini"], miniatures()["sd3-mini"]
    with quiet_diffusers():
        if pipeline_class is not FluxPipeline:
            absent = {"transformer": None} | (
                {"text_encoder_3": None, "tokenizer_3": None} if pipeline_class is StableDiffusion3Pipeline else {}
            )
            directory = pixart if pipeline_class is PixArtSigmaPipeline else sd3
            return dict(pipeline_class.from_pretrained(directory, dtype=torch.float32, **absent).components)
        return {
            "scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(sd3 / "scheduler"),
            "vae": AutoencoderKL.from_pretrained(sd3 / "vae"),
            "text_encoder": CLIPTextModel.from_pretrained(sd3 / "text_encoder"),
            "tokenizer": AutoTokenizer.from_pretrained(sd3 / "tokenizer"),
            "text_encoder_2": T5EncoderModel.from_pretrained(pixart / "text_encoder"),
            "tokenizer_2": AutoTokenizer.from_pretrained(pixart / "tokenizer"),
        }


def _text_widths(pipeline_class: Any, config: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
    """What follows from the text encoders and the autoencoder, and what is the same for every size."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    channels = parts["vae"].config.latent_channels
    if pipeline_class is PixArtSigmaPipeline:
        text = parts["text_encoder"].config.d_model
        return {
            "in_channels": channels,
            "out_channels": 2 * channels,
            "caption_channels": text,
            "cross_attention_dim": width,
            "use_additional_conditions": False,
        }
    if pipeline_class is FluxPipeline:
        head = config["attention_head_dim"]
        return {
            "in_channels": 4 * channels,
            "joint_attention_dim": parts["text_encoder_2"].config.d_model,
            "pooled_projection_dim": parts["text_encoder"].config.hidden_size,
            "axes_dims_rope": (head // 4, head // 4, head // 2),
        }
    text = parts["text_encoder"].config.projection_dim + parts["text_encoder_2"].config.projection_dim
    return {
        "in_channels": channels,
        "out_channels": channels,
        "joint_attention_dim": text,
        "pooled_projection_dim": text,
        "caption_projection_dim": width,
        "qk_norm": "rms_norm",
    }


def _random(transformer_class: Any, config: dict[str, Any]) -> Any:
    """The same on every call; norms' weights and biases are random too, and outputs of order 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformer_class(**config).eval().requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    return model
