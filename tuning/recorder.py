"""Runs of the full model, recorded on disk: made a batch at a time, and gone on with after an interruption.

DIR/run.json                 all that the recordings depend on; a run goes on only under the same
DIR/batch-0000.safetensors   start, parts, final (float32) and the transformer's timesteps, of a batch of prompts; its
                             metadata says which: the run's digest, the prompts, the seed
DIR/tune.json, tune.png      what `report` writes when all is done

Only these are ever deleted or written over, and only where run.json is a run's: it is written first and deleted last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import pydantic
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cat_pruning.errors import OutputError, SettingsError
from cat_pruning.evaluation.pool import Pool, Tell
from cat_pruning.files import check_writable_directory, read_json, replacing, write_whole
from cat_pruning.ours import check_files, check_ours, remove_ours
from cat_pruning.tools.generate import GenerateConfig, generate, never_pruned
from cat_pruning.tuning.guidance import check_parts, parts_of
from cat_pruning.tuning.recordings import Recordings
from cat_pruning.tuning.stored_batch import as_recordings, check_batch, stored_batch
from cat_pruning.tuning.worker import Tuner

RUN, NUMBERS, PICTURE = "run.json", "tune.json", "tune.png"
_PLACES: Final = (RUN, NUMBERS, PICTURE, "batch-*.safetensors")
_REMEDY: Final = "give another --recordings"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRun:
    """All that recordings depend on, as JSON types.

    Attributes:
        bundle: `Manifest.digest`. engine: what computed.
        scheduler: its class and config. steps: of a run.
        prompts, batch, seed: run i starts from the noise of seed + i.
        height, width, guidance_scale: of the pipeline's call.
    """

    bundle: str
    engine: str
    scheduler: dict[str, Any]
    steps: int
    prompts: tuple[str, ...]
    batch: Annotated[int, Field(ge=1)]
    seed: int
    height: int
    width: int
    guidance_scale: float

    def configs(self) -> list[GenerateConfig]:
        """The pipeline's calls, one a batch, as far as they do not depend on the pipeline."""
        return [
            GenerateConfig(
                prompts=self.prompts[first : first + self.batch],
                height=self.height,
                width=self.width,
                steps=self.steps,
                guidance_scale=self.guidance_scale,
                seed=self.seed + first,
            )
            for first in range(0, len(self.prompts), self.batch)
        ]

    def marks(self, config: GenerateConfig) -> dict[str, str]:
        """What a batch's file says of itself, so that no other is taken for it."""
        run = hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()
        return {"run": run, "prompts": json.dumps(config.prompts), "seed": str(config.seed)}

    def files(self) -> set[str]:
        """The files in its directory: what may be deleted and written over."""
        return {RUN, NUMBERS, PICTURE, *(batch_name(n) for n in range(math.ceil(len(self.prompts) / self.batch)))}

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))  # type: ignore[no-any-return]


_RUN = pydantic.TypeAdapter(RecordedRun)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recorded:
    """Recordings, and the timesteps that the transformer was called with: one a step."""

    recordings: Recordings
    timesteps: tuple[float, ...]


def record(pool: Pool[Tuner], run: RecordedRun, directory: Path, advance: Callable[[int], None]) -> Recorded:
    """Record what `directory` does not hold yet. Each batch is written whole or not at all.

    Args:
        pool: its workers record.
        run: what to record.
        directory: made if it is not there.
        advance: called with the number of prompts that were recorded, or found.

    Raises:
        SettingsError: the directory holds the recordings of another run, or a file in it those of other prompts, or
            what no run leaves; the scheduler calls the model more than once a step; the pipeline has other guidance
            than the plain one.
        OutputError: it cannot be written, or holds files that no run lists where the recordings would be.
        CatError: as `Pool.run`.
    """
    _begin(directory, run)
    configs = run.configs()
    batches: dict[int, dict[str, Tensor]] = {}

    def timesteps() -> Tensor | None:
        return batches[min(batches)]["timesteps"] if batches else None

    def take(number: int, tensors: dict[str, Tensor]) -> None:
        batches[number] = tensors
        advance(len(configs[number].prompts))

    for number, config in enumerate(configs):
        if (tensors := stored_batch(directory / batch_name(number), run.marks(config))) is not None:
            check_batch(directory / batch_name(number), tensors, len(config.prompts), config.steps, timesteps())
            take(number, tensors)
    missing = [number for number in range(len(configs)) if number not in batches]

    def keep(job: int, tensors: dict[str, Tensor]) -> None:
        number = missing[job]
        path = directory / batch_name(number)
        if (first := timesteps()) is not None and not torch.equal(tensors["timesteps"], first):
            raise SettingsError(
                f"{directory} holds recordings of other timesteps than are recorded now",
                f"{_REMEDY}, or --force to record anew",
            )
        try:
            with replacing(path) as part:
                save_file(tensors, part, metadata=run.marks(configs[number]))
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{path} cannot be written ({error})", "make room") from error
        take(number, tensors)

    pool.run(record_batch, [configs[number] for number in missing], keep)
    ordered = [batches[number] for number in range(len(configs))]
    recordings = Recordings.joined(
        [as_recordings(f"batch {number} of the prompts", batch) for number, batch in enumerate(ordered)]
    )
    return Recorded(recordings=recordings, timesteps=tuple(ordered[0]["timesteps"].tolist()))


def batch_name(number: int) -> str:
    """The file of a batch of recordings."""
    return f"batch-{number:04d}.safetensors"


def existing_run(directory: Path, *, force: bool = False) -> RecordedRun | None:
    """The run whose recordings are in a directory, which need not exist; None where there are none.

    Args:
        directory: of the recordings.
        force: whether what is there is to be deleted.

    Raises:
        OutputError: it cannot be written, or has files that no run lists where recordings would be.
    """
    try:
        check_writable_directory(directory)
        run = _RUN.validate_json(json.dumps(read_json(directory / RUN)), strict=True)
    except FileNotFoundError:
        run = None
    except OSError as error:
        raise OutputError(f"{directory} cannot be written ({error.strerror or error})", _REMEDY) from error
    except ValueError:  # it is no run's
        run = None
    if run is None or force:
        check_ours(directory, run.files() if run else set(), _PLACES, f"the {RUN} of recordings", _REMEDY)
    check_files(directory, run.files() if run else {RUN, NUMBERS, PICTURE}, _REMEDY)
    return run


def forget(directory: Path) -> None:
    """Delete the recordings in a directory and what was found with them, and nothing else.

    Raises:
        OutputError: they cannot be deleted, or there are files that no run lists; of these nothing was deleted.
    """
    run = existing_run(directory, force=True)
    if run is None:
        return
    try:
        remove_ours(directory, run.files(), _PLACES, RUN)
    except OSError as error:
        raise OutputError(f"{directory} cannot be cleared ({error.strerror or error})", _REMEDY) from error


def _begin(directory: Path, run: RecordedRun) -> None:
    found, fields = existing_run(directory), run.to_dict()
    held = found.to_dict() if found else fields
    if other := ", ".join(sorted(name for name in fields if held[name] != fields[name])):
        raise SettingsError(
            f"{directory} holds the recordings of a run with other {other}",
            f"{_REMEDY}, or --force to record anew",
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / RUN, json.dumps(fields, indent=2) + "\n")
    except OSError as error:
        raise OutputError(f"{directory} cannot be written ({error.strerror or error})", _REMEDY) from error


def record_batch(worker: Tuner, config: GenerateConfig, tell: Tell) -> None:
    """Run the full model on a batch, and tell what `stored_batch` reads.

    Raises:
        SettingsError: the scheduler calls the model more than once a step; the pipeline has other guidance than the
            plain one.
    """
    pipe, config = worker.pipe, worker.call(config)
    settings = never_pruned(pipe.transformer.settings, config.steps)
    with recorded_steps(pipe) as steps, recorded_noise(pipe) as noises:
        run = generate(pipe, settings, config)
    if len(steps) != len(run.records) or len(steps) != config.steps:
        raise SettingsError(
            f"{type(pipe.scheduler).__name__} took {len(steps)} steps with {len(run.records)} noise levels for "
            f"{config.steps} that were asked for: expected one call of the model a step",
            "tune with a scheduler of first order or a multistep one, such as Euler's or DPM-Solver++",
        )
    if len(noises) != len(steps):
        raise SettingsError(
            f"{type(pipe).__name__} called the transformer {len(noises)} times in {len(steps)} steps: it does not "
            "combine the model's outputs as plain guidance does",
            "tune it without other guidance",
        )
    parts = [parts_of(noise, step.sample, config.guidance_scale) for noise, step in zip(noises, steps, strict=True)]
    for each, step in zip(parts, steps, strict=True):
        check_parts(each, step.output, pipe.transformer.dtype, pipe)
    tell(
        {
            "start": steps[0].sample,
            "parts": torch.stack(parts, dim=1),
            "final": steps[-1].result,
            "timesteps": torch.tensor([record.timestep for record in run.records], dtype=torch.float64),
        }
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SchedulerStep:
    """One call of a scheduler, on the CPU in float32: what it got of the model, the sample before and after."""

    output: Tensor
    sample: Tensor
    result: Tensor


@contextmanager
def recorded_steps(pipe: Any) -> Iterator[list[SchedulerStep]]:
    """A list that the calls of the pipeline's scheduler go to meanwhile."""
    scheduler, step, steps = pipe.scheduler, pipe.scheduler.step, []

    def recorded(model_output: Tensor, timestep: Any, sample: Tensor, *arguments: Any, **options: Any) -> Any:
        given = _copy(model_output), _copy(sample)  # before the scheduler may write into them
        result = step(model_output, timestep, sample, *arguments, **options)
        after = result[0] if isinstance(result, tuple) else result.prev_sample
        steps.append(SchedulerStep(output=given[0], sample=given[1], result=_copy(after)))
        return result

    scheduler.step = recorded
    try:
        yield steps
    finally:
        del scheduler.step


@contextmanager
def recorded_noise(pipe: Any) -> Iterator[list[Tensor]]:
    """A list that the outputs of the pipeline's transformer go to meanwhile, on the CPU in float32."""
    noises: list[Tensor] = []
    hook = pipe.transformer.register_forward_hook(lambda module, arguments, output: noises.append(_copy(output[0])))
    try:
        yield noises
    finally:
        hook.remove()


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)
