"""Every family, tiny, and one of 1024 tokens: the drop-in against the untouched pipeline, and both engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

Make = Callable[..., Any]
PROMPTS = [
    "a large red circle left of a small blue star on a plain black background",
    "a small green square",
    "a large blue star right of a small red square",
]
NAMES = ["pixart-tiny", "flux-tiny", "flux-middle", "sd35-tiny"]  # the miniatures are the other families' middle
STEPS = 10
KINDS = "FFFFPPPPPP"
SETTINGS = {"full_steps": 4}

# Of no size that a graph was traced at (12 x 10 latents); 4 pixels are a latent.
MIDDLE = {"size": (256, 256)}  # 1024 tokens; of six steps only
WIDE = {"size": (40, 72)}  # 5 x 9 tokens: an odd number of rows
THREE = {"size": (64, 48), "prompt": PROMPTS, "seed": [0, 1, 2]}
UNGUIDED = {"guidance_scale": 1.0}


def cases(names: list[str]) -> list[Any]:
    """Batched guidance is on by default; FLUX has it as an input of the model or not at all."""
    chosen = []
    for name in names:
        shapes = {"1024": MIDDLE} if name.endswith("middle") else {"5x9": WIDE, "three": THREE}
        if name == "flux-middle":
            shapes |= {"three": THREE}
        elif not name.startswith("flux"):
            shapes |= {"three-unguided": THREE | UNGUIDED}
        chosen += [pytest.param(name, arguments, id=f"{name}-{shape}") for shape, arguments in shapes.items()]
    return chosen


def steps_of(arguments: dict[str, Any]) -> int:
    return 6 if arguments == MIDDLE else STEPS


def relative(tensor: Tensor, scale: Tensor) -> Tensor:
    """In units of the latents' spread: 1 in flow models, 200 in a random PixArt, which predicts no noise."""
    return tensor / scale.std().clamp(min=1.0)


@pytest.fixture(scope="module")
def untouched(models: Make, sample: Make) -> Make:
    """An image of the untouched pipeline, made once. Read only."""
    made: dict[str, Any] = {}

    def image(name: str, arguments: dict[str, Any]) -> Any:
        key = f"{name} {arguments}"
        if key not in made:
            made[key] = sample(models(name).pipeline(), steps_of(arguments), **arguments)
        return made[key]

    return image


@pytest.mark.long
@pytest.mark.parametrize(("name", "arguments"), cases(NAMES))
def test_keeping_every_token_is_the_untouched_pipeline(
    models: Make, name: str, arguments: dict[str, Any], sample: Make, untouched: Make
) -> None:
    model, steps = models(name), steps_of(arguments)
    expected = untouched(name, arguments)
    in_torch = sample(model.drop_in("torch", keep_ratio=1.0, **SETTINGS), steps, **arguments)
    in_onnx = sample(model.drop_in("onnxruntime", keep_ratio=1.0, **SETTINGS), steps, **arguments)
    assert in_torch.kinds == in_onnx.kinds == KINDS[:steps]
    assert len(expected.latents) == len(in_torch.latents) == len(in_onnx.latents) == steps
    for step, theirs in enumerate(expected.latents):
        assert torch.equal(in_torch.latents[step], theirs), f"step {step}"
        mine = relative(in_onnx.latents[step], theirs)
        torch.testing.assert_close(mine, relative(theirs, theirs), rtol=0, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(("name", "arguments"), cases(NAMES))
def test_the_engines_agree_on_tokens_and_latents(
    models: Make, name: str, arguments: dict[str, Any], sample: Make, untouched: Make
) -> None:
    model, steps = models(name), steps_of(arguments)
    settings = {"keep_ratio": 0.3, **SETTINGS}
    in_torch, in_onnx = (sample(model.drop_in(engine, **settings), steps, **arguments) for engine in model.engines)
    assert in_torch.kinds == in_onnx.kinds == KINDS[:steps]
    num_tokens = in_torch.records[0].num_tokens
    assert [record.num_kept for record in in_torch.records] == [num_tokens] * 4 + [int(0.3 * num_tokens)] * (steps - 4)
    for mine, theirs in zip(in_onnx.records, in_torch.records, strict=True):
        assert torch.equal(mine.keep_indices, theirs.keep_indices), f"step {mine.step} computes other tokens"
    torch.testing.assert_close(
        relative(in_onnx.final, in_torch.final), relative(in_torch.final, in_torch.final), rtol=0, atol=1e-3
    )
    # Or all of this would hold of a drop-in that never prunes.
    full = untouched(name, arguments)
    assert (relative(in_torch.final, full.final) - relative(full.final, full.final)).abs().max() > 5e-3


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
@pytest.mark.parametrize("name", ["pixart-tiny", "flux-tiny", "sd35-tiny"])
def test_every_prompt_is_generated_as_if_alone(models: Make, name: str, engine: str, sample: Make) -> None:
    """Each prompt's pooled vector, mask and selection go to its own rows."""
    pipe = models(name).drop_in(engine, keep_ratio=0.4, num_clusters=6, **SETTINGS)
    together = sample(pipe, STEPS, **THREE)
    assert together.kinds == KINDS
    for index, prompt in enumerate(PROMPTS):
        alone = sample(pipe, STEPS, (64, 48), prompt=[prompt], seed=[index])
        mine, theirs = together.final[index : index + 1], alone.final
        torch.testing.assert_close(relative(mine, theirs), relative(theirs, theirs), rtol=0, atol=1e-3)
        for both, one in zip(together.records, alone.records, strict=True):
            assert torch.equal(both.keep_indices[index - 3], one.keep_indices[-1])


@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
@pytest.mark.parametrize("name", ["pixart-tiny", "flux-tiny", "sd35-tiny"])
def test_a_step_leaves_the_last_noise_as_it_is(models: Make, name: str, engine: str, sample: Make) -> None:
    """The selection compares with that of an earlier step, which in FLUX is the very tensor that a step returned."""
    pipe = models(name).drop_in(engine, keep_ratio=0.4, num_clusters=6, **SETTINGS)
    returned: list[tuple[Tensor, Tensor]] = []
    pipe.transformer.register_forward_hook(lambda module, args, result: returned.append((result[0], result[0].clone())))
    assert sample(pipe, STEPS, (64, 48)).kinds == KINDS
    assert len(returned) == STEPS
    for noise, as_it_was in returned:
        assert torch.equal(noise, as_it_was)


@pytest.mark.parametrize("name", ["pixart-tiny", "flux-tiny", "sd35-tiny"])
def test_an_image_after_another(models: Make, name: str, sample: Make) -> None:
    pipe = models(name).drop_in("onnxruntime", keep_ratio=0.4, num_clusters=6, **SETTINGS)
    first = sample(pipe, STEPS, (64, 48), seed=1)
    sample(pipe, 6, (48, 64), prompt=PROMPTS[1:], seed=[3, 4])
    again = sample(pipe, STEPS, (64, 48), seed=1)
    assert again.kinds == first.kinds == KINDS
    assert again.same_tokens_as(first)
    torch.testing.assert_close(
        relative(again.final, first.final), relative(first.final, first.final), rtol=0, atol=1e-5
    )
