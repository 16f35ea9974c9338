"""Where the jobs of cat-eval and cat-tune are done: in this process, or by workers elsewhere.

A *worker* has a bundle's pipeline loaded, and a *job* is a batch of prompts and what is to be made of them. A worker
tells what it finds piece by piece. The tool itself takes the pieces: it alone writes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from cat_pruning.evaluation.cluster import Cluster

if TYPE_CHECKING:  # it imports torch
    from cat_pruning.evaluation.about import About

Tell = Callable[[Any], None]  # called with a piece of what a job finds
Told = Callable[[int, Any], None]  # called with a job's number and a piece of what it found
JobT = TypeVar("JobT")


class Worker(Protocol):
    """What has a pipeline loaded."""

    @property
    def about(self) -> About:
        """What a tool has to know of it."""


WorkerT = TypeVar("WorkerT", bound=Worker)
WorkerT_co = TypeVar("WorkerT_co", bound=Worker, covariant=True)
Recipe = Callable[[], WorkerT]
"""Loads a worker. It and the jobs can be pickled, and depend on nothing of the process that they were made in."""
Work = Callable[[WorkerT, JobT, Tell], None]
"""Does a job. It is a function of a module, and tells the same pieces in the same order whoever does the job."""


class Pool(Protocol[WorkerT_co]):
    """Workers of one kind.

    Attributes:
        size: how many jobs are done at once, at most.
        about: what all its workers have loaded.
    """

    @property
    def size(self) -> int: ...  # noqa: D102
    @property
    def about(self) -> About: ...  # noqa: D102

    def run(self, work: Callable[[WorkerT_co, JobT, Tell], None], jobs: Sequence[JobT], told: Told) -> None:
        """Do jobs, of each of which every piece is told once, in its order; those of several jobs may mix.

        Raises:
            CatError: of a job, of `told`, or of a worker that cannot be had.
        """


@dataclass(frozen=True, slots=True)
class LocalPool(Generic[WorkerT]):
    """One worker, in this process: a job after the other."""

    worker: WorkerT
    size: int = 1

    @property
    def about(self) -> About:
        """As the worker says."""
        return self.worker.about

    def run(self, work: Work[WorkerT, JobT], jobs: Sequence[JobT], told: Told) -> None:
        """Do jobs. What is told is taken before the job goes on."""
        for number, job in enumerate(jobs):
            work(self.worker, job, functools.partial(told, number))


@contextmanager
def pool_of(
    recipe: Recipe[WorkerT], cluster: Cluster | None, waits: Callable[[str], None], say: Callable[[str], None]
) -> Iterator[Pool[WorkerT]]:
    """Workers of a recipe, the first of them loaded.

    Args:
        recipe: of every worker.
        cluster: where they are; None: one in this process.
        waits: called with what is waited for, until the first is loaded.
        say: called with what happened to a worker later.

    Raises:
        CatError: of the recipe.
        InstallationError, ServerError, SettingsError: as `RayPool`.
    """
    if cluster is None:
        waits("Load the bundle …")
        yield LocalPool(recipe())
        return
    from cat_pruning.evaluation.ray_pool import connected

    with connected(recipe, cluster, waits, say) as pool:
        yield pool
