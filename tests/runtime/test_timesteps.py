from __future__ import annotations

import pytest
import torch

from cat_pruning.errors import SettingsError
from cat_pruning.runtime.timesteps import PipelineSchedule, TimestepReader


def read(reader: TimestepReader, timestep: torch.Tensor) -> tuple[float, PipelineSchedule | None]:
    level = reader.read(timestep)
    return level.timestep, level.schedule


def schedule(*values: float) -> torch.Tensor:
    return torch.tensor(values or (1000.0, 750.0, 500.0, 250.0))


def test_views_of_a_schedule_are_looked_up() -> None:
    timesteps = schedule()
    reader = TimestepReader()
    known = reader.read(timesteps[0]).schedule
    assert known is not None
    assert known.values == timesteps.tolist()
    for rows in (1, 4):
        for index, timestep in enumerate(timesteps):  # as pipelines do
            for level in (reader.read(timestep.expand(rows)), reader.read(timestep)):
                assert level == (timesteps[index].item(), torch.finfo(torch.float32).eps, known, index)
                assert level.is_last == (index == 3)


def test_a_known_schedule_is_not_copied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One synchronisation per image: after the first call, reading must not touch the values."""
    timesteps = schedule()
    reader = TimestepReader()
    reader.read(timesteps[0].expand(2))
    for name in ("cpu", "tolist", "item", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("copied to the host"))
    assert [reader.read(timestep.expand(2)).timestep for timestep in timesteps] == [1000.0, 750.0, 500.0, 250.0]


def test_a_slice_of_a_schedule_is_read_at_its_own_place() -> None:
    """Image-to-image starts late."""
    timesteps = schedule()[2:]
    reader = TimestepReader()
    assert [reader.read(timestep.expand(2)).timestep for timestep in timesteps] == [500.0, 250.0]


def test_a_new_schedule_is_recognised() -> None:
    reader = TimestepReader()
    first, second = schedule(), schedule()  # of the same values
    one, other = reader.read(first[0].expand(2)).schedule, reader.read(second[2].expand(2)).schedule
    assert one is not other
    assert read(reader, second[3].expand(2)) == (250.0, other)
    assert read(reader, first[1].expand(2)) == (750.0, one)  # as an image that goes on after another in its callback


def test_a_new_schedule_is_recognised_when_the_old_one_is_gone() -> None:
    """Its memory must not be taken by the next one, which would then look the same."""
    reader = TimestepReader()
    before: list[PipelineSchedule | None] = []
    for _ in range(20):
        timesteps = schedule()
        seen = {reader.read(timestep.expand(2)).schedule for timestep in timesteps}
        (one,) = seen
        assert one is not None
        assert not one.is_gone
        assert one not in before
        before.append(one)
        del timesteps
        assert one.is_gone


def test_a_schedule_changed_in_place_is_a_new_one() -> None:
    timesteps = schedule()
    reader = TimestepReader()
    before = reader.read(timesteps[0].expand(2)).schedule
    timesteps.copy_(schedule(800.0, 600.0, 400.0, 200.0))
    after = reader.read(timesteps[0].expand(2))
    assert after.timestep == 800.0
    assert after.schedule is not before
    assert read(reader, timesteps[1].expand(2)) == (600.0, after.schedule)


def test_fresh_tensors_are_no_schedule() -> None:
    """Pipelines that compute t / 1000 or t.to(dtype): the values are read, and tell nothing of a new image."""
    reader = TimestepReader()
    for value in (1.0, 0.75, 0.5, 0.25):
        for timestep in (torch.full((2,), value), torch.tensor(value).expand(2), torch.tensor([value])):
            level = reader.read(timestep)
            assert (level.timestep, level.schedule, level.expected, level.is_last) == (value, None, [], False)


@pytest.mark.parametrize("timesteps", [schedule(500.0, 250.0), schedule()[1:3], schedule()[::2]])
def test_rows_at_different_timesteps_are_refused(timesteps: torch.Tensor) -> None:
    """They were computed as the first row's."""
    with pytest.raises(SettingsError, match=r"different timesteps: .*250"):
        TimestepReader().read(schedule(500.0, 250.0))
    with pytest.raises(SettingsError, match="rows of one call are at different timesteps"):
        TimestepReader().read(timesteps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_every_dtype(dtype: torch.dtype) -> None:
    reader = TimestepReader()
    timesteps = schedule(1000.0, 500.0, 250.0).to(dtype)
    assert [reader.read(timestep.expand(3)).timestep for timestep in timesteps] == [1000.0, 500.0, 250.0]


def test_inference_tensors() -> None:
    reader = TimestepReader()
    with torch.inference_mode():
        first, second = schedule(), schedule()
        levels = [reader.read(timestep.expand(2)) for timestep in first]
    assert [level.timestep for level in levels] == first.tolist()
    assert levels[0].schedule is levels[1].schedule is not reader.read(second[0]).schedule
