"""What computes for `cat-tune`: a bundle's pipeline, by the scheduler that is asked for."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.errors import SettingsError
from cat_pruning.evaluation.about import About
from cat_pruning.families import family_named
from cat_pruning.runtime.pipeline import load_pipeline
from cat_pruning.settings import PruneSettings
from cat_pruning.tools.generate import GenerateConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuner:
    """A worker of `cat_pruning.evaluation.pool`.

    Attributes:
        about: the pipeline.
        pipe: over a bundle; its settings are changed.
        text_arguments: passed to the pipeline's call as they are.
    """

    about: About
    pipe: Any
    text_arguments: dict[str, Any]

    def call(self, config: GenerateConfig) -> GenerateConfig:
        """A call, as this pipeline takes it."""
        return dataclasses.replace(config, text_arguments=self.text_arguments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Loads a `Tuner`.

    Attributes:
        bundle: its directory, absolute. engine: that computes.
        scheduler: a class of diffusers, for the pipeline's own; None: that.

    Raises:
        CatError: as `load_pipeline` and `scheduler_of`.
    """

    bundle: Path
    engine: str
    scheduler: str | None = None

    def __call__(self) -> Tuner:
        """Load it."""
        bundle = Bundle.open(self.bundle)
        pipe = load_pipeline(bundle.path, self.engine, settings=PruneSettings())
        pipe.set_progress_bar_config(disable=True)
        if self.scheduler is not None:
            pipe.scheduler = scheduler_of(self.scheduler, pipe.scheduler)
        manifest = bundle.manifest
        text = family_named(manifest.family, manifest.transformer_config).pipeline_arguments(
            pipe, manifest.geometry.text_length
        )
        return Tuner(about=About.of(bundle, pipe), pipe=pipe, text_arguments=text)


def scheduler_of(name: str, before: Any) -> Any:
    """The scheduler of this class, with the config of the one before.

    Raises:
        SettingsError: diffusers has none of this name, it cannot be made so, or is not stepped as a pipeline steps one.
    """
    import diffusers

    found: Any = getattr(diffusers, name, None)
    is_one = inspect.isclass(found) and issubclass(found, diffusers.SchedulerMixin) and hasattr(found, "step")
    if not is_one:
        raise SettingsError(f"--scheduler {name}: diffusers has no such scheduler")
    needed = [each.name for each in inspect.signature(found.step).parameters.values() if each.default is each.empty]
    if strange := [each for each in needed if each not in ("self", "model_output", "timestep", "sample", "kwargs")]:
        raise SettingsError(f"--scheduler {name}: its steps need {', '.join(strange)}, which no such pipeline has")
    try:
        return found.from_config(before.config)
    except (TypeError, ValueError, NotImplementedError) as error:  # arguments that it has no defaults of
        raise SettingsError(f"--scheduler {name}: it cannot be made from the pipeline's ({error})") from error
