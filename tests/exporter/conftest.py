"""A tiny transformer intercepted and exported, inputs for it, and a checkpoint of it on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from cat_pruning.exporter import cli
from cat_pruning.exporter.families import FAMILIES
from cat_pruning.exporter.interception import StepModule
from cat_pruning.exporter.step_graph import example_inputs, export_step_graph
from cat_pruning.step_io import StepDims

MakeTransformer = Callable[..., SD3Transformer2DModel]
MakeInputs = Callable[..., dict[str, Tensor]]


@pytest.fixture(scope="session")
def step_inputs() -> MakeInputs:
    """Inputs of one step by name: `step_inputs(step, batch=1, size=(8, 10), kept=5)`; all tokens kept without `kept`.

    With all tokens kept the indices are in order, as a full step's are.
    """

    def make(
        step: StepModule, *, batch: int, size: tuple[int, int], kept: int | None = None, text: int = 7, seed: int = 1
    ) -> dict[str, Tensor]:
        patch = step.transformer.config["patch_size"]
        num_tokens = (size[0] // patch) * (size[1] // patch)
        dims = StepDims.of(
            batch=batch,
            latent_height=size[0],
            latent_width=size[1],
            patch_size=patch,
            text_length=text,
            num_kept=num_tokens if kept is None else kept,
        )
        inputs = example_inputs(step, dims, seed=seed)
        if kept is None:
            inputs["keep_indices"] = torch.arange(num_tokens, dtype=torch.int32).expand(batch, -1).contiguous()
        return inputs

    return make


@pytest.fixture(scope="session")
def tiny_step(make_tiny_sd3: MakeTransformer) -> StepModule:
    """The tiny transformer intercepted. Read only."""
    return StepModule(make_tiny_sd3(), FAMILIES[0])


@pytest.fixture(scope="session")
def tiny_onnx(tiny_step: StepModule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_step` as step.onnx, fp32. Read only."""
    path = tmp_path_factory.mktemp("tiny") / "step.onnx"
    export_step_graph(tiny_step, path)
    return path


@pytest.fixture(scope="session")
def write_checkpoint(make_tiny_sd3: MakeTransformer) -> Callable[[Path], Path]:
    """Writes a pipeline of the tiny transformer in the diffusers layout, as far as an export reads it."""

    def write(directory: Path, **changes: Any) -> Path:
        make_tiny_sd3(**changes).save_pretrained(directory / "transformer")
        for name, content in {
            "model_index.json": {
                "_class_name": "StableDiffusion3Pipeline",
                "transformer": ["diffusers", "SD3Transformer2DModel"],
                "vae": ["diffusers", "AutoencoderKL"],
                "text_encoder_3": [None, None],
            },
            "vae/config.json": {"block_out_channels": [8, 8, 8]},
            "tokenizer/tokenizer_config.json": {"model_max_length": 13},
        }.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(json.dumps(content))
        return directory

    return write


@pytest.fixture
def tiny_checkpoint(write_checkpoint: Callable[[Path], Path], tmp_path: Path) -> Path:
    """A local pipeline of the tiny transformer: 4 pixels per latent, 64 x 64 images of 64 tokens; the test's own."""
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
