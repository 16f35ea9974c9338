"""The plans of a bundle in sets: those of one builder, version and kind of GPU, one for every graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cat_pruning.bundle.schema import PlanSpec
from cat_pruning.names import TITLES, Flavour


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSet:
    """Plans that were built together.

    Attributes:
        name: of their folder, as tensorrt-11.4.0-sm90; `cat-bundle` takes it.
        plans: one for every graph, where none is missing.
    """

    name: str
    plans: tuple[PlanSpec, ...]

    @property
    def flavour(self) -> Flavour:
        """Who built them."""
        return self.plans[0].flavour

    @property
    def version(self) -> str:
        """Of the builder."""
        return self.plans[0].version

    @property
    def architectures(self) -> tuple[str, ...]:
        """Of the GPUs."""
        return self.plans[0].architectures

    @property
    def title(self) -> str:
        """In words: TensorRT 11.4.0 for sm90."""
        return f"{TITLES[self.flavour]} {self.version} for {', '.join(self.architectures)}"


def plan_sets(plans: Iterable[PlanSpec]) -> tuple[PlanSet, ...]:
    """The sets of some plans, in the order in which they were built."""
    sets: dict[tuple[str, Flavour, str, tuple[str, ...]], list[PlanSpec]] = {}
    for plan in plans:
        folder = plan.file.rpartition("/")[0]
        sets.setdefault((folder, plan.flavour, plan.version, plan.architectures), []).append(plan)
    return tuple(PlanSet(name=folder.rpartition("/")[2], plans=tuple(each)) for (folder, *_), each in sets.items())
