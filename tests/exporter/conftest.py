"""Inputs of a step, calls of a transformer as its pipeline makes them, and a checkpoint on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor

from cat_pruning.exporter import cli
from cat_pruning.exporter.step_graph import example_inputs
from cat_pruning.families import family_of
from cat_pruning.families.family import Family
from cat_pruning.families.interception import StepModule

MakeInputs = Callable[..., dict[str, Tensor]]


@pytest.fixture(scope="session")
def step_inputs() -> MakeInputs:
    """Inputs of one step by name: `step_inputs(step, batch=1, grid=(4, 5), kept=5)`; all tokens kept without `kept`.

    With all tokens kept the indices are in order, as a full step's are.
    """

    def make(
        step: StepModule, *, batch: int, grid: tuple[int, int], kept: int | None = None, text: int = 7, seed: int = 1
    ) -> dict[str, Tensor]:
        num_tokens = grid[0] * grid[1]
        num_kept = num_tokens if kept is None else kept
        dims = step.family.dims(grid, batch=batch, text_length=text, num_kept=num_kept)
        inputs = example_inputs(step, dims, seed=seed)
        if kept is None:
            inputs["keep_indices"] = torch.arange(num_tokens, dtype=torch.int32).expand(batch, -1).contiguous()
        return inputs

    return make


@dataclass(frozen=True)
class PipelineCall:
    """One call of a transformer as its pipeline makes it."""

    family: Family
    arguments: dict[str, Any]

    def noise(self, transformer: Any, **more: Any) -> Tensor:
        """What the module itself computes."""
        with torch.inference_mode():
            noise: Tensor = transformer(**self.arguments, **more, return_dict=False)[0]
            return noise

    def inputs(self) -> dict[str, Tensor]:
        """The same call as the inputs of our graphs."""
        flat = self.family.flatten_arguments(self.arguments)
        latents = flat["hidden_states"]
        own = {name: flat[name] for name in self.family.argument_names()}
        grid = self.family.grid(latents, own)
        conditioning = self.family.conditioning(own, grid)
        inputs = {"hidden_states": latents, "timestep": flat["timestep"], **conditioning}
        return {name: tensor.to(self.family.input_dtype(name, latents.dtype)) for name, tensor in inputs.items()}


@pytest.fixture(scope="session")
def pipeline_call() -> Callable[..., PipelineCall]:
    """`pipeline_call(transformer, batch=2, grid=(4, 5))`: with random tensors, in the pipeline's own types."""

    def make(transformer: Any, *, batch: int, grid: tuple[int, int], text: int = 7, seed: int = 1) -> PipelineCall:
        family, config = family_of(transformer), transformer.config
        generator = torch.Generator().manual_seed(seed)
        normal = {"generator": generator, "dtype": next(transformer.parameters()).dtype}
        if family.name == "sd3":
            arguments = {
                "hidden_states": torch.randn(batch, config["in_channels"], 2 * grid[0], 2 * grid[1], **normal),
                "timestep": torch.tensor(713.25).expand(batch),
                "encoder_hidden_states": torch.randn(batch, text, config["joint_attention_dim"], **normal),
                "pooled_projections": torch.randn(batch, config["pooled_projection_dim"], **normal),
            }
        elif family.name == "pixart":
            sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
            if transformer.use_additional_conditions:
                height, width = 16.0 * grid[0], 16.0 * grid[1]
                resolution, ratio = torch.tensor([height, width]), torch.tensor([height / width])
                sizes = {"resolution": resolution.repeat(batch, 1), "aspect_ratio": ratio.repeat(batch, 1)}
            lengths = torch.arange(text, text - batch, -1).clamp_min(1)  # a prompt's tokens, then padding
            arguments = {
                "hidden_states": torch.randn(batch, config["in_channels"], 2 * grid[0], 2 * grid[1], **normal),
                "timestep": torch.tensor(713).expand(batch),
                "encoder_hidden_states": torch.randn(batch, text, config["caption_channels"], **normal),
                "encoder_attention_mask": (torch.arange(text) < lengths[:, None]).long(),
                "added_cond_kwargs": sizes,
            }
        else:
            arguments = {
                "hidden_states": torch.randn(batch, grid[0] * grid[1], config["in_channels"], **normal),
                "timestep": torch.tensor(713.25).expand(batch) / 1000,
                "encoder_hidden_states": torch.randn(batch, text, config["joint_attention_dim"], **normal),
                "pooled_projections": torch.randn(batch, config["pooled_projection_dim"], **normal),
                "guidance": torch.full([1], 3.5).expand(batch) if config["guidance_embeds"] else None,
                "img_ids": FluxPipeline._prepare_latent_image_ids(batch, *grid, "cpu", torch.float32),
                "txt_ids": torch.zeros(text, 3),
            }
        return PipelineCall(family, arguments)

    return make


_PIPELINES = {
    "sd3": "StableDiffusion3Pipeline",
    "sd3.5": "StableDiffusion3Pipeline",
    "pixart": "PixArtSigmaPipeline",
    "flux": "FluxPipeline",
}


@pytest.fixture(scope="session")
def write_checkpoint(make_tiny: Any) -> Callable[..., Path]:
    """Writes a pipeline of a tiny transformer in the diffusers layout, as far as an export reads it."""

    def write(directory: Path, kind: str = "sd3", **changes: Any) -> Path:
        transformer = make_tiny(kind, **changes)
        transformer.save_pretrained(directory / "transformer")
        for name, content in {
            "model_index.json": {
                "_class_name": _PIPELINES[kind.partition("-")[0]],
                "transformer": ["diffusers", type(transformer).__name__],
                "vae": ["diffusers", "AutoencoderKL"],
                "text_encoder_3": [None, None],
            },
            "vae/config.json": {"block_out_channels": [8, 8, 8]},
            "tokenizer/tokenizer_config.json": {"model_max_length": 13},
            "tokenizer_2/tokenizer_config.json": {"model_max_length": 21},
        }.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(json.dumps(content))
        return directory

    return write


@pytest.fixture
def tiny_checkpoint(write_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A local pipeline of the tiny SD3: 4 pixels per latent, 64 x 64 images of 64 tokens; the test's own."""
    return write_checkpoint(tmp_path / "tiny-pipeline")


@pytest.fixture
def cat_export(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, list[str]]]:
    """Runs the tool in this process; its exit code, standard output and the lines of standard error but for '✓ …'."""

    def run(*arguments: object) -> tuple[int, str, list[str]]:
        capsys.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code  # type: ignore[assignment]
        captured = capsys.readouterr()
        return code, captured.out, [line for line in captured.err.splitlines() if line and not line.startswith("✓")]

    return run
