"""sd3-mini's transformer on a device, and images of it without a pipeline: what a GPU's tests share.

Every test that is about a device gets it as `device`: the CPU, which proves the test, and CUDA where there is one. On
the CPU steps are captured by a double (`graph_double`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from graph_double import recorder
from torch import Tensor

from cat_pruning.checkpoints.library_logs import quiet_diffusers
from cat_pruning.engines.cuda_graphs import CudaGraphs
from cat_pruning.engines.step_engine import StepEngine
from cat_pruning.engines.torch_engine import TorchStepEngine
from cat_pruning.models import miniatures
from cat_pruning.names import Target
from cat_pruning.runtime.record import StepRecord
from cat_pruning.runtime.transformer import CatTransformer
from cat_pruning.settings import PruneSettings

STEPS = 12
TEXT_LENGTH = 48
CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch has no CUDA device here")],
)


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device in turn."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """fp32 is fp32: by default cuDNN rounds a convolution's inputs, and the patch embedding is one."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@dataclass
class Sampled:
    """One image: its latents, and the record of every step."""

    latents: Tensor
    records: list[StepRecord] = field(default_factory=list)


@pytest.fixture(scope="session")
def miniature() -> Callable[..., Any]:
    """sd3-mini's transformer on a device, loaded once. A test that changes it puts it back.

    Where nothing but the CPU proves the tests, it has the first and the last of its six layers.
    """

    def load(device: str, whole: bool = torch.cuda.is_available()) -> Any:
        with quiet_diffusers():
            folder = miniatures()["sd3-mini"] / "transformer"
            module = SD3Transformer2DModel.from_pretrained(folder, dtype=torch.float32)
        if not whole:
            del module.transformer_blocks[1:-1]
            module.register_to_config(num_layers=2)
        return module.to(device)

    return functools.cache(load)


@pytest.fixture
def make(miniature: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., CatTransformer]:
    """Makes a transformer on a device, whose steps are captured or not; keywords are those of `PruneSettings`."""

    def transformer(
        device: torch.device,
        captures: bool = True,
        compiled: bool = False,
        whole: bool = torch.cuda.is_available(),
        **settings: Any,
    ) -> CatTransformer:
        engine = TorchStepEngine(miniature(device.type, whole), cuda_graphs=captures, compiled=compiled)
        if device.type == "cpu" and captures:
            engine.__class__ = _CapturesOnTheCpu
            graphs = functools.partial(CudaGraphs, recorder())
            monkeypatch.setattr("cat_pruning.engines.step_engine.CudaGraphs", graphs)
        return CatTransformer(engine, PruneSettings(**settings))

    return transformer


class _CapturesOnTheCpu(TorchStepEngine):
    cuda_graphs = True  # type: ignore[assignment]


@pytest.fixture(scope="session")
def sample() -> Callable[..., Sampled]:
    """Runs a whole loop with guidance over random prompts, the same on every device: `sample(transformer, ...)`."""

    def run(
        transformer: CatTransformer,
        seed: int = 0,
        size: tuple[int, int] = (16, 16),
        steps: int = STEPS,
        on_step: Callable[[int], None] = lambda step: None,
        arguments_of: Callable[[int], dict[str, Any]] = lambda step: {},
    ) -> Sampled:
        device, config = transformer.device, transformer.config
        generator = torch.Generator().manual_seed(seed)
        latents, text, pooled = (
            torch.randn(shape, generator=generator).to(device, transformer.dtype)
            for shape in (
                (1, config.in_channels, *size),
                (2, TEXT_LENGTH, config.joint_attention_dim),
                (2, config.pooled_projection_dim),
            )
        )
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(steps, device=device)
        records = []
        for index, timestep in enumerate(scheduler.timesteps):
            on_step(index)
            noise = transformer(
                torch.cat([latents] * 2),
                timestep=timestep.expand(2),
                encoder_hidden_states=text,
                pooled_projections=pooled,
                return_dict=False,
                **arguments_of(index),
            )[0]
            negative, positive = noise.chunk(2)
            latents = scheduler.step(negative + 4 * (positive - negative), timestep, latents, return_dict=False)[0]
            records.append(transformer.last_step)
        return Sampled(latents.float(), records)

    return run


@pytest.fixture(scope="session")
def assert_same_image() -> Callable[..., None]:
    """Asserts that two runs are one image: to the bit, or up to another device's rounding, in units of the spread.

    Rounding may swap a token of the last score that is kept, so one token in a hundred may differ.
    """

    def check(actual: Sampled, expected: Sampled, exact: bool = False, rounding: float = 1e-3) -> None:
        for mine, other in zip(actual.records, expected.records, strict=True):
            kept, wanted = mine.keep_indices.cpu(), other.keep_indices.cpu()
            assert kept.shape == wanted.shape
            differ = sum(
                len(set(row.tolist()) - set(wanted_row.tolist())) for row, wanted_row in zip(kept, wanted, strict=True)
            )
            assert differ <= (0 if exact else kept.numel() * 10 * rounding), f"step {mine.step}: {differ} tokens differ"
        latents, wanted = actual.latents.cpu(), expected.latents.cpu()
        if exact:
            assert torch.equal(latents, wanted)
        else:
            # Away from a swapped token all is rounding; at one it is a step's change of the picture.
            assert (latents - wanted).abs().median() < rounding * wanted.std()
            assert (latents - wanted).abs().max() < 100 * rounding * wanted.std()

    return check


@pytest.fixture(scope="session")
def onnx_bundle(stored_bundle: Callable[..., Path]) -> Path:
    """sd3-mini's graphs, without plans. Read only."""
    return stored_bundle("sd3-mini", text_length=TEXT_LENGTH, targets=(Target.ONNX,))


@pytest.fixture
def assert_agrees(
    make: Callable[..., CatTransformer], sample: Callable[..., Sampled], assert_same_image: Callable[..., None]
) -> Callable[..., None]:
    """Asserts that an engine computes two images as the torch engine on the CPU does; on the CPU itself one.

    On a GPU these libraries round what they multiply to ten bits (TF32) as long as nobody forbids it.
    """

    def check(engine: StepEngine, size: tuple[int, int] = (16, 16)) -> None:
        rounding = 1e-2 if engine.device.type == "cuda" else 1e-3
        transformer, reference = CatTransformer(engine), make(torch.device("cpu"), captures=False, whole=True)
        for seed in range(2 if engine.device.type == "cuda" else 1):
            assert_same_image(sample(transformer, seed, size), sample(reference, seed, size), rounding=rounding)

    return check
