"""`CatTransformer` stands in for `pipe.transformer` of a diffusers pipeline."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from cat_pruning.checked import checked, shown
from cat_pruning.engines.session_pool import SessionPool
from cat_pruning.engines.step_engine import StepEngine
from cat_pruning.engines.torch_engine import TorchStepEngine
from cat_pruning.errors import CheckpointError, SettingsError, ShapeError
from cat_pruning.families import is_known
from cat_pruning.imports import importing
from cat_pruning.installation import check_platform
from cat_pruning.runtime.adapter_methods import AdapterMethods
from cat_pruning.runtime.adapters import Adapters
from cat_pruning.runtime.attention_kwargs import scaled_adapters, split_attention_kwargs
from cat_pruning.runtime.engine_choice import engine_from_bundle, open_signed
from cat_pruning.runtime.handle import ImageHandle
from cat_pruning.runtime.model_methods import ModelMethods
from cat_pruning.runtime.plain_tensors import check_plain
from cat_pruning.runtime.record import StepRecord
from cat_pruning.runtime.sampling import Sampling
from cat_pruning.runtime.step_call import StepCall
from cat_pruning.runtime.whole import WholeTransformer
from cat_pruning.schedule import Schedule
from cat_pruning.settings import PruneSettings, check_settings

MAIN_CONTEXT = "cond"  # diffusers' name for the calls with the prompt


class CatTransformer(AdapterMethods, ModelMethods, nn.Module):
    """A diffusers transformer that computes only the tokens worth computing (Cheng, Chen, Jia 2025).

    Put it in the place of `pipe.transformer`; the pipeline and its scheduler stay as they are. Whose image a call is of
    is seen from the call and its thread (`cat_pruning.runtime.sampling`), or said: see `image`. The weights are shared.
    Every instance is a `ModelMixin` of diffusers.

        pipe.transformer = CatTransformer.from_model(pipe.transformer, PruneSettings(keep_ratio=0.3))

    Attributes:
        engine: the step engine.
        adapters: those that are loaded, of this and every copy of it.
        sessions: the memory of images in progress, of this and every copy of it: `sessions.max_sessions = 4` bounds it.
    """

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        """An instance of this class and of `ModelMixin`; so diffusers is imported here, and not with this module."""
        with importing:  # and so all instances have one class
            model = _diffusers_model(cls)  # type: ignore[arg-type]  # a class is hashable
        instance: Self = super().__new__(model)
        return instance

    @checked
    def __init__(self, engine: StepEngine, settings: PruneSettings | None = None) -> None:
        check_platform()
        from diffusers.configuration_utils import FrozenDict

        super().__init__()
        self.engine = engine
        self.settings = settings or PruneSettings()
        self.adapters = Adapters(engine)
        self.sessions = SessionPool(engine)
        self.config = FrozenDict(engine.family.config)
        self._threads = threading.local()
        if isinstance(engine, TorchStepEngine):
            self.add_module("transformer", engine.transformer)  # so that pipe.to(...) moves it

    @classmethod
    @checked
    def from_bundle(
        cls,
        path: str | Path,
        engine: str = "auto",
        *,
        settings: PruneSettings | None = None,
        cuda_graphs: bool = True,
        compiled: bool = False,
        public_key: str | Path | None = None,
    ) -> Self:
        """Load a bundle that `cat-export` wrote, on this machine's GPU if it has one.

        Args:
            path: the bundle's directory, or a URL: see `load_pipeline`.
            engine: "auto", "tensorrt", "tensorrt_rtx", "onnxruntime" or "torch"; "auto" takes the bundle's plans if
                there are some for the GPU, else ONNX Runtime.
            settings: instead of those the bundle was exported with.
            cuda_graphs: on a GPU, capture steps and replay them as one launch each; ONNX Runtime does not.
            compiled: of the torch engine, compile the blocks: see `from_model`.
            public_key: see `load_pipeline`.

        Raises:
            BundleError: no bundle, or one that is truncated, edited, not signed or of another version.
            EngineError: the engine cannot run here.
            ScheduleError: the settings' schedule was fitted to another model.
        """
        bundle = open_signed(path, public_key, engine)
        loaded = engine_from_bundle(bundle, engine, cuda_graphs=cuda_graphs, compiled=compiled)
        return cls(loaded, settings or bundle.manifest.settings)

    @classmethod
    @checked
    def from_model(
        cls,
        transformer: nn.Module,
        settings: PruneSettings | None = None,
        *,
        schedule: Schedule | None = None,
        cuda_graphs: bool = True,
        compiled: bool | None = None,
    ) -> Self | WholeTransformer:
        """Wrap a diffusers transformer, where its weights are. The transformer itself is not changed.

        Args:
            transformer: the module; its own attributes but for adapters' are not to change while steps are captured.
            settings: what to compute on which step.
            schedule: short for `PruneSettings.tuned(schedule)`, or for these settings with it.
            cuda_graphs: on a GPU, capture steps and replay them as one launch each: see `TorchStepEngine`.
            compiled: compile the blocks by torch.compile, and more: faster on a GPU, equal to rounding: see there.
                None: if the transformer or its blocks were compiled.

        Returns:
            Of a class that no family knows, a `WholeTransformer`: for settings that compute all or nothing on a step.

        Raises:
            CheckpointError: no diffusers transformer, or none whose `forward` takes a timestep.
            SettingsError: settings that prune, for a class that computes all or nothing; a table of steps in them, and
                another as `schedule`; or an attention processor of the user's own.
            ScheduleError: the schedule was fitted to another model.
        """
        if isinstance(getattr(transformer, "_orig_mod", transformer), CatTransformer):  # compiled or not
            raise CheckpointError("the transformer is a CatTransformer already", "set its `settings`")
        settings = _with_schedule(settings, schedule)
        if not is_known(type(getattr(transformer, "_orig_mod", transformer)).__name__):
            if compiled:
                raise SettingsError(
                    f"compiled=True: no family knows {type(transformer).__name__}, whose blocks it would compile",
                    "compile the transformer first: torch.compile(transformer)",
                )
            return WholeTransformer.around(transformer, settings)
        return cls(TorchStepEngine(transformer, cuda_graphs=cuda_graphs, compiled=compiled), settings)

    @property
    def settings(self) -> PruneSettings:
        """What to compute on which step; may be replaced between two images.

        Raises:
            SettingsError: where it is set, it is none.
        ScheduleError: where it is set, the schedule was fitted to another model.
        """
        return self._settings

    @settings.setter
    def settings(self, settings: PruneSettings) -> None:
        self._check_schedule(settings)
        self._settings = settings

    def _check_schedule(self, settings: PruneSettings) -> None:
        check_settings(settings)
        family = self.engine.family
        if settings.schedule is not None:
            settings.schedule.check_model(family.transformer_class, family.config)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the engine computes in."""
        return self.engine.dtype

    @property
    def device(self) -> torch.device:
        """Where the engine computes."""
        return self.engine.device

    @property
    def last_step(self) -> StepRecord | None:
        """What this thread's last call computed; None before the first."""
        return self._sampling().record

    def image(self, settings: PruneSettings | None = None) -> ImageHandle:
        """Begin an image whose calls say so, for loops of your own; any number of them, on one thread or many.

        Args:
            settings: of this image; by default the transformer's.

        Raises:
            ScheduleError: the settings' schedule was fitted to another model.
        """
        if settings is not None:
            self._check_schedule(settings)
        return ImageHandle(self, self.sessions, settings or self.settings)

    @contextmanager
    def bound_to(self, image: ImageHandle) -> Iterator[None]:
        """Meanwhile every call that this thread makes of this transformer is of `image`, as a pipeline's calls."""
        before = getattr(self._threads, "image", None)
        self._threads.image = image
        try:
            yield
        finally:
            self._threads.image = before

    def reset(self) -> None:
        """Forget this thread's images in progress. Pipelines need not call it: a new image is recognised."""
        self._sampling().reset()

    def release(self) -> None:
        """Forget this thread's images in progress, and free the memory that no image needs any more."""
        self.reset()
        self.sessions.release()

    @contextmanager
    def cache_context(self, name: str, **where: Any) -> Iterator[None]:
        """What diffusers' pipelines say of the calls that they make within: "cond", "uncond". The rest is not read."""
        before = getattr(self._threads, "context", MAIN_CONTEXT)
        self._threads.context = name
        try:
            yield
        finally:
            self._threads.context = before

    def forward(
        self,
        hidden_states: Tensor,
        *,
        timestep: Tensor | None = None,
        skip_layers: Sequence[int] | None = None,
        return_dict: bool = True,
        **arguments: Any,
    ) -> Any:
        """The call that a diffusers pipeline makes; see the transformer's own `forward` for its arguments.

        Calls within a `cache_context` other than "cond", calls with `skip_layers`, and calls with another prompt at the
        timestep that was just computed are no steps of the image: they compute the tokens of the step that they go
        with, in caches of their own.

        Returns:
            `Transformer2DModelOutput`, or a tuple without `return_dict`: the noise prediction before guidance, in the
            dtype of `hidden_states`. Do not change it in place: the next step reads it again.

        Raises:
            SettingsError: an argument that pruned steps do not support, or one that is missing.
            ScheduleError: a schedule of other timesteps.
            ShapeError: a size that the patch size does not divide, that the position table does not hold, or
                with fewer tokens than clusters.
        """
        context = getattr(self._threads, "context", MAIN_CONTEXT)
        return self.compute(
            getattr(self._threads, "image", None) or self._current_sampling(),
            context,
            hidden_states,
            timestep=timestep,
            skip_layers=skip_layers,
            return_dict=return_dict,
            **arguments,
        )

    def compute(
        self,
        images: Sampling | ImageHandle,
        context: str,
        hidden_states: Tensor,
        *,
        timestep: Tensor | None = None,
        skip_layers: Sequence[int] | None = None,
        return_dict: bool = True,
        **arguments: Any,
    ) -> Any:
        """One call, of a thread's images or of one that a handle is for: see `forward`."""
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        if not isinstance(hidden_states, Tensor) or not hidden_states.is_floating_point():
            got = getattr(hidden_states, "dtype", type(hidden_states).__name__)
            raise SettingsError(f"hidden_states: expected a tensor of floating-point numbers, got {got}")
        check_plain("hidden_states", hidden_states)
        timestep = check_plain("timestep", timestep)
        if tuple(timestep.shape) not in ((), (1,), tuple(hidden_states.shape[:1])):
            raise ShapeError(f"timestep has shape {tuple(timestep.shape)}, expected {tuple(hidden_states.shape[:1])}")
        if not isinstance(context, str):
            raise SettingsError(f"context={shown(context)}: expected a name")
        if skip_layers is not None and not _are_numbers(skip_layers):
            raise SettingsError(f"skip_layers: expected a list of blocks, got {skip_layers!r}")
        arguments, lora_scale = split_attention_kwargs(arguments)
        conditioning, residuals = self._conditioning(arguments)
        call = StepCall(hidden_states, timestep, conditioning, residuals, tuple(skip_layers or ()))
        with scaled_adapters(self.adapters, lora_scale):
            if context == MAIN_CONTEXT and skip_layers is None:
                noise = images.call(call)
            else:
                noise = images.call_beside(context if skip_layers is None else f"{context} without layers", call)
        noise = noise.to(hidden_states)
        return Transformer2DModelOutput(sample=noise) if return_dict else (noise,)

    def _current_sampling(self) -> Sampling:
        """This thread's, begun anew where the settings were replaced."""
        sampling = self._sampling()
        if sampling.settings is not self.settings and sampling.settings != self.settings:
            sampling.settings = self.settings
            sampling.reset()
        return sampling

    def _sampling(self) -> Sampling:
        if not hasattr(self._threads, "sampling"):
            self._threads.sampling = Sampling(self.sessions, self.settings)
        return self._threads.sampling  # type: ignore[no-any-return]

    def _conditioning(self, arguments: dict[str, Any]) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        """What holds for all steps of an image, and a ControlNet's residuals, which hold for one."""
        family = self.engine.family
        given = family.flatten_arguments(arguments)
        tensors: dict[str, Tensor] = {}
        for name in family.argument_names():
            tensors[name] = check_plain(name, given.pop(name, None))
        residuals = family.residuals({name: given.pop(name, None) for name in family.residual_arguments})
        for residual in residuals:
            if residual is not None:
                check_plain(family.residual_arguments[0], residual)
        if residuals and not self.engine.takes_residuals:
            raise SettingsError(
                f"{family.residual_arguments[0]}: the graphs that {self.engine.name} runs take no ControlNet",
                "export the bundle with --controlnet, or load it with engine='torch'",
            )
        if unsupported := sorted(name for name, value in given.items() if _is_given(value)):
            raise SettingsError(
                f"{', '.join(unsupported)}: not supported by pruned steps",
                "leave it out or use the original transformer",
            )
        return tensors, residuals

    def __deepcopy__(self, memo: dict[int, Any]) -> CatTransformer:
        """A transformer with images of its own in progress, over the same weights and within the same bound."""
        copy = type(self)(self.engine, self.settings)
        copy.adapters, copy.sessions = self.adapters, self.sessions
        return copy

    def extra_repr(self) -> str:
        """What `print(pipe.transformer)` says."""
        return f"engine={self.engine.name}, device={self.device}, dtype={self.dtype}, settings={self.settings}"


@functools.cache
def _diffusers_model(cls: Any) -> Any:
    """`cls` with `ModelMixin` as a base; pipelines load adapters into models of that class only."""
    from diffusers.models.modeling_utils import ModelMixin

    if issubclass(cls, ModelMixin):
        return cls
    named_alike = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls, ModelMixin), named_alike)


def _with_schedule(settings: PruneSettings | None, schedule: Schedule | None) -> PruneSettings:
    if schedule is None:
        return settings or PruneSettings()
    if settings is None:
        return PruneSettings.tuned(schedule)
    if settings.schedule not in (None, schedule):
        raise SettingsError(
            "the settings have a schedule, and another one was given",
            "give one of them: PruneSettings.tuned(schedule) makes settings of it",
        )
    return settings.replace(schedule=schedule)


def _are_numbers(layers: object) -> bool:
    return isinstance(layers, Sequence) and all(type(layer) is int for layer in layers)  # no bool


def _is_given(value: object) -> bool:
    return isinstance(value, Tensor) or bool(value)  # a tensor of several values has no truth value
