"""Recordings of a real pipeline, and its calls replayed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, PixArtSigmaPipeline
from safetensors.torch import load_file, save_file

from cat_pruning.engines.step_engine import StepEngine
from cat_pruning.errors import OutputError, SettingsError
from cat_pruning.evaluation.pool import LocalPool
from cat_pruning.models import miniatures
from cat_pruning.runtime.transformer import CatTransformer
from cat_pruning.settings import PruneSettings
from cat_pruning.tools.generate import GenerateConfig
from cat_pruning.tuning.guidance import check_parts, parts_of
from cat_pruning.tuning.recorder import RecordedRun, record
from cat_pruning.tuning.replay import Replay
from cat_pruning.tuning.scheduler_matrix import scheduler_matrix
from cat_pruning.tuning.worker import Tuner

RUN = RecordedRun(
    bundle="0" * 64,
    engine="onnxruntime",
    scheduler={},
    steps=4,
    prompts=("a red circle", "a blue star", "a white ring"),
    batch=2,
    seed=7,
    height=64,
    width=64,
    guidance_scale=3.0,
)
TEXT: dict[str, Any] = {"max_sequence_length": 24}


def local(pipe: Any, text: dict[str, Any] = TEXT) -> LocalPool[Tuner]:
    """A pipeline in this process, of which nobody asks what it is."""
    about: Any = None
    return LocalPool(Tuner(about=about, pipe=pipe, text_arguments=text))


def calls(run: RecordedRun, text: dict[str, Any] = TEXT) -> list[GenerateConfig]:
    return [dataclasses.replace(config, text_arguments=text) for config in run.configs()]


NAMES = ("batch-0000.safetensors", "batch-0001.safetensors")
SCHEDULED: Any = SimpleNamespace(transformer=SimpleNamespace(settings=PruneSettings()))  # for what calls no model


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings of noise, as `record` leaves them."""
    directory = tmp_path_factory.mktemp("recorded")
    (directory / "run.json").write_text(json.dumps(RUN.to_dict()))
    for name, config in zip(NAMES, calls(RUN), strict=True):
        runs = len(config.prompts)
        parts = torch.randn(runs, 4, 2, 3, generator=torch.Generator().manual_seed(config.seed))
        tensors = {
            "start": parts[:, 0, 0],
            "parts": parts,
            "final": parts[:, 1, 0],
            "timesteps": torch.arange(4.0).flip(0),
        }
        tensors = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
        save_file(tensors, directory / name, metadata=RUN.marks(config))
    return directory


@pytest.fixture
def pipe(engines: dict[str, StepEngine], drop_in: Any) -> Any:
    return drop_in(engines["onnxruntime"])


@pytest.mark.parametrize(("guidance_scale", "num_parts"), [(3.0, 2), (1.0, 1)])
def test_replayed_at_the_recorded_latents_it_is_what_was_recorded(
    pipe: Any, tmp_path: Path, guidance_scale: float, num_parts: int
) -> None:
    run = dataclasses.replace(RUN, guidance_scale=guidance_scale)
    done: list[int] = []
    recorded = record(local(pipe), run, tmp_path, done.append)
    assert done == [2, 1]
    assert recorded.recordings.parts.shape[:3] == (3, 4, num_parts)
    replay = Replay(pipe, calls(run), recorded.timesteps)
    matrix = scheduler_matrix(replay.scheduler)
    recorded.recordings.check(matrix)
    for step in (3, 1, 0):  # in any order
        found = replay(step, recorded.recordings.states(matrix, step))
        torch.testing.assert_close(found, recorded.recordings.parts[:, step], rtol=0, atol=1e-4)
    some = replay(1, recorded.recordings.states(matrix, 1)[:2])  # the first call's only
    torch.testing.assert_close(some, recorded.recordings.parts[:2, 1], rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of numpy, where the scheduler makes its sigmas
def test_pixart_s_calls_and_its_scheduler_with_memory(tmp_path: Path) -> None:
    """Its pipeline passes the latents without a name."""
    pipe = PixArtSigmaPipeline.from_pretrained(miniatures()["pixart-mini"], dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer = CatTransformer.from_model(pipe.transformer)
    options = {"use_resolution_binning": False, "clean_caption": False}
    recorded = record(local(pipe, options), RUN, tmp_path, lambda count: None)
    replay = Replay(pipe, calls(RUN, options), recorded.timesteps)
    matrix = scheduler_matrix(replay.scheduler)
    recorded.recordings.check(matrix)
    found = replay(2, recorded.recordings.states(matrix, 2))
    torch.testing.assert_close(found, recorded.recordings.parts[:, 2], rtol=0, atol=1e-3)


def test_what_is_on_disk_is_not_recorded_again(pipe: Any, tmp_path: Path) -> None:
    first = record(local(pipe), RUN, tmp_path, lambda count: None)
    (tmp_path / "batch-0001.safetensors").write_bytes(b"half of it")
    calls: list[int] = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    again = record(local(pipe), RUN, tmp_path, lambda count: None)
    assert len(calls) == 4  # the damaged batch's
    torch.testing.assert_close(again.recordings.parts, first.recordings.parts)
    assert again.timesteps == first.timesteps


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: {"final": t["final"] / 0.0}, r"recordings \[0\] have infinities or NaNs"),
        (lambda t: {"parts": t["parts"][:, :2]}, r"parts \(1, 2, .*expected \(1, 4, parts"),
        (
            lambda t: {name: t[name][:0] for name in ("start", "parts", "final")},
            r"parts \(0, 4, .*expected \(1, 4, parts",
        ),
        (lambda t: {"start": t["start"][:, 1:]}, "of a start"),
        (lambda t: {"start": t["start"].int()}, "start is torch.int32: expected torch.float32"),
        (lambda t: {"timesteps": t["timesteps"][1:]}, r"timesteps \(3,\): expected 4"),
        (lambda t: {"timesteps": t["timesteps"][None]}, r"timesteps \(1, 4\): expected 4"),
        (lambda t: {"timesteps": t["timesteps"] / 0.0}, "expected 4 finite"),
        (lambda t: {"timesteps": t["timesteps"] + 1.0}, "other ones than the first batch's"),
        (lambda t: {"more": t["start"]}, "it has final, more, parts, start, timesteps: expected final"),
    ],
)
@pytest.mark.parametrize("marked", [True, False])
def test_a_batch_on_disk_that_no_run_leaves_is_named(
    recorded: Path, tmp_path: Path, change: Any, says: str, marked: bool
) -> None:
    """A former version's file, too, which does not say whose it is."""
    stored = load_file(recorded / NAMES[1])
    for name in ("run.json", NAMES[0]):
        shutil.copy(recorded / name, tmp_path)
    config = calls(RUN)[1]
    changed = {
        name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in (stored | change(stored)).items()
    }
    save_file(changed, tmp_path / NAMES[1], metadata=RUN.marks(config) if marked else None)
    with pytest.raises(SettingsError, match=rf"{NAMES[1]} is no recording of its batch \(.*{says}.*; delete it"):
        record(local(SCHEDULED), RUN, tmp_path, lambda count: None)


@pytest.mark.parametrize(
    ("run", "names", "says"),
    [
        (
            dataclasses.replace(RUN, prompts=(*RUN.prompts, "a bar")),
            NAMES[::-1],
            "of another batch or run: its run, prompts, seed",
        ),
        (RUN, (NAMES[1], NAMES[1]), "of another batch or run: its prompts, seed"),
        (dataclasses.replace(RUN, guidance_scale=4.0), NAMES, "of another batch or run: its run"),
    ],
)
def test_a_batch_of_others_is_named(
    recorded: Path, tmp_path: Path, run: RecordedRun, names: tuple[str, ...], says: str
) -> None:
    for source, name in zip(names, NAMES, strict=True):
        shutil.copy(recorded / source, tmp_path / name)
    (tmp_path / "run.json").write_text(json.dumps(run.to_dict()))
    with pytest.raises(SettingsError, match=f"{NAMES[0]} is no recording of its batch .{says}"):
        record(local(SCHEDULED), run, tmp_path, lambda count: None)


def test_what_is_no_file_is_not_recorded_over(recorded: Path, tmp_path: Path) -> None:
    shutil.copy(recorded / "run.json", tmp_path)
    (tmp_path / NAMES[0]).mkdir()
    with pytest.raises(OutputError, match=f"{NAMES[0]} is no file; move it away"):
        record(local(SCHEDULED), RUN, tmp_path, lambda count: None)


def test_a_run_file_that_is_damaged_is_named(pipe: Any, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(OutputError, match=r"has run\.json, not listed by the run\.json of recordings"):
        record(local(pipe), RUN, tmp_path, lambda count: None)


def test_a_scheduler_of_second_order_is_refused(engines: dict[str, StepEngine], drop_in: Any, tmp_path: Path) -> None:
    pipe = drop_in(engines["onnxruntime"], scheduler=FlowMatchHeunDiscreteScheduler)
    with pytest.raises(SettingsError, match="FlowMatchHeunDiscreteScheduler took 7 steps with 4 noise levels for 4"):
        record(local(pipe), RUN, tmp_path, lambda count: None)
    assert not [*tmp_path.glob("batch-*")]


def test_other_guidance_is_refused(pipe: Any, tmp_path: Path) -> None:
    text = TEXT | {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 1.0}
    with pytest.raises(SettingsError, match=r"called the transformer 7 times in 4 steps"):
        record(local(pipe, text), RUN, tmp_path, lambda count: None)


def test_guidance_that_is_rescaled_is_refused() -> None:
    noise, latents = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 3)
    parts = parts_of(noise, latents, 3.0)
    check_parts(parts, noise[:2] + 3.0 * (noise[2:] - noise[:2]), torch.float32, None)
    with pytest.raises(SettingsError, match="does not combine the model's outputs as plain guidance does"):
        check_parts(parts, 0.9 * noise[2:], torch.float32, None)


def test_the_pipeline_is_as_it_was(pipe: Any, tmp_path: Path) -> None:
    record(local(pipe), RUN, tmp_path, lambda count: None)
    Replay(pipe, calls(RUN), (1000.0, 667.0, 334.0, 1.0))
    assert "step" not in vars(pipe.scheduler)
    assert not pipe.transformer._forward_hooks
    assert not pipe.transformer._forward_pre_hooks
