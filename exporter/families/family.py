"""What a model family has to say: everything in the project that depends on the model is behind this interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from cat_pruning import step_io
from cat_pruning.errors import ShapeError
from cat_pruning.exporter.interception import TokenReuse
from cat_pruning.step_io import CacheSpec, Shape, StepDims


class Family(ABC):
    """One family of diffusers transformers.

    Class attributes:
        name: how the manifest and `--model` call it.
        transformer_class: the diffusers class that its checkpoints name.
        pipeline_class: the diffusers text-to-image pipeline.
        hub_id: the published checkpoint that `--model NAME` stands for.
        published_config: file in `exporter/configs` with that checkpoint's transformer config and geometry.
        input_names: the transformer's inputs by diffusers' names; `hidden_states` and `timestep` among them.
    """

    name: ClassVar[str]
    transformer_class: ClassVar[str]
    pipeline_class: ClassVar[str]
    hub_id: ClassVar[str]
    published_config: ClassVar[str]
    input_names: ClassVar[tuple[str, ...]]

    @abstractmethod
    def intercept(self, transformer: Any, reuse: TokenReuse) -> None:
        """Install the three interception points on `transformer`, in place."""

    @abstractmethod
    def caches(self, config: Mapping[str, Any]) -> list[CacheSpec]:
        """One entry per attention, in the order in which the layers run."""

    @abstractmethod
    def patchify(self, noise: Tensor, config: Mapping[str, Any]) -> Tensor:
        """(B, C, H, W) -> (B, N, p*p*C): the inverse of the model's own unpatchify."""

    @abstractmethod
    def text_length(self, model_inputs: Mapping[str, Tensor]) -> int:
        """T, the text rows that joint attention keeps in its caches; 0 for cross-attention models."""

    @abstractmethod
    def input_shapes(self, config: Mapping[str, Any], dims: StepDims) -> dict[str, Shape]:
        """The shapes of the transformer's inputs, by name and in the order of `input_names`."""

    def step_shapes(self, config: Mapping[str, Any], dims: StepDims) -> dict[str, Shape]:
        """The shapes of every input of the step graph, by name and in graph order."""
        return step_io.input_shapes(dims, config["out_channels"], self.caches(config), self.input_shapes(config, dims))

    @abstractmethod
    def pipeline_text_length(self, directory: Path) -> int:
        """T as the family's pipeline passes it at its defaults, for a checkpoint in the diffusers layout."""

    @abstractmethod
    def pipeline_arguments(self, pipeline: Any, text_length: int) -> dict[str, Any]:
        """What to pass to the family's pipeline so that it makes `text_length` text rows."""

    @abstractmethod
    def max_latent_size(self, config: Mapping[str, Any]) -> int | None:
        """The largest latent height or width that the position table holds; None where there is no table."""

    def check_latent_size(self, config: Mapping[str, Any], height: int, width: int) -> None:
        """Check that the model can take latents of this size.

        Raises:
            ShapeError: the patch size does not divide it, or the position table does not hold it.
        """
        patch, largest = config["patch_size"], self.max_latent_size(config)
        if height % patch or width % patch or not height or not width:
            raise ShapeError(f"latents of {height}x{width}: both sides must be multiples of the patch size {patch}")
        if largest is not None and max(height, width) > largest:
            raise ShapeError(
                f"latents of {height}x{width}: the model's position table holds {largest}x{largest} at most"
            )

    def input_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype of one input of a model of `dtype`: timesteps stay fp32, as schedulers give them."""
        return torch.float32 if name == "timestep" else dtype

    def forward_kwargs(self, model_inputs: dict[str, Tensor]) -> dict[str, Any]:
        """The arguments of the transformer's own `forward`."""
        return dict(model_inputs)
