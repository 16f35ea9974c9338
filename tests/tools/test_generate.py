"""Images that are no picture, and pipelines that make none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cat_pruning.engines.step_engine import StepEngine, StepSession
from cat_pruning.errors import EngineError
from cat_pruning.tools.generate import GenerateConfig, generate

CONFIG = GenerateConfig(
    prompts=("a large blue star",), height=64, width=64, steps=2, guidance_scale=1.0,
    text_arguments={"max_sequence_length": 24},
)  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "says"),
    [(torch.float32, "VAE's weights or the latents are damaged"), (torch.float16, "overflows in fp16; .*--dtype bf16")],
)
def test_an_image_that_is_not_finite_is_told(
    engines: dict[str, StepEngine], drop_in: Callable[..., Any], dtype: torch.dtype, says: str
) -> None:
    """NaN as 8-bit pixels is black."""
    pipe = drop_in(engines["torch"])
    last = pipe.vae.decoder.conv_out
    hook = last.register_forward_hook(lambda module, arguments, output: (output / 0).to(dtype))
    try:
        with pytest.raises(EngineError, match=f"decoded image has values that are not finite.*{says}"):
            generate(pipe, pipe.transformer.settings, CONFIG)
    finally:
        hook.remove()
    assert not pipe.vae.decoder._forward_hooks
    assert len(generate(pipe, pipe.transformer.settings, CONFIG).images) == 1


def test_what_a_pipeline_stumbles_over_is_told_as_its_failure(
    engines: dict[str, StepEngine], drop_in: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What our own code stumbles over is not: nobody foresaw it."""
    pipe = drop_in(engines["torch"])
    with pytest.raises(EngineError, match=r"StableDiffusion3Pipeline failed \(ValueError: .*max_sequence_length"):
        generate(pipe, pipe.transformer.settings, dataclasses.replace(CONFIG, text_arguments={
            "max_sequence_length": 10**9}))  # fmt: skip
    monkeypatch.setattr(StepSession, "step", lambda *arguments, **named: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(pipe, pipe.transformer.settings, CONFIG)
    monkeypatch.undo()
