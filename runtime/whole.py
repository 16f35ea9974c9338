"""`WholeTransformer` stands in for a diffusers transformer that no family knows: it computes all tokens, or none."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Final

from torch import nn

from cat_pruning.errors import SettingsError
from cat_pruning.families import FAMILIES
from cat_pruning.runtime.call_sampling import CallSampling
from cat_pruning.runtime.calls import CallReader
from cat_pruning.runtime.record import CallRecord
from cat_pruning.settings import PruneSettings, check_settings

# What a stand-in does not take over: ways to call the module, which the module itself keeps.
_CALLING: Final = ("_hf_hook", "_compiled_call_impl")


class WholeTransformer(nn.Module):
    """A diffusers transformer of any class, which computes a step's output or makes it of earlier ones.

    A full step calls the original with the arguments as they came. A forecast is a combination of outputs that the
    original had at earlier noise levels, as the schedule says (`cat_pruning.schedule`); nothing is intercepted.

    An instance is of the original's class too, and shares its submodules, weights and attributes: `to`, LoRA, hooks on
    blocks, quantisation and saving work as on the original, and change it. Every thread that calls it has an image of
    its own in progress. `CatTransformer.from_model` makes one.
    """

    _cat_original: nn.Module
    _cat_reader: CallReader
    _cat_settings: PruneSettings
    _cat_threads: threading.local

    @classmethod
    def around(cls, transformer: nn.Module, settings: PruneSettings) -> WholeTransformer:
        """The stand-in for a transformer, which may be compiled, or a stand-in itself.

        Raises:
            CheckpointError: the transformer's `forward` takes no timestep.
            SettingsError: the settings prune, or their schedule is another model's.
        """
        transformer = getattr(transformer, "_cat_original", transformer)
        module = getattr(transformer, "_orig_mod", transformer)
        reader = CallReader(module)
        stand_in: WholeTransformer = object.__new__(_class_for(type(module)))  # type: ignore[arg-type]  # a class is hashable
        nn.Module.__init__(stand_in)
        shared = {name: value for name, value in vars(module).items() if not _is_calling(name)}
        own = {"_cat_original": transformer, "_cat_reader": reader, "_cat_threads": threading.local()}
        vars(stand_in).update(shared | own)  # not by setattr, which would make the original a submodule
        stand_in.settings = settings
        return stand_in

    @property
    def settings(self) -> PruneSettings:
        """What to compute on which step; may be replaced between two images.

        Raises:
            SettingsError: where it is set, the settings prune, or their schedule is another model's.
        """
        return self._cat_settings

    @settings.setter
    def settings(self, settings: PruneSettings) -> None:
        check_settings(settings)
        name = type(self).__name__
        if settings.prunes and settings.keep_ratio < 1.0:
            able = ", ".join(family.transformer_class for family in FAMILIES)
            raise SettingsError(
                f"{name} cannot compute some tokens only, as these settings ask; classes that can: {able}",
                'give PruneSettings.preset("forecast"), or a schedule without pruned steps',
            )
        if settings.schedule is not None:
            settings.schedule.check_model(name, getattr(self, "config", {}))
        vars(self)["_cat_settings"] = settings

    @property
    def last_step(self) -> CallRecord | None:
        """What this thread's last call computed; None before the first."""
        return self._sampling().record

    def reset(self) -> None:
        """Forget this thread's image in progress. Pipelines need not call it: a new image is recognised."""
        self._sampling().reset()

    @contextmanager
    def cache_context(self, name: str, **options: Any) -> Iterator[None]:
        """What diffusers' pipelines say of the calls that they make within: "cond", "uncond"."""
        before = getattr(self._cat_threads, "context", None)
        self._cat_threads.context = name
        of_the_class = getattr(super(), "cache_context", None)  # for diffusers' own caches
        try:
            with of_the_class(name, **options) if of_the_class else nullcontext():
                yield
        finally:
            self._cat_threads.context = before

    def compile(self, *arguments: Any, **options: Any) -> None:
        """Compile the original in place, as `nn.Module.compile` does; what is done here is nothing to compile."""
        self._cat_original.compile(*arguments, **options)

    def _call(self, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
        call = self._cat_reader.read(positional, named, getattr(self._cat_threads, "context", None))
        return self._sampling().compute(call, self._cat_settings, lambda: self._cat_original(*positional, **named))

    def _sampling(self) -> CallSampling:
        if not hasattr(self._cat_threads, "sampling"):
            self._cat_threads.sampling = CallSampling()
        return self._cat_threads.sampling  # type: ignore[no-any-return]

    def __deepcopy__(self, memo: dict[int, Any]) -> WholeTransformer:
        """A stand-in with an image of its own in progress, over the same weights."""
        return type(self).around(self._cat_original, self._cat_settings)

    def extra_repr(self) -> str:
        """What `print(pipe.transformer)` says."""
        return f"settings={self._cat_settings}"


@functools.cache
def _class_for(original: Any) -> Any:
    """The class of stand-ins for a class, under its name: pipelines, LoRA and hooks look things up by that."""

    @functools.wraps(original.forward)
    def forward(self: WholeTransformer, *positional: Any, **named: Any) -> Any:
        return self._call(positional, named)

    alike = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(original.__name__, (WholeTransformer, original), {"forward": forward, **alike})


def _is_calling(name: str) -> bool:
    return name in _CALLING or "forward" in name or "backward" in name
