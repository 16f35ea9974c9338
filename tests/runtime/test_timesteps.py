from __future__ import annotations

import pytest
import torch

from cat_pruning.runtime.timesteps import TimestepReader


def schedule(*values: float) -> torch.Tensor:
    return torch.tensor(values or (1000.0, 750.0, 500.0, 250.0))


def test_views_of_a_schedule_are_looked_up() -> None:
    timesteps = schedule()
    reader = TimestepReader()
    for rows in (1, 4):
        for index, timestep in enumerate(timesteps):  # as pipelines do
            assert reader.read(timestep.expand(rows)) == (timesteps[index].item(), False)
            assert reader.read(timestep) == (timesteps[index].item(), False)


def test_a_known_schedule_is_not_copied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """One synchronisation per image: after the first call, reading must not touch the values."""
    timesteps = schedule()
    reader = TimestepReader()
    reader.read(timesteps[0].expand(2))
    for name in ("cpu", "tolist", "item", "__float__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("copied to the host"))
    assert [reader.read(timestep.expand(2))[0] for timestep in timesteps] == [1000.0, 750.0, 500.0, 250.0]


def test_a_slice_of_a_schedule_is_read_at_its_own_place() -> None:
    """Image-to-image starts late."""
    timesteps = schedule()[2:]
    reader = TimestepReader()
    assert [reader.read(timestep.expand(2))[0] for timestep in timesteps] == [500.0, 250.0]


def test_a_new_schedule_is_recognised() -> None:
    reader = TimestepReader()
    first, second = schedule(), schedule()  # of the same values
    assert reader.read(first[0].expand(2)) == (1000.0, False)
    assert reader.read(first[1].expand(2)) == (750.0, False)
    assert reader.read(second[2].expand(2)) == (500.0, True)
    assert reader.read(second[3].expand(2)) == (250.0, False)


def test_a_new_schedule_is_recognised_when_the_old_one_is_gone() -> None:
    """Its memory must not be taken by the next one, which would then look the same."""
    reader = TimestepReader()
    for _ in range(20):
        timesteps = schedule()
        is_new = [reader.read(timestep.expand(2))[1] for timestep in timesteps]
        del timesteps
        assert not any(is_new[1:])
    assert is_new[0]


def test_a_schedule_changed_in_place_is_a_new_one() -> None:
    timesteps = schedule()
    reader = TimestepReader()
    reader.read(timesteps[0].expand(2))
    timesteps.copy_(schedule(800.0, 600.0, 400.0, 200.0))
    assert reader.read(timesteps[0].expand(2)) == (800.0, True)
    assert reader.read(timesteps[1].expand(2)) == (600.0, False)


def test_fresh_tensors_are_no_schedule() -> None:
    """Pipelines that compute t / 1000 or t.to(dtype): the values are read, and tell nothing of a new image."""
    reader = TimestepReader()
    for value in (1.0, 0.75, 0.5, 0.25):
        assert reader.read(torch.full((2,), value)) == (value, False)
        assert reader.read(torch.tensor(value).expand(2)) == (value, False)
        assert reader.read(torch.tensor([value])) == (value, False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_every_dtype(dtype: torch.dtype) -> None:
    reader = TimestepReader()
    timesteps = schedule(1000.0, 500.0, 250.0).to(dtype)
    assert [reader.read(timestep.expand(3))[0] for timestep in timesteps] == [1000.0, 500.0, 250.0]


def test_inference_tensors() -> None:
    reader = TimestepReader()
    with torch.inference_mode():
        first, second = schedule(), schedule()
        assert [reader.read(timestep.expand(2)) for timestep in first][:2] == [(1000.0, False), (750.0, False)]
    assert reader.read(second[0]) == (1000.0, True)
