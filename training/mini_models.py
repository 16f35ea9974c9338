"""What the miniatures share: their sizes, their autoencoder, and the interface that the trainer uses.

`mini_sd3.py` and `mini_pixart.py` fill in the classes of one large model each, small enough for a
laptop's processor; `MINIATURES` in `miniatures.py` names them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from scene_kinds import SceneKind

TEXT_LENGTH = 24  # tokens of the longest caption of a flat scene, rounded up
VAE_FACTOR = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """The sizes of a new miniature.

    Attributes:
        side: the image's side in pixels; a multiple of 8.
        width: of the transformer.
        num_layers: blocks of the transformer.
        num_heads: heads of its attention.
        text_width: of each text encoder.
        text_layers: layers of each text encoder.
    """

    side: int = 128
    width: int = 192
    num_layers: int = 6
    num_heads: int = 6
    text_width: int = 96
    text_layers: tuple[int, ...] = (2, 3)

    def __post_init__(self) -> None:
        if self.side % (2 * VAE_FACTOR) or self.width % self.num_heads:
            raise ValueError(f"{self}: side must be a multiple of {2 * VAE_FACTOR}, width one of num_heads")


class Miniature(ABC):
    """A family of miniatures: how to make, load, train and save its models.

    Attributes:
        name: of its pipeline on disk.
        pipeline_class: of diffusers.
        size: of a new one.
        scenes: what it is trained on.
        text_length: tokens of the longest caption, rounded up.
        load_options: arguments that `from_pretrained` needs.
        call_options: arguments of the pipeline's call, so that it samples as in the training.
        guidance: the guidance scale to sample with.
        latents_are_shifted: whether the pipeline knows the autoencoder's `shift_factor`.
    """

    name: ClassVar[str]
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    size: ClassVar[ModelSize]
    scenes: ClassVar[SceneKind] = SceneKind.FLAT
    text_length: ClassVar[int] = TEXT_LENGTH
    load_options: ClassVar[dict[str, Any]] = {}
    call_options: ClassVar[dict[str, Any]] = {}
    guidance: ClassVar[float]
    latents_are_shifted: ClassVar[bool]

    @abstractmethod
    def new_tokenizer(self, words: list[str]) -> PreTrainedTokenizerBase:
        """A tokenizer for which every word is one token."""

    @abstractmethod
    def new_denoiser(self, size: ModelSize, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
        """An untrained denoiser: the models that are trained together."""

    @abstractmethod
    def denoiser_of(self, pipeline: DiffusionPipeline) -> nn.Module:
        """The denoiser made of a pipeline's models."""

    @abstractmethod
    def new_pipeline(self, denoiser: nn.Module, vae: AutoencoderKL, tokenizer: PreTrainedTokenizerBase) -> Any:
        """The pipeline of copies of the models in fp16."""

    @abstractmethod
    def loss(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        input_ids: Tensor,
        generator: torch.Generator,
        sigma_shift: float = 1.0,
    ) -> Tensor:
        """The loss of one batch, noised at random: latents (B, C, h, w) and token ids (B, T) to a scalar."""

    def load_pipeline(self, folder: Path) -> Any:
        """The pipeline in `folder` in fp32.

        Raises:
            FileNotFoundError: there is no pipeline in the folder.
        """
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(f"{folder}: no model_index.json; expected a pipeline in the diffusers layout")
        pipeline = self.pipeline_class.from_pretrained(
            str(folder), dtype=torch.float32, local_files_only=True, **self.load_options
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def save_pipeline(
        self, folder: Path, denoiser: nn.Module, vae: AutoencoderKL, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Write the pipeline in fp16 beside `folder`, then put it in its place; the models stay as they are."""
        staging, previous = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("new", "old"))
        for leftover in (staging, previous):
            shutil.rmtree(leftover, ignore_errors=True)
        self.new_pipeline(denoiser, vae, tokenizer).save_pretrained(str(staging))
        _tidy_configs(staging)
        if folder.exists():
            folder.rename(previous)
        staging.rename(folder)
        shutil.rmtree(previous, ignore_errors=True)


def quiet_libraries() -> None:
    """Turn off the progress bars of diffusers and transformers, which a log file cannot show."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


@contextlib.contextmanager
def sigterm_requests() -> Iterator[list[int]]:
    """A list that is no longer empty once SIGTERM came; outside of this, the signal ends the process as always."""
    requests: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: requests.append(number))
    try:
        yield requests
    finally:
        signal.signal(signal.SIGTERM, before)


def new_autoencoder(size: ModelSize) -> AutoencoderKL:
    """An untrained autoencoder, 0.4 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=size.side,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def half_copy(model: nn.Module) -> nn.Module:
    """The model in fp16, for the disk; the model itself stays as it is."""
    # A new model instead of a deep copy: of a compiled one, only the weights are wanted.
    copy = type(model)(model.config) if isinstance(model, PreTrainedModel) else type(model).from_config(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.half().eval()


def _tidy_configs(folder: Path) -> None:
    for file in itertools.chain((folder / "model_index.json",), folder.glob("*/config.json")):
        config = json.loads(file.read_text())
        # diffusers notes where a model was loaded from: a path of the machine that trained it.
        config.pop("_name_or_path", None)
        # transformers loads in the dtype of the config, diffusers in fp32: without this, a pipeline of both cannot run.
        if "dtype" in config:
            config["dtype"] = "float32"
        file.write_text(json.dumps(config, indent=2) + "\n")
