"""A cluster of Ray, as a command line names it, and what each worker takes of it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final, Self

from cat_pruning.errors import ServerError, SettingsError

_CONNECT_S: Final = 5.0  # that an address has to answer
_MOST_CPUS: Final = 4  # of a worker that has a GPU: for its texts, its pictures and their metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Where the workers are.

    Attributes:
        address: auto, local, HOST:PORT or ray://HOST:PORT, as `ray.init` knows them.
        workers: how many; None for one of each GPU, or of each machine where there is none.
    """

    address: str
    workers: int | None = None

    def check(self) -> None:
        """Check that a server of gRPC answers: Ray itself waits for a minute, and then ends the process.

        Raises:
            ServerError: none does.
        """
        address = os.environ.get("RAY_ADDRESS") or self.address if self.address == "auto" else self.address
        place = address.removeprefix("ray://")
        host, _, port = place.rpartition(":")
        if not port.isdecimal():  # auto, local
            return
        remedy = "give the address that ray start --head said, or auto on a machine of the cluster"
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
        except (OSError, OverflowError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ServerError(f"--ray {address}: nothing answers there ({reason})", remedy) from error
        if os.environ.get("RAY_USE_TLS", "0") == "0" and not _speaks_grpc(place):
            raise ServerError(f"--ray {address}: what answers there is not Ray", remedy)


def _speaks_grpc(place: str) -> bool:
    if find_spec("grpc") is None:  # Ray brings it with some of its extras
        return True
    import grpc

    with grpc.insecure_channel(place) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_CONNECT_S)
        except grpc.FutureTimeoutError:
            return False
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """How many workers a cluster has room for, and what each of them takes."""

    workers: int
    gpus: int
    cpus: int

    def __str__(self) -> str:
        """As people say it."""
        parts = [f"{number} {name}{'s' * (number > 1)}" for number, name in ((self.gpus, "GPU"), (self.cpus, "CPU"))]
        return " and ".join(part for part in parts if not part.startswith("0"))

    @classmethod
    def of(cls, machines: Sequence[Mapping[str, float]], workers: int | None) -> Self:
        """Divide a cluster.

        A worker has a GPU, or, where there is none, processors: all of its machine, unless more workers are wanted.
        What others take of the cluster meanwhile does not count.

        Args:
            machines: of each its resources by name, as `ray.nodes` has them.
            workers: that are wanted.

        Raises:
            ServerError: the cluster has nothing.
            SettingsError: more are wanted than it has room for.
        """
        gpus = sum(int(machine.get("GPU", 0)) for machine in machines)
        cpus = [int(machine.get("CPU", 0)) for machine in machines if machine.get("CPU", 0) >= 1]
        if not gpus and not cpus:
            raise ServerError(f"the cluster has no GPU and no CPU in {len(machines)} machines", "start its workers")
        if gpus:
            _check_room(workers, gpus, "GPUs")
            room = [(int(machine.get("GPU", 0)), int(machine.get("CPU", 0))) for machine in machines]
            count = workers or gpus
            fits = [n for n in range(1, _MOST_CPUS + 1) if sum(min(gpu, cpu // n) for gpu, cpu in room) >= count]
            return cls(workers=count, gpus=1, cpus=max(fits, default=0))
        _check_room(workers, sum(cpus), "CPUs")
        if workers is None:
            return cls(workers=len(cpus), gpus=0, cpus=min(cpus))
        fits = [n for n in range(1, max(cpus) + 1) if sum(cpu // n for cpu in cpus) >= workers]
        return cls(workers=workers, gpus=0, cpus=max(fits))


def _check_room(workers: int | None, most: int, what: str) -> None:
    if workers is not None and workers > most:
        raise SettingsError(f"--ray-workers {workers}: the cluster has {most} {what}, one or more for each worker")
