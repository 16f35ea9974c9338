"""A ControlNet's residuals: diffusers' own spread over the blocks, and the kept tokens' rows of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cat_pruning.engines.torch_engine import TorchStepEngine
from cat_pruning.errors import ShapeError
from cat_pruning.families import family_of
from cat_pruning.families.interception import StepModule
from cat_pruning.runtime.image import every_token

GRID = (4, 5)
NUM_TOKENS = 20


def residuals(transformer: Any, batch: int, count: int, seed: int = 3) -> list[Tensor]:
    width = transformer.config["num_attention_heads"] * transformer.config["attention_head_dim"]
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, NUM_TOKENS, width, generator=generator) for _ in range(count)]


def counts(*names_and_counts: tuple[str, int], **more: Any) -> Any:
    return dict(names_and_counts), more


DOUBLE, SINGLE = "controlnet_block_samples", "controlnet_single_block_samples"
CASES = [
    *[("sd3", counts(("block_controlnet_hidden_states", count))) for count in (1, 2, 3, 5, 7)],
    ("sd3.5", counts(("block_controlnet_hidden_states", 2))),
    ("flux-dev", counts((DOUBLE, 2), (SINGLE, 2))),
    ("flux-dev", counts((DOUBLE, 2), (SINGLE, 2), controlnet_blocks_repeat=True)),
    ("flux-dev", counts((DOUBLE, 3))),
    ("flux-dev", counts((SINGLE, 4))),
]


@pytest.mark.parametrize(("kind", "given"), CASES)
def test_a_full_step_is_diffusers_own_to_the_bit(make_tiny: Any, pipeline_call: Any, kind: str, given: Any) -> None:
    numbers, more = given
    deep = {"num_layers": 5} | ({"num_single_layers": 4} if kind.startswith("flux") else {})
    transformer = make_tiny(kind, **deep)
    call = pipeline_call(transformer, batch=2, grid=GRID)
    lists = {name: residuals(transformer, 2, count) for name, count in numbers.items()}
    session = begun(TorchStepEngine(transformer), call)
    spread = call.family.residuals({**lists, **more})
    latents, timestep = call.arguments["hidden_states"], float(call.arguments["timestep"][0])
    actual = session.step(latents, timestep, every_token(latents, NUM_TOKENS), spread)
    assert torch.equal(actual, call.noise(transformer, **lists, **more))
    assert not torch.allclose(actual, call.noise(transformer), atol=1e-3)
    plain = session.step(latents, timestep, every_token(latents, NUM_TOKENS))
    assert torch.equal(plain, call.noise(transformer))


def begun(engine: TorchStepEngine, call: Any) -> Any:
    inputs = call.inputs()
    session = engine.session()
    session.begin(call.family.dims(GRID, batch=2, text_length=7, num_kept=0), inputs)
    return session


@pytest.mark.parametrize("kind", ["sd3.5", "flux-dev"])
def test_a_pruned_step_reads_the_kept_tokens_rows_alone(make_tiny: Any, step_inputs: Any, kind: str) -> None:
    transformer = make_tiny(kind, num_layers=3)
    step = StepModule(transformer, family_of(transformer))
    inputs = step_inputs(step, batch=2, grid=GRID, kept=6)
    keep_indices, noise = inputs.pop("keep_indices"), inputs.pop("noise")
    caches = [inputs.pop(name) for name in list(inputs) if "cache" in name]
    given = dict(zip(("residual_0", "residual_1"), residuals(transformer, 2, 2), strict=True))

    def computed(residual: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return step(keep_indices, noise, caches, {**inputs, **residual})[0]  # type: ignore[no-any-return]

    expected = computed(given)
    kept = torch.zeros(2, NUM_TOKENS, 1).scatter(1, keep_indices.long().unsqueeze(-1), 1.0).bool()
    others = {name: torch.where(kept, tensor, 1e4) for name, tensor in given.items()}
    assert torch.equal(computed(others), expected)
    changed = {name: torch.where(kept, -tensor, tensor) for name, tensor in given.items()}
    assert not torch.allclose(computed(changed), expected, atol=1e-3)


@pytest.mark.parametrize("shape", [(2, NUM_TOKENS - 1, 32), (2, NUM_TOKENS, 31), (3, NUM_TOKENS, 32), (NUM_TOKENS, 32)])
def test_a_residual_of_another_shape(make_tiny: Any, pipeline_call: Any, shape: tuple[int, ...]) -> None:
    transformer = make_tiny("sd3")
    call = pipeline_call(transformer, batch=2, grid=GRID)
    session, latents = begun(TorchStepEngine(transformer), call), call.arguments["hidden_states"]
    with pytest.raises(ShapeError, match=r"a ControlNet's residual has shape .*, expected \(2, 20, 32\)"):
        session.step(latents, 700.0, every_token(latents, NUM_TOKENS), [torch.zeros(shape)])
