"""One batch of images: a call of the diffusers pipeline as it is, its transformer bound to one image's handle."""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cat_pruning.errors import EngineError
from cat_pruning.finite import is_finite

if TYPE_CHECKING:
    from PIL import Image

    from cat_pruning.runtime.handle import ImageHandle
    from cat_pruning.runtime.record import StepRecord
    from cat_pruning.schedule import StepKind
    from cat_pruning.settings import PruneSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One image of a batch."""

    prompt: str
    seed: int
    negative_prompt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """A batch that is done.

    Attributes:
        images: in the order in which they were asked for.
        counts: (B, N) int64 on the host, how often each token of each image was computed.
        grid: tokens (high, wide).
        kinds: how many steps of each kind.
        seconds: of the stages encode, steps and decode.
    """

    images: list[Image.Image]
    counts: Tensor
    grid: tuple[int, int]
    kinds: Counter[StepKind]
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step that was just computed.

    Attributes:
        number: 0-based.
        record: what was computed.
        preview: decodes what an image of the batch, by its index, will look like as far as is known now; synchronises.
    """

    number: int
    record: StepRecord
    preview: Callable[[int], Image.Image]


def run(
    pipe: Any,
    settings: PruneSettings,
    asked: Sequence[Asked],
    wanted: int,
    arguments: dict[str, Any],
    after_step: Callable[[Step], None],
) -> Computed:
    """Call a pipeline for one batch.

    Each image's noise comes from a generator of its own, by its seed, on the host. So what it looks like does not
    depend on the others of its batch, but for the rounding of other shapes. Synchronises once, after the last step.

    Args:
        pipe: this thread's alone; its transformer is a `CatTransformer`.
        settings: what to compute on which step.
        asked: the images.
        wanted: how many of them, from the first, are returned.
        arguments: of the pipeline, for all of them.
        after_step: called after every step; what it raises ends the batch and passes.

    Raises:
        EngineError: the decoded images are not finite: they would be black.
    """
    with pipe.transformer.image(settings) as image, pipe.transformer.bound_to(image):
        steps = _Steps(pipe, image, len(asked), arguments, after_step)
        hook = pipe.transformer.register_forward_pre_hook(steps.before_call)
        try:
            pixels = pipe(
                [each.prompt for each in asked],
                generator=[torch.Generator().manual_seed(each.seed) for each in asked],
                output_type="pt",
                **steps.callbacks(),
                **arguments,
            ).images[:wanted]
        finally:
            hook.remove()
    if not is_finite(pixels):
        raise EngineError("the decoded images have values that are not finite", "see cat-generate of the same bundle")
    processor = pipe.image_processor
    images = processor.numpy_to_pil(processor.pt_to_numpy(pixels))
    return steps.computed(images)


@dataclass(eq=False)
class _Steps:
    """What happens on the steps of one call."""

    pipe: Any
    image: ImageHandle
    num_images: int
    arguments: dict[str, Any]
    after_step: Callable[[Step], None]
    began: float = field(default_factory=time.perf_counter)
    first_call: float | None = None
    last_step: float = 0.0
    kinds: Counter[StepKind] = field(default_factory=Counter)
    counts: Tensor | None = None
    latents: tuple[Tensor | None, Tensor | None] = (None, None)  # after the last two steps

    def callbacks(self) -> dict[str, Any]:
        """How the pipeline tells of its steps; PixArt's are of the older kind."""
        if "callback_on_step_end" in inspect.signature(self.pipe.__call__).parameters:
            return {"callback_on_step_end": self._on_step_end}
        return {"callback": lambda step, timestep, latents: self._after(step, latents)}

    def before_call(self, module: Any, arguments: Any) -> None:
        """Of the transformer: the prompts are encoded by now."""
        if self.first_call is None:
            self.first_call = time.perf_counter()

    def _on_step_end(self, pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        self._after(step, tensors["latents"])
        return {}

    def _after(self, number: int, latents: Tensor) -> None:
        record = self.image.last_step
        assert record is not None
        self.kinds[record.kind] += 1
        self._count(record)
        # Most schedulers return new latents; where one does not, the last two are the same and a preview is noisier.
        self.latents = (self.latents[1], latents)
        if number + 1 == self.arguments["num_inference_steps"] and latents.device.type == "cuda":
            torch.cuda.synchronize(latents.device)
        self.last_step = time.perf_counter()
        self.after_step(Step(number=number, record=record, preview=lambda index: self._preview(number, index)))

    def _count(self, record: StepRecord) -> None:
        kept = record.keep_indices[-self.num_images :].long()  # with guidance, the last rows are the prompts'
        if self.counts is None:
            self.counts = torch.zeros(self.num_images, record.num_tokens, dtype=torch.int64, device=kept.device)
        self.counts.scatter_add_(1, kept, torch.ones_like(kept))

    @torch.no_grad()
    def _preview(self, number: int, index: int) -> Image.Image:
        before, after = self.latents
        assert after is not None
        clean = _without_noise(self.pipe.scheduler, number, before, after)
        return _decoded(self.pipe, clean[index : index + 1], self.arguments)

    def computed(self, images: list[Image.Image]) -> Computed:
        """All that is known at the end."""
        ended, record = time.perf_counter(), self.image.last_step
        assert record is not None
        assert self.counts is not None
        assert self.first_call is not None
        return Computed(
            images=images,
            counts=self.counts[: len(images)].cpu(),
            grid=record.grid,
            kinds=self.kinds,
            seconds={
                "encode": self.first_call - self.began,
                "steps": self.last_step - self.first_call,
                "decode": ended - self.last_step,
            },
        )


def _without_noise(scheduler: Any, number: int, before: Tensor | None, after: Tensor) -> Tensor:
    """The clean latents that a step pointed at, where the scheduler says enough; else the latents as they are.

    In flow matching x = (1 - s)·x0 + s·noise moves on a line by Euler's step: x0 = x - s·(x - x')/(s - s'), where the
    primed are the step before. DPM-Solver++ keeps x0 itself.
    """
    outputs = getattr(scheduler, "model_outputs", None)
    if outputs is not None:
        keeps_clean = str(scheduler.config.get("algorithm_type")).endswith("dpmsolver++") and outputs[-1] is not None
        return outputs[-1].to(after) if keeps_clean else after
    sigmas = getattr(scheduler, "sigmas", None)
    if before is None or sigmas is None or number + 1 >= len(sigmas):
        return after
    sigma, former = float(sigmas[number + 1]), float(sigmas[number])
    return after if sigma == former else after - sigma * (after - before) / (sigma - former)


def _decoded(pipe: Any, latents: Tensor, arguments: dict[str, Any]) -> Image.Image:
    """One image of latents, as the pipeline decodes its last ones."""
    if latents.dim() == 3:  # FLUX's are packed to rows of tokens
        latents = pipe._unpack_latents(latents, arguments["height"], arguments["width"], pipe.vae_scale_factor)
    config = pipe.vae.config
    scaled = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
    pixels = pipe.vae.decode(scaled.to(pipe.vae.dtype), return_dict=False)[0]
    image: Image.Image = pipe.image_processor.postprocess(pixels, output_type="pil")[0]
    return image
