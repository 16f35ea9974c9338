from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cat_pruning.engines.finite_check import FiniteCheck
from cat_pruning.engines.torch_engine import TorchStepEngine
from cat_pruning.errors import EngineError
from cat_pruning.families.sd3 import LAYER_GATES

OVERFLOW = r"overflows in fp16; export it with --dtype bf16"
DAMAGE = r"not finite: the latents, the prompt's embeddings, the weights or a scale of an adapter are not; look"
TOLD = {torch.float16: OVERFLOW, torch.bfloat16: DAMAGE, torch.float32: DAMAGE}  # the last two overflow at 1e38 only


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", TOLD)
def test_on_the_host_it_is_told_at_once(dtype: torch.dtype, value: float) -> None:
    output = torch.zeros(2, 3, dtype=dtype)
    FiniteCheck().watch(output)
    output[1, 2] = value
    with pytest.raises(EngineError, match=TOLD[dtype]):
        FiniteCheck().watch(output)


def test_a_device_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's event that is not there yet is asked again on the next step."""
    answers = [False, False, True]
    check = FiniteCheck()
    check._flag._flag, check._flag._event = torch.tensor(False), SimpleNamespace(query=lambda: answers.pop(0))
    check._dtype = torch.float16
    check.poll()
    check.poll()
    with pytest.raises(EngineError, match=OVERFLOW):
        check.poll()
    check.poll()  # it is told once
    check._flag._event = SimpleNamespace(query=lambda: True)
    check.forget()
    check.poll()


@pytest.mark.parametrize(("dtype", "overflows"), [(torch.float16, False), (torch.float16, True), (torch.float32, True)])
def test_a_session_looks_at_the_first_step_of_every_image(
    make_tiny_sd3: Any, dtype: torch.dtype, overflows: bool
) -> None:
    transformer = make_tiny_sd3().to(dtype)
    if overflows:
        transformer.proj_out.bias.data[3] = float("inf")
    engine = TorchStepEngine(transformer)
    session = engine.session()
    dims = engine.family.dims((4, 4), batch=1, text_length=3, num_kept=16)
    shapes = engine.family.input_shapes(dims)
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn([int(dim) for dim in shape], generator=generator) for name, shape in shapes.items()}
    latents = inputs.pop("hidden_states").to(dtype)
    del inputs["timestep"]
    inputs[LAYER_GATES] = torch.ones(len(inputs[LAYER_GATES]))
    tokens = torch.arange(16, dtype=torch.int32).unsqueeze(0)
    for _ in range(2):
        session.begin(dims, inputs)
        if overflows:
            with pytest.raises(EngineError, match=TOLD[dtype]):
                session.step(latents, 500.0, tokens)
        else:
            assert session.step(latents, 500.0, tokens).isfinite().all()
            assert session.step(latents, 400.0, tokens).isfinite().all()
