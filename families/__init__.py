"""The model families that cat-pruning knows. A new one is a module here and a line below, or `register` elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from cat_pruning.errors import CheckpointError, SettingsError
from cat_pruning.families.configs import check_config
from cat_pruning.families.family import Family
from cat_pruning.families.flux import Flux
from cat_pruning.families.pixart import PixArt
from cat_pruning.families.sd3 import StableDiffusion3

FAMILIES: list[type[Family]] = [StableDiffusion3, PixArt, Flux]

_Known = TypeVar("_Known", bound=type[Family])


def register(family: _Known) -> _Known:
    """Make a family of your own known in this process; also a class decorator. Defined again, it takes its own place.

    `CatTransformer.from_model` takes any class; an export finds it by its name in diffusers, in a whole pipeline.

    Raises:
        SettingsError: its name or its transformer's class is another family's.
    """
    others = [other for other in FAMILIES if _place(other) != _place(family)]
    for other in others:
        if family.name == other.name or family.transformer_class == other.transformer_class:
            raise SettingsError(
                f"the family {family.name!r} of {family.transformer_class}: the name or the class is "
                f"{other.__name__}'s",
                "choose another name",
            )
    FAMILIES[:] = [*others, family]
    return family


def _place(family: type[Family]) -> tuple[str, str]:
    """Where a class is defined: the same for a cell of a notebook that runs again."""
    return family.__module__, family.__qualname__


def family_of(transformer: Any) -> Family:
    """The family of a diffusers transformer, bound to its config.

    Raises:
        CheckpointError: no family has its class.
    """
    return family_of_class(type(transformer).__name__)(transformer.config)


def family_of_class(transformer_class: str) -> type[Family]:
    """The family whose checkpoints name `transformer_class`.

    Raises:
        CheckpointError: no family does.
    """
    for family in FAMILIES:
        if family.transformer_class == transformer_class:
            return family
    known = ", ".join(family.transformer_class for family in FAMILIES)
    raise CheckpointError(f"a transformer of class {transformer_class} is not supported; supported are {known}")


def is_known(transformer_class: str) -> bool:
    """Whether a family has this class."""
    return any(family.transformer_class == transformer_class for family in FAMILIES)


def family_named(name: str, config: Mapping[str, Any]) -> Family:
    """The family called `name`, bound to a transformer's config, as a manifest has both.

    Raises:
        CheckpointError: there is none, or the config is not one of it.
    """
    family = family_class_named(name)
    check_config(family.config_model, family.transformer_class, config)
    return family(config)


def family_class_named(name: str) -> type[Family]:
    """The family called `name`.

    Raises:
        CheckpointError: there is none.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise CheckpointError(f"model family {name!r} is not known to this version of cat-pruning; known are {known}")
