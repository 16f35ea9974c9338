"""What a transformer's own pipeline gives it while it makes images: how large its layers' inputs get, and a call."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cat_pruning.bundle.schema import ProfileSpec
from cat_pruning.checkpoints.library_logs import first_line, quiet_diffusers
from cat_pruning.checkpoints.parts import load_parts
from cat_pruning.dtype import DType
from cat_pruning.engines.step_engine import enough_memory
from cat_pruning.errors import CatError, EngineError
from cat_pruning.exporter.progress import Advance
from cat_pruning.families.family import Family
from cat_pruning.step_io import LATENTS, SYMBOLIC, TIMESTEP, StepDims, is_residual


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was seen, on the CPU.

    Attributes:
        ranges: by the name of every linear layer that was called, the largest magnitude of each channel of its input,
            (D,) fp32.
        dims: of the last call as a full step, its rows repeated to those of the profile.
        inputs: of that step, by their names; a ControlNet's residuals are zeros.
    """

    ranges: dict[str, Tensor]
    dims: StepDims
    inputs: dict[str, Tensor]


@torch.no_grad()
def calibrate(
    transformer: Any,
    directory: Path,
    family: Family,
    dtype: DType,
    prompts: Sequence[str],
    profile: ProfileSpec,
    advance: Advance,
) -> Calibration:
    """Make an image of every prompt, as the pipeline does by its defaults, every step full, and watch the transformer.

    Without guidance where the profile has none. On a GPU where there is one: the transformer is moved there and back.
    Synchronises with it.

    Args:
        transformer: the module.
        directory: the pipeline that it is of, in the diffusers layout.
        family: of the transformer.
        dtype: of the pipeline's other parts.
        prompts: one image each.
        profile: the images' size, the text's length, and whether there is guidance.
        advance: called after every image.

    Raises:
        CheckpointError: the pipeline's other parts cannot be loaded.
        EngineError: it cannot make the images, or what a layer is given is not finite.
    """
    loaded = load_parts(directory, family.transformer_class, dtype.torch)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with quiet_diffusers():
        pipe = type(loaded)(**{**loaded.components, "transformer": transformer})
    pipe.set_progress_bar_config(disable=True)
    arguments = family.pipeline_arguments(pipe, profile.text_length)
    if family.batched_guidance and profile.batch == profile.prompts:
        arguments["guidance_scale"] = 1.0
    try:
        with (
            enough_memory(device, "images to calibrate by", "free memory on it, or hide it: CUDA_VISIBLE_DEVICES="),
            _evaluated(transformer),
            watched(transformer) as largest,
            _called(transformer) as calls,
        ):
            pipe.to(device)
            for index, prompt in enumerate(prompts):
                generator = torch.Generator().manual_seed(index)
                pipe(
                    prompt,
                    height=profile.height,
                    width=profile.width,
                    generator=generator,
                    output_type="latent",
                    **arguments,
                )
                advance(index + 1, len(prompts))
    except CatError:
        raise
    except Exception as error:  # the pipeline's code is not ours, and raises what it likes
        raise EngineError(
            f"calibration: {type(pipe).__name__} failed ({type(error).__name__}: {first_line(error)})",
            "the checkpoint must make images in diffusers, with every prompt of --calibrate",
        ) from error
    finally:
        transformer.to("cpu")
    ranges = {name: values.cpu() for name, values in largest.items()}
    if name := next((name for name, values in ranges.items() if not values.isfinite().all()), None):
        raise EngineError(
            f"calibration: {name} is given values that are not finite in {dtype}", "give --dtype bf16 or fp32"
        )
    return Calibration(ranges, *full_step(family, calls[-1], profile.batch))


@contextmanager
def _evaluated(transformer: nn.Module) -> Iterator[None]:
    """Meanwhile, no part of a module is in training, where adapters drop some of what they are given."""
    training = [module for module in transformer.modules() if module.training]
    transformer.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def watched(transformer: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Meanwhile, what the inputs of a module's linear layers reach, by name and channel, in fp32.

    Layers with the same weights, of which a graph has one name, have what all of them are given.
    """
    largest: dict[str, Tensor] = {}
    named = [each for each in transformer.named_modules(remove_duplicate=False) if isinstance(each[1], nn.Linear)]
    names: dict[int, list[str]] = defaultdict(list)
    for name, layer in named:
        names[id(layer.weight)].append(name)

    def watch(names: list[str]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            reached = inputs[0].abs().flatten(0, -2).amax(0).float()
            for name in names:
                largest[name] = torch.maximum(largest[name], reached) if name in largest else reached

        return look

    hooks = [layer.register_forward_pre_hook(watch(names[id(layer.weight)])) for layer in {each for _, each in named}]
    try:
        yield largest
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _called(transformer: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Meanwhile, the arguments by name of the transformer's last call, alone in a list."""
    calls: list[dict[str, Any]] = []
    signature = inspect.signature(transformer.forward)

    def note(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls[:] = [signature.bind(*arguments, **named).arguments]

    hook = transformer.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def full_step(family: Family, call: dict[str, Any], batch: int) -> tuple[StepDims, dict[str, Tensor]]:
    """The full step that a call of the transformer amounts to, on the CPU.

    Args:
        family: of the transformer; where its steps take residuals, those are zeros.
        call: the arguments by name.
        batch: the step's rows: each of the call's is repeated, the same number of times.

    Returns:
        Its dimensions, and those of its inputs that a call says, by name.
    """
    flat = family.flatten_arguments(call)
    latents, own = flat[LATENTS], {name: flat[name] for name in family.argument_names()}
    grid, references = family.grid(latents, own), family.num_references(own)
    given = {LATENTS: latents, TIMESTEP: flat[TIMESTEP], **family.conditioning(own, grid)}
    times = max(1, batch // len(latents))
    dims = family.dims(
        grid,
        batch=times * len(latents),
        text_length=family.argument_text_length(own),
        num_kept=grid[0] * grid[1] + references,
        num_references=references,
    )
    inputs = {}
    for name, shape in family.step_shapes(SYMBOLIC).items():
        if name in given:
            tensor = given[name].to("cpu", family.input_dtype(name, latents.dtype))
            inputs[name] = tensor.repeat_interleave(times, 0) if shape[0] == SYMBOLIC.batch else tensor
        elif is_residual(name):
            inputs[name] = torch.zeros(*dims.named(shape), dtype=latents.dtype)  # type: ignore[arg-type]  # numbers
    return dims, inputs
