"""A pool of workers in a cluster of Ray, each an actor with the whole model.

A worker that dies is replaced, and its job begun anew by another: of what it had told already nothing is told twice.
Ray itself retries nothing, because it would not know of that. Whatever else goes wrong ends the run.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import socket
import textwrap
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic

import cat_pruning
from cat_pruning import console
from cat_pruning.errors import CatError, EngineError, InstallationError, ServerError
from cat_pruning.evaluation.cluster import Cluster, Share
from cat_pruning.evaluation.pool import JobT, Recipe, Told, Work, WorkerT
from cat_pruning.installation import require

require("--ray", "ray")
import ray  # noqa: E402  # after the line that says what is missing
from ray.exceptions import RayError, RayTaskError  # noqa: E402

if TYPE_CHECKING:  # it imports torch
    from cat_pruning.evaluation.about import About

_MOST_LOSSES: Final = 3  # workers that a job, or the loading, may lose one after another
_LONGEST_REASON: Final = 200  # characters
_log = logging.getLogger(__name__)


@ray.remote(concurrency_groups={"telling": 1})
class Host:
    """An actor: a worker, and the pieces that it told and nobody asked for yet."""

    def __init__(self) -> None:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `console.run` does, before torch is imported
        console.quiet_libraries()
        self._pieces: queue.SimpleQueue[tuple[Any] | None] = queue.SimpleQueue()

    def load(self, version: str, recipe: bytes) -> About:
        """Load the worker."""
        with _on_this_machine():
            if version != (here := cat_pruning.__version__):  # of the module: Ray copies globals with the class
                raise InstallationError(f"cat-pruning is {here}, expected {version}", "install the same everywhere")
            self._worker = pickle.loads(recipe)()
        about: About = self._worker.about
        return about

    def work(self, task: bytes) -> None:
        """Do a job; `next_piece` has what it tells. It is a pickle: one that cannot be read ends the job here."""
        try:
            with _on_this_machine():
                work, job = pickle.loads(task)
                work(self._worker, job, lambda piece: self._pieces.put((piece,)))
        finally:
            self._pieces.put(None)

    @ray.method(concurrency_group="telling")  # type: ignore[untyped-decorator]
    def next_piece(self) -> tuple[Any] | None:
        """Wait for the next piece, in a tuple; None: the job has ended."""
        return self._pieces.get()

    @ray.method(concurrency_group="telling")  # type: ignore[untyped-decorator]
    def machine(self) -> str:
        """Where it is."""
        return _machine()


def _machine() -> str:
    return f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"


@contextmanager
def _on_this_machine() -> Iterator[None]:
    """Meanwhile, errors of ours say where they were raised."""
    try:
        yield
    except CatError as error:
        raise type(error)(f"worker on {_machine()}: {error.problem}", error.remedy) from error


@dataclass(slots=True, eq=False)
class _Task(Generic[JobT]):
    """A job. told: its pieces that were passed on. heard: those of the attempt at hand. losses: workers that died."""

    number: int
    job: JobT
    told: int = 0
    heard: int = 0
    losses: int = 0


@dataclass(slots=True, eq=False)
class _Hired:
    """A worker of the pool.

    Attributes:
        actor: a handle of `Host`.
        awaited: the reference that says what happens next: of the loading, of a piece; None while it is idle.
        machine: where it is, once it is loaded.
        task: what it does. work: the reference of that.
    """

    actor: Any
    awaited: Any
    machine: str = ""
    task: _Task[Any] | None = None
    work: Any = None


class RayPool(Generic[WorkerT]):
    """Workers of one recipe. The first is loaded at once, the others when there are jobs for them.

    Args:
        recipe: of every worker.
        share: how many there are, and what each takes of the cluster.
        waits: called with what is waited for, until the first worker is loaded.
        say: called with a line where a worker was lost.

    Raises:
        CatError: of the recipe.
        ServerError: worker after worker dies.
    """

    def __init__(
        self, recipe: Recipe[WorkerT], share: Share, waits: Callable[[str], None], say: Callable[[str], None]
    ) -> None:
        self.size = share.workers
        self._recipe, self._share, self._say = pickle.dumps(recipe), share, say
        self._staff: list[_Hired] = []
        self._failed = 0  # workers that died while they loaded, one after another
        self._about: About | None = None
        while self._about is None:
            waits(f"Wait for a worker of the cluster: {share} …")
            first = self._hire()
            ray.wait([first.actor.machine.remote()])
            waits("Load the bundle …")
            self._go_on(first, deque(), lambda number, piece: None)

    @property
    def about(self) -> About:
        """What all its workers have loaded."""
        assert self._about is not None
        return self._about

    def run(self, work: Work[WorkerT, JobT], jobs: Sequence[JobT], told: Told) -> None:
        """As `Pool.run`.

        Raises:
            CatError: of a job, or of `told`.
            EngineError: a worker has loaded something else than the others.
            ServerError: worker after worker dies.
        """
        todo = deque(_Task(number, job) for number, job in enumerate(jobs))
        try:
            while unfinished := len(todo) + sum(hired.task is not None for hired in self._staff):
                while len(self._staff) < min(self.size, unfinished):
                    self._hire()
                for hired in self._staff:
                    if hired.awaited is None and todo:
                        self._begin(hired, work, todo.popleft())
                by_reference = {hired.awaited: hired for hired in self._staff if hired.awaited is not None}
                ready, _ = ray.wait(list(by_reference))
                self._go_on(by_reference[ready[0]], todo, told)
        except BaseException:
            self.close()  # nobody will ask the others for what they find
            raise

    def _hire(self) -> _Hired:
        host: Any = Host
        options = {"num_cpus": self._share.cpus, "num_gpus": self._share.gpus, "scheduling_strategy": "SPREAD"}
        actor = host.options(**options).remote()
        hired = _Hired(actor, actor.load.remote(cat_pruning.__version__, self._recipe))
        self._staff.append(hired)
        return hired

    def _begin(self, hired: _Hired, work: Work[WorkerT, JobT], task: _Task[JobT]) -> None:
        task.heard, hired.task = 0, task
        hired.work = hired.actor.work.remote(pickle.dumps((work, task.job)))
        hired.awaited = hired.actor.next_piece.remote()

    def _go_on(self, hired: _Hired, todo: deque[_Task[Any]], told: Told) -> None:
        """Take what a worker has for us."""
        try:
            if hired.task is None:
                self._take_loaded(hired, _got(hired.awaited))
            elif (piece := _got(hired.awaited)) is None:
                _got(hired.work)  # its error
                hired.task = hired.awaited = None
            else:
                hired.awaited = hired.actor.next_piece.remote()
                self._take_piece(hired.task, piece[0], told)
        except RayError as error:
            self._replace(hired, todo, error)

    def _take_loaded(self, hired: _Hired, about: About) -> None:
        hired.machine, hired.awaited, self._failed = _got(hired.actor.machine.remote()), None, 0
        self._about = self._about or about
        if different := self._about.differs(about):
            raise EngineError(
                f"the worker on {hired.machine} has another {different}, as the first has",
                "name one engine by --engine, and have the same bundle on every machine",
            )

    def _take_piece(self, task: _Task[Any], piece: Any, told: Told) -> None:
        task.heard += 1
        if task.heard > task.told:
            task.told = task.heard
            told(task.number, piece)

    def _replace(self, hired: _Hired, todo: deque[_Task[Any]], error: RayError) -> None:
        """Let a worker go that died; its job is the next to be begun."""
        _log.debug("a worker was lost", exc_info=error)
        self._staff.remove(hired)
        ray.kill(hired.actor)
        last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        reason = textwrap.shorten(last, _LONGEST_REASON, placeholder=" …")
        if hired.task is None:
            self._failed += 1
            losses, lost = self._failed, "died before it was loaded"
        else:
            hired.task.losses += 1
            todo.appendleft(hired.task)
            losses, lost = hired.task.losses, f"on {hired.machine} died; its batch is begun anew by another"
        if losses >= _MOST_LOSSES:
            raise ServerError(
                f"{losses} workers of the cluster died one after another ({reason})",
                "look at its memory, and whether cat-pruning is installed on every machine as it is here; what is done "
                "is kept",
            ) from error
        self._say(f"a worker {lost} ({reason})")

    def close(self) -> None:
        """End the workers, whatever they do."""
        while self._staff:
            ray.kill(self._staff.pop().actor)


def _got(reference: Any) -> Any:
    """What a reference stands for; what a worker raised is raised as it was.

    Raises:
        RayError: the worker, or its machine, is lost.
    """
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from error


@contextmanager
def connected(
    recipe: Recipe[WorkerT], cluster: Cluster, waits: Callable[[str], None], say: Callable[[str], None]
) -> Iterator[RayPool[WorkerT]]:
    """A pool in a cluster, which is left as it was.

    Raises:
        ServerError: there is no cluster that this Ray can talk to.
        SettingsError: the cluster has no room for so many workers.
        CatError: as `RayPool`.
    """
    waits(f"Connect to Ray, {cluster.address} …")
    _connect(cluster.address)
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        pool = RayPool(recipe, Share.of(nodes, cluster.workers), waits, say)
        try:
            yield pool
        finally:
            pool.close()
    finally:
        ray.shutdown()


def _connect(address: str) -> None:
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    shown = bool(os.environ.get("CAT_PRUNING_LOG"))
    try:
        ray.init(address=address, log_to_driver=shown, logging_level=logging.ERROR, **options)
    except (RayError, ConnectionError, RuntimeError, ValueError) as error:
        raise ServerError(
            f"--ray {address}: no cluster that this Ray {ray.__version__} can talk to ({' '.join(str(error).split())})",
            "start one by ray start --head, which says its address, of the same versions of Ray and Python; or take "
            "--ray local",
        ) from error
