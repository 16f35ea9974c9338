"""What a model family has to say: everything in the project that depends on the model is behind this interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from cat_pruning import step_io
from cat_pruning.errors import SettingsError, ShapeError
from cat_pruning.families.configs import ModelConfig
from cat_pruning.families.interception import TokenReuse
from cat_pruning.files import read_json
from cat_pruning.step_io import LATENTS, TIMESTEP, CacheSpec, Part, Shape, StepDims, residual_names

MOST_TEXT: Final = 1 << 14  # text rows, where nothing else bounds them


class Modulation(NamedTuple):
    """An adaptive norm whose shifts, scales and gates depend on the timestep's embedding only.

    Attributes:
        norm: the module; its `linear`, after `silu`, makes them.
        factor: an input of the model and a place in it: what every third of the vectors, the gates, is multiplied by.
            None: nothing.
    """

    norm: Any
    factor: tuple[str, int] | None = None


class Family(ABC):
    """One family of diffusers transformers, every checkpoint of one class; an instance is bound to one config.

    The *arguments* of a transformer are what a pipeline passes to it, by diffusers' names; its *inputs* are what the
    exported graphs read, `hidden_states` and `timestep` among them. `conditioning` turns the former into the latter.

    Class attributes:
        name: how the manifest calls it.
        transformer_class: the diffusers class that its checkpoints name.
        timestep_inputs: the inputs that `timestep.onnx` may read; none has a dimension of image or text.
        prompt_inputs: the inputs that `prompt.onnx` may read.
        fp32_inputs: the inputs that stay fp32 whatever the model computes in.
        text_first: joint attention's order of rows, as the model's blocks have it.
        max_timestep: where its timesteps begin; they end at 0.
        lora_loader: the class in `diffusers.loaders` that reads its LoRA files; None where there is none.
        former_norm_type: the `norm_type` of its config under the former class, Transformer2DModel; None without one.
        batched_guidance: classifier-free guidance doubles the rows of a batch, [negative; positive].
        noise_is_tokens: the output is what the last scatter returns, not a picture made of it.
        residual_arguments: the arguments that a ControlNet's residuals come in; see `residuals`.
        config_model: what its config must be; see `cat_pruning.families.configs`.

    Args:
        config: of the transformer, by diffusers' names.
    """

    name: ClassVar[str]
    transformer_class: ClassVar[str]
    timestep_inputs: ClassVar[tuple[str, ...]]
    prompt_inputs: ClassVar[tuple[str, ...]]
    fp32_inputs: ClassVar[tuple[str, ...]] = (TIMESTEP,)
    text_first: ClassVar[bool] = False
    max_timestep: ClassVar[float] = 1000.0
    lora_loader: ClassVar[str | None] = None
    former_norm_type: ClassVar[str | None] = None
    batched_guidance: ClassVar[bool] = True
    noise_is_tokens: ClassVar[bool] = False
    residual_arguments: ClassVar[tuple[str, ...]] = ()
    takes_residuals: bool = False  # of an instance: whether exported steps have inputs for a ControlNet's residuals
    config_model: ClassVar[type[ModelConfig]] = ModelConfig

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    # The module: where it is intercepted, and how it is called.

    @abstractmethod
    def intercept(self, transformer: Any, reuse: TokenReuse) -> None:
        """Install the three interception points on `transformer`, in place."""

    @abstractmethod
    def forward_kwargs(self, model_inputs: dict[str, Tensor]) -> dict[str, Any]:
        """The arguments of the transformer's own `forward`; `reuse.inputs` holds the other inputs meanwhile."""

    @abstractmethod
    def caches(self) -> list[CacheSpec]:
        """One entry per attention, in the order in which the layers run."""

    def modulations(self, transformer: Any) -> list[Modulation]:
        """The adaptive norms whose linear layers would read the same embedding again for every image of a step.

        None of them where a model has next to nothing to gain.
        """
        return []

    def timestep_embedding(self, embed: Any, model_inputs: Mapping[str, Tensor]) -> Tensor:
        """What the modulations are made from, (B, D), by the module's `time_text_embed`, of `timestep_inputs`."""
        raise NotImplementedError

    # Shapes.

    @property
    @abstractmethod
    def patch_size(self) -> int:
        """Side of a token in latent pixels."""

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """Channels of the autoencoder's latents."""

    @property
    @abstractmethod
    def default_latent_size(self) -> int:
        """Side in latent pixels of the images that the model was trained on."""

    @property
    @abstractmethod
    def max_latent_size(self) -> int | None:
        """The largest latent height or width that the position table holds; None where there is no table."""

    @abstractmethod
    def noise_shape(self, dims: StepDims) -> Shape:
        """The shape of the transformer's output."""

    @abstractmethod
    def input_shapes(self, dims: StepDims) -> dict[str, Shape]:
        """The shapes of the model's inputs, by name; `hidden_states` and `timestep` first."""

    def step_shapes(self, dims: StepDims) -> dict[str, Shape]:
        """The shapes of every input of an unsplit step, by name and in graph order."""
        residuals = residual_names(self.num_residuals) if self.takes_residuals else []
        own = self.input_shapes(dims) | dict.fromkeys(residuals, (dims.batch, dims.num_tokens, self.caches()[0].width))
        return step_io.input_shapes(dims, self.noise_shape(dims), self.caches(), own)

    def part_of(self, name: str) -> Part:
        """The graph that an input belongs to."""
        if name in self.prompt_inputs:
            return Part.PROMPT
        return Part.TIMESTEP if name in self.timestep_inputs else Part.STEP

    def input_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype of one input of a model of `dtype`; timesteps stay fp32, as schedulers give them."""
        return torch.float32 if name in self.fp32_inputs else dtype

    # Tensors.

    @abstractmethod
    def noise_tokens(self, noise: Tensor) -> Tensor:
        """The transformer's output -> (B, N, channels): the inverse of the model's own unpatchify."""

    def predicted_noise(self, noise: Tensor) -> Tensor:
        """The part of the output that the selection goes by, per token: (B, N, channels)."""
        return self.noise_tokens(noise)

    @abstractmethod
    def token_mask(self, keep_indices: Tensor, noise: Tensor) -> Tensor:
        """1 where the transformer's output `noise` is of one of the tokens (B, n), else 0.

        Returns:
            fp32, broadcastable with `noise`: one value for all channels.
        """

    def example_input(self, name: str, shape: list[int], generator: torch.Generator) -> Tensor:
        """Random values that an input may have, fp32."""
        return torch.randn(shape, generator=generator)

    @abstractmethod
    def text_length(self, model_inputs: Mapping[str, Tensor]) -> int:
        """T, the text rows that joint attention keeps in its caches; 0 for cross-attention models."""

    # What a pipeline passes.

    @abstractmethod
    def argument_names(self) -> tuple[str, ...]:
        """The tensors that a pipeline passes alike on every step of an image, by diffusers' names."""

    @abstractmethod
    def grid(self, latents: Tensor, arguments: Mapping[str, Tensor]) -> tuple[int, int]:
        """Image tokens (high, wide) of one call. May synchronise with a GPU: it is asked once per image.

        Raises:
            ShapeError: the latents do not fit the model.
        """

    @abstractmethod
    def conditioning(self, arguments: Mapping[str, Tensor], grid: tuple[int, int]) -> dict[str, Tensor]:
        """The inputs other than `hidden_states` and `timestep`, from what the pipeline passes; once per image."""

    def argument_text_length(self, arguments: Mapping[str, Tensor]) -> int:
        """T, the text rows that a pipeline passes.

        Raises:
            ShapeError: the text has other dimensions than (B, T, D).
        """
        shape = tuple(arguments["encoder_hidden_states"].shape)
        if len(shape) != 3:
            raise ShapeError(f"encoder_hidden_states has shape {shape}, expected (batch, text rows, width)")
        return shape[1]

    def flatten_arguments(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of one call with those that diffusers nests laid flat."""
        return dict(arguments)

    @property
    def num_residuals(self) -> int:
        """How many blocks take a ControlNet's residual."""
        return 0

    def with_residuals(self) -> Self:
        """The family of a transformer whose exported steps take a ControlNet's residuals.

        Raises:
            SettingsError: no block takes one.
        """
        if not self.num_residuals:
            raise SettingsError(f"--controlnet: {self.transformer_class} takes no ControlNet", "leave it out")
        family = type(self)(self.config)
        family.takes_residuals = True
        return family

    def residuals(self, arguments: Mapping[str, Any]) -> list[Tensor | None]:
        """What a ControlNet adds to the image's rows after each block that takes a residual.

        Args:
            arguments: of one call, by diffusers' names; `residual_arguments` are read. They differ on every step.

        Returns:
            For each such block a tensor (B, N, D), which several may share, or None; empty without any residual.

        Raises:
            SettingsError: an argument is no list of tensors.
        """
        return []

    def without_layers(self, conditioning: Mapping[str, Tensor], layers: tuple[int, ...]) -> dict[str, Tensor]:
        """`conditioning` for a call that skips some blocks (skip-layer guidance).

        Raises:
            SettingsError: the family has no such guidance.
        """
        raise SettingsError(f"skip_layers={list(layers)}: {self.transformer_class} has no skip-layer guidance")

    @abstractmethod
    def pipeline_text_length(self, directory: Path) -> int:
        """T as the family's pipeline passes it at its defaults, for a checkpoint in the diffusers layout."""

    def pipeline_text_lengths(self, directory: Path) -> range:
        """Every T that the family's pipeline makes of a checkpoint's tokenizers and its `max_sequence_length`."""
        return range(1, MOST_TEXT + 1)

    def tokenizer_length(self, directory: Path) -> int:
        """The most tokens that a tokenizer on disk makes.

        Raises:
            OSError, KeyError, ValueError: it is not there, or is none.
        """
        config = read_json(directory / "tokenizer_config.json")
        try:
            return int(config["model_max_length"])
        except OverflowError as error:
            raise ValueError(f"model_max_length: {error}") from error

    @abstractmethod
    def pipeline_arguments(self, pipeline: Any, text_length: int) -> dict[str, Any]:
        """What to pass to the family's pipeline so that it makes `text_length` text rows at the size asked for."""

    def num_references(self, arguments: Mapping[str, Tensor]) -> int:
        """Tokens of reference images that a pipeline appends to the image's own. May synchronise: see `grid`."""
        return 0

    def dims(
        self, grid: tuple[int, int], *, batch: int, text_length: int, num_kept: int, num_references: int = 0
    ) -> StepDims:
        """The dimensions of a step as numbers."""
        patch = self.patch_size
        return StepDims.of(
            batch=batch,
            latent_height=grid[0] * patch,
            latent_width=grid[1] * patch,
            patch_size=patch,
            text_length=text_length,
            num_kept=num_kept,
            num_references=num_references,
        )

    def check_latent_size(self, height: int, width: int) -> None:
        """Check that the model can take latents of this size.

        Raises:
            ShapeError: the patch size does not divide it, or the position table does not hold it.
        """
        patch, largest = self.patch_size, self.max_latent_size
        if height % patch or width % patch or not height or not width:
            raise ShapeError(f"latents of {height}x{width}: both sides must be multiples of the patch size {patch}")
        if largest is not None and max(height, width) > largest:
            raise ShapeError(
                f"latents of {height}x{width}: the model's position table holds {largest}x{largest} at most"
            )


class PatchFamily(Family):
    """A family whose latents are pictures, (B, C, H, W), that the model patchifies itself, as in DiT.

    Its transformer is a row of like blocks, then an output projection. Positions are in the tokens, so that a block
    computes whichever image tokens it is given.
    """

    @property
    def num_layers(self) -> int:
        """How many blocks there are."""
        return int(self.config["num_layers"])

    def blocks(self, transformer: Any) -> Sequence[nn.Module]:
        """The blocks, in the order in which they run; the first attention in each attends over the image tokens."""
        blocks: Sequence[nn.Module] = transformer.transformer_blocks
        return blocks

    def output_projection(self, transformer: Any) -> nn.Module:
        """The layer whose output is a row for each image token, (B, n, channels), before the model's unpatchify."""
        projection: nn.Module = transformer.proj_out
        return projection

    def with_image_rows(self, outputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
        """What a block returned, with its image rows (B, n, D) replaced by what `change` makes of them."""
        return change(outputs)

    def skips_layers(self, model_inputs: Mapping[str, Tensor]) -> bool:
        """Whether a call leaves out some blocks (skip-layer guidance). Synchronises with a GPU."""
        return False

    @property
    @override
    def patch_size(self) -> int:
        return int(self.config["patch_size"])

    @property
    @override
    def latent_channels(self) -> int:
        return int(self.config["in_channels"])

    @property
    @override
    def default_latent_size(self) -> int:
        return int(self.config["sample_size"])

    @override
    def noise_shape(self, dims: StepDims) -> Shape:
        return (dims.batch, self.config["out_channels"], dims.latent_height, dims.latent_width)

    @override
    def noise_tokens(self, noise: Tensor) -> Tensor:
        """Tokens row by row; in a token row, column, channel."""
        patch = self.config["patch_size"]
        batch, channels, height, width = noise.shape
        patches = noise.reshape(batch, channels, height // patch, patch, width // patch, patch)
        return patches.permute(0, 2, 4, 3, 5, 1).reshape(
            batch, (height // patch) * (width // patch), patch * patch * channels
        )

    @override
    def grid(self, latents: Tensor, arguments: Mapping[str, Tensor]) -> tuple[int, int]:
        if latents.dim() != 4:
            raise ShapeError(f"{LATENTS}: expected latents (B, C, H, W), got shape {tuple(latents.shape)}")
        height, width = latents.shape[-2:]
        self.check_latent_size(height, width)
        return height // self.config["patch_size"], width // self.config["patch_size"]

    @override
    def token_mask(self, keep_indices: Tensor, noise: Tensor) -> Tensor:
        patch, (batch, _, height, width) = self.config["patch_size"], noise.shape
        tokens = torch.zeros(batch, (height // patch) * (width // patch), device=noise.device)
        grid = tokens.scatter(1, keep_indices.long(), 1.0).view(batch, 1, height // patch, width // patch)
        return grid.repeat_interleave(patch, dim=2).repeat_interleave(patch, dim=3)
