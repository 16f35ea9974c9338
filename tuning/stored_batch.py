"""A batch of recordings that is on disk: whose it is, and whether it is one."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cat_pruning.errors import OutputError, SettingsError
from cat_pruning.tuning.recordings import Recordings


def stored_batch(path: Path, marks: dict[str, str]) -> dict[str, Tensor] | None:
    """A batch that is on disk; None if it is not, or cannot be read: it is recorded anew.

    Files of earlier versions have no marks, and are taken for what their names say.

    Raises:
        OutputError: what is there is no file.
        SettingsError: the file is of another batch or run.
    """
    if path.exists() and not path.is_file():  # a pipe would be waited for without end
        raise OutputError(f"{path} is no file", "move it away, or give another --recordings")
    try:
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    except (OSError, SafetensorError):
        return None
    if found.keys() & marks.keys() and (other := [name for name in marks if found.get(name) != marks[name]]):
        raise _no_recording(path, f"of another batch or run: its {', '.join(other)}")
    return tensors


def check_batch(path: Path, tensors: dict[str, Tensor], runs: int, steps: int, first: Tensor | None) -> None:
    """Check that a file has what a recording has.

    Args:
        path: of the file.
        tensors: in it.
        runs: its prompts.
        steps: of each run.
        first: the first batch's timesteps; None for the first batch.

    Raises:
        SettingsError: what it has instead.
    """
    names = {"start", "parts", "final", "timesteps"}
    if tensors.keys() != names:
        raise _no_recording(
            path, f"it has {', '.join(sorted(tensors)) or 'nothing'}: expected {', '.join(sorted(names))}"
        )
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float64):
            raise _no_recording(path, f"{name} is {tensor.dtype}: expected torch.float32 or torch.float64")
    timesteps, parts = tensors["timesteps"], tuple(tensors["parts"].shape)
    if timesteps.shape != (steps,) or not timesteps.isfinite().all():
        raise _no_recording(path, f"timesteps {tuple(timesteps.shape)}: expected {steps} finite numbers")
    if first is not None and not torch.equal(timesteps, first):
        raise _no_recording(path, "its timesteps are other ones than the first batch's")
    if parts[:2] != (runs, steps):
        raise _no_recording(path, f"parts {parts}: expected ({runs}, {steps}, parts, …)")
    try:
        as_recordings("in it", tensors)
    except SettingsError as error:
        raise _no_recording(path, error.problem) from error


def _no_recording(path: Path, reason: str) -> SettingsError:
    return SettingsError(
        f"{path} is no recording of its batch ({reason})", "delete it, and its prompts are recorded again"
    )


def as_recordings(what: str, batch: dict[str, Tensor]) -> Recordings:
    """A batch as recordings.

    Raises:
        SettingsError: it is none; `what` begins the message.
    """
    try:
        return Recordings(start=batch["start"], parts=batch["parts"], final=batch["final"])
    except SettingsError as error:
        raise SettingsError(f"{what}: {error.problem}", error.remedy) from error
