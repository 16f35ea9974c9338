"""A bundle that is served: what it can be asked for, and its images computed in batches."""

from __future__ import annotations

import copy
import inspect
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from cat_pruning.bundle.schedules import choose_schedule, read_schedules, speed_of
from cat_pruning.errors import ScheduleError, ShapeError
from cat_pruning.families import family_named
from cat_pruning.runtime.engine_choice import open_signed
from cat_pruning.runtime.pipeline import load_pipeline
from cat_pruning.serving.failures import refused
from cat_pruning.serving.requests import PRESETS, ImageRequest
from cat_pruning.serving.run import Asked, Computed, Step, run
from cat_pruning.settings import PruneSettings

if TYPE_CHECKING:
    from pathlib import Path

    from cat_pruning.bundle.manifest import Manifest
    from cat_pruning.runtime.transformer import CatTransformer
    from cat_pruning.schedule import Schedule
    from cat_pruning.serving.config import ServeConfig

_PLANS: Final = ("tensorrt", "tensorrt_rtx")  # engines that take the shapes that they were built for, and no others
_BATCH_ON_GPU: Final = 4
_OWN: Final = ("scheduler", "tokenizer", "transformer")  # parts that keep something from call to call


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is the same for the images of one batch.

    Attributes:
        recipe: name of the settings: "bundle", a preset, or "speedup X" of `steps` steps.
        most: images of a batch.
    """

    model: str
    height: int
    width: int
    steps: int
    guidance_scale: float
    recipe: str
    most: int

    @property
    def share(self) -> tuple[str, int, int]:
        """Whose turn it is: see `BatchQueue`."""
        return self.model, self.height, self.width

    @property
    def size(self) -> str:
        """WIDTHxHEIGHT, as OpenAI's API says it."""
        return f"{self.width}x{self.height}"


class ServedModel:
    """A bundle's pipeline, of which every thread that computes has a copy; the weights are shared.

    Args:
        name: that requests call it by.
        pipe: whose transformer is a `CatTransformer`.
        manifest: of the bundle.
        schedules: of the bundle.
        config: the server's.
    """

    def __init__(
        self, name: str, pipe: Any, manifest: Manifest, schedules: dict[str, Schedule], config: ServeConfig
    ) -> None:
        self.name, self._pipe, self._manifest, self._schedules, self._config = name, pipe, manifest, schedules, config
        self._family = family_named(manifest.family, manifest.transformer_config)
        self._text = self._family.pipeline_arguments(pipe, manifest.geometry.text_length)
        self._defaults = inspect.signature(pipe.__call__).parameters
        self._local = threading.local()
        self.transformer: CatTransformer = pipe.transformer
        self._has_plans = self.transformer.engine.name in _PLANS
        self.sizes = tuple(dict.fromkeys((each.height, each.width) for each in manifest.profiles))
        self.max_pixels = config.max_pixels or max(height * width for height, width in self.sizes)

    @classmethod
    def load(cls, name: str, path: Path, config: ServeConfig) -> Self:
        """Load a bundle. Raises as `load_pipeline` does."""
        cache = config.prompt_cache_mb * 2**20
        pipe = load_pipeline(path, config.engine, public_key=config.public_key, prompt_cache_bytes=cache)
        bundle = open_signed(path, config.public_key, config.engine)
        return cls(name, pipe, bundle.manifest, read_schedules(bundle), config)

    @property
    def default_steps(self) -> int:
        """Those of a request that says none: its pipeline's."""
        return int(self._defaults["num_inference_steps"].default)

    @property
    def default_guidance(self) -> float:
        """That of a request that says none: what its schedules were tuned at, else its pipeline's."""
        made_for = [schedule.made_for for schedule in self._schedules.values() if schedule.made_for is not None]
        return float(made_for[0].guidance_scale if made_for else self._defaults["guidance_scale"].default)

    def described(self) -> dict[str, Any]:
        """What `GET /v1/models` says of it."""
        speedups = {round(speed_of(schedule), 2) for schedule in self._schedules.values()}
        return {
            "id": self.name,
            "object": "model",
            "created": 0,
            "owned_by": "cat-pruning",
            "sizes": [f"{width}x{height}" for height, width in self.sizes],
            "default_steps": self.default_steps,
            "default_guidance": self.default_guidance,
            "presets": list(PRESETS),
            "speedups": sorted({1.0} | speedups),
        }

    def job(self, request: ImageRequest) -> Job:
        """What a request asks of this model.

        Raises:
            RequestError: it cannot be had.
        """
        config = self._config
        for name, texts in {"prompt": request.prompts, "negative_prompt": (request.negative_prompt or "",)}.items():
            if (longest := max(map(len, texts))) > config.max_prompt_chars:
                raise refused(name, f"{name} has {longest} characters, more than {config.max_prompt_chars}")
        if not all(prompt.strip() for prompt in request.prompts):
            raise refused("prompt", "the prompt is empty", "say what to draw")
        steps = request.num_inference_steps or self.default_steps
        if steps > config.max_steps:
            raise refused("num_inference_steps", f"num_inference_steps is {steps}, more than {config.max_steps}")
        guidance = self.default_guidance if request.guidance_scale is None else request.guidance_scale
        self._check_guidance(request, guidance)
        height, width = self._size(request.size)
        recipe = f"speedup {request.speedup:g}" if request.speedup is not None else request.preset or "bundle"
        job = Job(
            model=self.name,
            height=height,
            width=width,
            steps=steps,
            guidance_scale=guidance,
            recipe=recipe,
            most=self._batches(height, width)[-1],
        )
        self._check_recipe(job)
        return job

    def compute(self, job: Job, asked: Sequence[Asked], after_step: Callable[[Step], None]) -> Computed:
        """Compute one batch of images, on this thread.

        Args:
            job: what they have in common; as many as `job.most` at most.
            asked: the images.
            after_step: called after every step; what it raises ends the batch there, and gives its session back.
        """
        size = next((size for size in self._batches(job.height, job.width) if size >= len(asked)), len(asked))
        padded = [*asked, *([asked[-1]] * (size - len(asked)))]  # a plan takes the batches that it was built for
        arguments = self._text | {
            "height": job.height,
            "width": job.width,
            "num_inference_steps": job.steps,
            "guidance_scale": job.guidance_scale,
        }
        if self._takes_negative and job.guidance_scale > 1.0:
            arguments["negative_prompt"] = [each.negative_prompt for each in padded]
        return run(self._own_pipe(), self._settings(job), padded, len(asked), arguments, after_step)

    def warm_up(self) -> None:
        """Compute a short image of every size and batch that the bundle was exported for, on this thread."""
        settings = self._manifest.settings
        steps = min(self.default_steps, settings.full_steps + 2)
        recipe = "bundle" if settings.schedule is None else "speedup 1"
        guidance = self.default_guidance if self._manifest.guidance or not self._has_plans else 1.0
        for height, width in self.sizes:
            if height * width > self.max_pixels:
                continue
            for size in self._batches(height, width):
                job = Job(
                    model=self.name,
                    height=height,
                    width=width,
                    steps=steps,
                    guidance_scale=guidance,
                    recipe=recipe,
                    most=size,
                )
                self.compute(job, [Asked(prompt="warm-up", seed=0)] * size, lambda step: None)

    @property
    def _takes_negative(self) -> bool:
        return self._family.batched_guidance and "negative_prompt" in self._defaults

    def _check_guidance(self, request: ImageRequest, guidance: float) -> None:
        is_guided = self._family.batched_guidance and guidance > 1.0
        if request.negative_prompt and not (is_guided and self._takes_negative):
            reason = "at a guidance_scale of 1 or less" if self._takes_negative else f"by {self.name}"
            raise refused("negative_prompt", f"no negative prompt is taken {reason}", "leave it out")
        if self._has_plans and self._family.batched_guidance and is_guided is not self._manifest.guidance:
            which = "above 1" if self._manifest.guidance else "of 1 or less"
            raise refused("guidance_scale", f"{self.name} is built for a guidance_scale {which}, this is {guidance:g}")

    def _size(self, size: str | None) -> tuple[int, int]:
        """Height and width in pixels."""
        if size in (None, "auto"):
            size = "{1}x{0}".format(*self.sizes[0])
        match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", size or "")
        if match is None:
            raise refused("size", "size: expected WIDTHxHEIGHT in pixels, as 1024x768, or auto")
        width, height = int(match[1]), int(match[2])
        known = ", ".join(f"{width}x{height}" for height, width in self.sizes)
        if self._has_plans and (height, width) not in self.sizes:
            raise refused("size", f"size={size}: {self.name} is built for {known}")
        geometry = self._manifest.geometry
        token = geometry.pixels_per_latent * geometry.patch_size
        largest = (geometry.max_latent_size or 10**5) * geometry.pixels_per_latent
        if not height or not width or height % token or width % token:
            raise refused("size", f"size={size}: both sides must be multiples of {token}", f"as {known}")
        if max(height, width) > largest:
            raise refused("size", f"size={size}: {self.name} draws {largest}x{largest} at most")
        if height * width > self.max_pixels:
            raise refused("size", f"size={size}: these are {height * width} pixels, more than {self.max_pixels}")
        return height, width

    def _batches(self, height: int, width: int) -> Sequence[int]:
        """The sizes of batches that are computed."""
        default = 1 if self.transformer.device.type == "cpu" else _BATCH_ON_GPU
        most = self._config.max_batch or default
        if not self._has_plans:
            return range(1, most + 1)
        built = sorted(
            {each.prompts for each in self._manifest.profiles if (each.height, each.width) == (height, width)}
        )
        return [size for size in built if size <= most] or built[:1]

    def _settings(self, job: Job) -> PruneSettings:
        """What a job computes on which step.

        Raises:
            ScheduleError: the bundle has no schedule of this speedup.
        """
        settings = self._manifest.settings
        if job.recipe == "bundle":
            return settings
        if job.recipe in PRESETS:
            return PruneSettings.preset(job.recipe)
        speedup = float(job.recipe.removeprefix("speedup "))
        if speedup == 1.0:
            return settings.replace(full_steps=max(2, 2 * job.steps), schedule=None)  # Heun counts fewer, never more
        return PruneSettings.tuned(choose_schedule(self._schedules, speedup, job.steps, tune="cat-tune BUNDLE"))

    def _check_recipe(self, job: Job) -> None:
        try:
            settings = self._settings(job)
        except ScheduleError as error:
            raise refused("speedup", error.problem, "GET /v1/models says which there are") from error
        if settings.schedule is not None and settings.schedule.num_steps != job.steps:
            steps = settings.schedule.num_steps
            raise refused(
                "num_inference_steps", f"{self.name} computes by a schedule of {steps} steps", f"ask for {steps}"
            )
        geometry = self._manifest.geometry
        token = geometry.pixels_per_latent * geometry.patch_size
        try:
            settings.num_kept((job.height // token) * (job.width // token))
        except ShapeError as error:
            raise refused("size", f"size={job.size}: {error.problem}", "ask for a larger size") from error

    def _own_pipe(self) -> Any:
        """This thread's copy: a scheduler, tokenizers and images of its own."""
        if not hasattr(self._local, "pipe"):
            parts = self._pipe.components.items()
            own = {name: copy.deepcopy(part) if name.startswith(_OWN) else part for name, part in parts}
            self._local.pipe = type(self._pipe)(**own)
            self._local.pipe.set_progress_bar_config(disable=True)
        return self._local.pipe
