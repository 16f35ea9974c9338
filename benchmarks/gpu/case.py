"""A published architecture on the device with random weights, and what its pipeline would pass to it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gpu.setting import LARGE_MODEL, TINY, TINY_TEXT, Setting

if TYPE_CHECKING:
    from cat_pruning.checkpoints.published import Published
    from cat_pruning.engines.step_engine import StepSession
    from cat_pruning.engines.torch_engine import TorchStepEngine

GUIDANCE = {"sd3": 7.0, "pixart-sigma": 4.5, LARGE_MODEL: 3.5}  # of the pipelines, at their defaults
TIMESTEPS = (999.0, 900.0, 500.0)  # of the steps that are measured alone; of a thousand
_FLUX_MU = 1.15  # FluxPipeline's shift of the schedule at 4096 tokens


class Case:
    """A model on the device, and what a pipeline would pass to it.

    Args:
        setting: what is measured.
        transformer: the module; made anew where none is given.
    """

    def __init__(self, setting: Setting, transformer: Any = None) -> None:
        from cat_pruning.checkpoints.published import published_models
        from cat_pruning.families import family_of

        self.setting = setting
        published = published_models()[setting.model]
        text_length = TINY_TEXT if setting.tiny else published.text_length
        device, dtype = setting.device, setting.dtype
        self.transformer = transformer or _random_transformer(setting.model, device, dtype, setting.tiny)
        self.config = self.transformer.config
        self.family = family_of(self.transformer)
        self.guided = self.family.batched_guidance
        batch = setting.prompts * (2 if self.guided else 1)
        self.dims = self.family.dims(setting.grid, batch=batch, text_length=text_length, num_kept=0)
        shapes = self.family.input_shapes(self.dims)
        generator = torch.Generator(device).manual_seed(0)

        def randn(*shape: Any) -> Tensor:
            return torch.randn([int(dim) for dim in shape], generator=generator, device=device, dtype=dtype)

        names = self.family.argument_names()
        self.arguments = {name: randn(*shapes[name]) for name in names if name in shapes}
        if "encoder_attention_mask" in self.arguments:  # prompts of some 60 tokens, and empty negative ones
            mask = torch.zeros_like(self.arguments["encoder_attention_mask"])
            mask[setting.prompts :, : max(2, text_length // 5)] = 1
            mask[: setting.prompts, :1] = 1
            self.arguments["encoder_attention_mask"] = mask
        if "guidance" in self.arguments:
            self.arguments["guidance"] = torch.full((batch,), GUIDANCE[setting.model], device=device)
        if "img_ids" in names:
            self.arguments |= _positions(setting.grid, text_length, device, dtype)
        self.latents = self.other_latents(0)

    @property
    def rows(self) -> Tensor:
        """The latents as guidance passes them."""
        return self._rows_of(self.latents)

    def _rows_of(self, latents: Tensor) -> Tensor:
        return torch.cat([latents] * 2) if self.guided else latents

    def other_latents(self, seed: int) -> Tensor:
        """The noise that an image begins with, one for each prompt."""
        from cat_pruning.step_io import LATENTS

        shape = self.family.input_shapes(self.dims)[LATENTS][1:]
        generator = torch.Generator(self.setting.device).manual_seed(seed + 1)
        sizes = [self.setting.prompts, *(int(dim) for dim in shape)]
        return torch.randn(sizes, generator=generator, device=self.setting.device, dtype=self.setting.dtype)

    def scheduler(self, steps: int) -> Any:
        """The pipeline's own scheduler, its schedule set."""
        import diffusers

        own: dict[str, Any] = {}
        if self.setting.model == "pixart-sigma":
            scheduler = diffusers.DPMSolverMultistepScheduler(beta_schedule="linear")
        elif self.setting.model == LARGE_MODEL:
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
            own = {"sigmas": [1 - step / steps for step in range(steps)], "mu": _FLUX_MU}
        else:
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(**{"num_inference_steps": steps, **own}, device=self.setting.device)
        return scheduler

    def call(self, transformer: Any, rows: Tensor, timestep: Tensor) -> Tensor:
        """One call as the pipeline makes it, `timestep` as its scheduler has it: the noise, shaped as `rows`."""
        own: dict[str, Any] = {}
        timestep = timestep.expand(len(rows))
        if self.family.name == "pixart":
            own = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        elif self.family.name == "flux":
            timestep = timestep.to(rows.dtype) / 1000
        own |= self.arguments
        noise: Tensor = transformer(hidden_states=rows, timestep=timestep, **own, return_dict=False)[0]
        return noise[:, : self.config["in_channels"]] if self.family.name == "pixart" else noise  # without the variance

    def sample(
        self,
        transformer: Any,
        steps: int,
        on_step: Callable[[int], None] = lambda step: None,
        latents: Tensor | None = None,
        stop_after: int | None = None,
    ) -> Tensor:
        """A whole loop, or its first steps: the latents at its end. `on_step` is called before every step."""
        latents = self.latents if latents is None else latents
        scheduler, scale = self.scheduler(steps), GUIDANCE[self.setting.model]
        for index, timestep in enumerate(scheduler.timesteps[:stop_after]):
            on_step(index)
            noise = self.call(transformer, self._rows_of(latents), timestep)
            if self.guided:
                negative, positive = noise.chunk(2)
                noise = negative + scale * (positive - negative)
            latents = scheduler.step(noise, timestep, latents, return_dict=False)[0]
        return latents

    def engine(self, captured: bool = True, *, fused: bool = False, **options: bool) -> TorchStepEngine:
        """Our engine over the module; `options` in the place of the setting's. fused: with diffusers' fused QKV."""
        from cat_pruning.engines.torch_engine import TorchStepEngine

        transformer = self._fused if fused else self.transformer
        return TorchStepEngine(transformer, cuda_graphs=captured, **{**self.setting.engine_options, **options})

    @functools.cached_property
    def _fused(self) -> Any:
        """A copy that shares the weights, but for those of queries, keys and values, which it has as one."""
        from cat_pruning.families.interception import share_parameters

        fused = share_parameters(self.transformer)
        with torch.no_grad():
            fused.fuse_qkv_projections()
        return fused

    def begun(self, engine: TorchStepEngine) -> StepSession:
        """A session with an image begun, whose steps are at `TIMESTEPS`."""
        session = engine.session()
        conditioning = self.family.conditioning(self.arguments, self.setting.grid)
        session.begin(self.dims, conditioning, [self.timestep(each) for each in TIMESTEPS])
        return session

    def timestep(self, of_thousand: float) -> float:
        """A timestep as the model is given it."""
        return self.family.max_timestep * of_thousand / 1000


def shared_case(setting: Setting) -> Case:
    """A case whose transformer this process makes once, for all that measure it. It is not to be changed."""
    return Case(setting, _shared_transformer(setting.model, setting.device, setting.dtype, setting.tiny))


def forget_shared() -> None:
    """Let go of the shared transformers."""
    _shared_transformer.cache_clear()


def _random_transformer(model: str, device: torch.device, dtype: torch.dtype, tiny: bool) -> Any:
    from cat_pruning.checkpoints.published import published_models

    return random_on(device, dtype, published_models()[model], TINY[model] if tiny else {})


_shared_transformer = functools.lru_cache(maxsize=2)(_random_transformer)


def random_on(device: torch.device, dtype: torch.dtype, published: Published, changes: dict[str, Any]) -> nn.Module:
    """The architecture with random weights made where they will be; seconds for two billion on a GPU."""
    from cat_pruning.checkpoints.random_weights import hollow_transformer
    from cat_pruning.dtype import DType

    name = next(each for each in DType if each.torch is dtype)
    config = {**published.transformer, **changes}
    return fill_on(device, dtype, hollow_transformer(published.transformer_class, config, name))


def fill_on(device: torch.device, dtype: torch.dtype, module: nn.Module) -> nn.Module:
    """`module` with parameters N(0, 0.02²) made on the device, the same one where it had the same; buffers moved."""
    generator = torch.Generator(device).manual_seed(0)
    made: dict[int, nn.Parameter] = {}
    before = []  # so that no other has their addresses
    for part in module.modules():
        for leaf, parameter in list(part.named_parameters(recurse=False)):
            before.append(parameter)
            if id(parameter) not in made:
                values = torch.empty(parameter.shape, dtype=dtype, device=device)
                values.normal_(0.0, 0.02, generator=generator)
                made[id(parameter)] = nn.Parameter(values, requires_grad=False)
            setattr(part, leaf, made[id(parameter)])
        for leaf, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, leaf, buffer.to(device))
    return module.eval()


def _positions(grid: tuple[int, int], text_length: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """FLUX's, as its pipeline makes them."""
    from diffusers import FluxPipeline

    image: Tensor = FluxPipeline._prepare_latent_image_ids(1, *grid, device, dtype)
    return {"img_ids": image, "txt_ids": torch.zeros(text_length, 3, device=device, dtype=dtype)}
