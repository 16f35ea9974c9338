"""The timeline of one image over a session that only remembers what it was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from cat_pruning.engines.session_pool import SessionPool
from cat_pruning.engines.step_engine import StepEngine, StepSession
from cat_pruning.runtime.image import Memory
from cat_pruning.runtime.sampling import Sampling
from cat_pruning.runtime.selection import kmeans, selection
from cat_pruning.runtime.selection.selector import guiding_rows
from cat_pruning.runtime.step_call import StepCall
from cat_pruning.schedule import Schedule
from cat_pruning.settings import PruneSettings
from cat_pruning.step_io import StepDims

SETTINGS = PruneSettings(keep_ratio=0.4, full_steps=4, num_clusters=6)
TIMESTEPS = torch.linspace(1000, 100, 10)


class NoiseSession(StepSession):
    """Noise of its own for every call; like an engine's, unkept tokens keep theirs."""

    def __init__(self, engine: StepEngine) -> None:
        super().__init__(engine)
        self.begun: list[dict[str, Tensor]] = []
        self.expected: list[list[float]] = []
        self.timesteps: list[float] = []
        self.kept: list[Tensor] = []
        self.noises: list[Tensor] = []

    def _allocate(self, dims: StepDims) -> None:
        pass

    def _begin(self, dims: StepDims, timesteps: Sequence[float]) -> None:
        self.begun.append({name: tensor.clone() for name, tensor in self._inputs.items()})
        self.expected.append(list(timesteps))

    def _load(self, timestep: float) -> None:
        self.timesteps.append(timestep)

    def _run(self, keep_indices: Tensor) -> None:
        family, noise = self.engine.family, self._noise
        new = torch.randn(noise.shape, generator=torch.Generator().manual_seed(len(self.noises)))
        # Whether a latent pixel's token is kept, by way of a latent that holds every pixel's own number.
        pixels = torch.arange(noise[0].numel()).reshape(1, *noise.shape[1:]).expand(noise.shape)
        tokens = family.noise_tokens(pixels)
        kept = torch.zeros(noise.shape[0], noise[0].numel(), dtype=torch.bool)
        for row, indices in enumerate(keep_indices.long()):
            kept[row, tokens[row, indices].flatten()] = True
        self._noise.copy_(torch.where(kept.view(noise.shape), new, noise))
        self.kept.append(keep_indices.clone())
        self.noises.append(self._noise.clone())


@pytest.fixture
def sessions(engines: dict[str, StepEngine], monkeypatch: pytest.MonkeyPatch) -> list[NoiseSession]:
    """Those that the engine made: the image's first, then one for every side branch."""
    made: list[NoiseSession] = [NoiseSession(engines["torch"])]
    waiting = list(made)

    def make() -> NoiseSession:
        if waiting:
            return waiting.pop()
        made.append(NoiseSession(engines["torch"]))
        return made[-1]

    monkeypatch.setattr(engines["torch"], "session", make)
    return made


@pytest.fixture
def session(sessions: list[NoiseSession]) -> NoiseSession:
    return sessions[0]


@pytest.fixture
def conditioning(session: NoiseSession) -> dict[str, Tensor]:
    config = session.engine.family.config
    return {
        "encoder_hidden_states": torch.zeros(2, 48, config["joint_attention_dim"]),
        "pooled_projections": torch.zeros(2, config["pooled_projection_dim"]),
    }


def latents(batch: int = 2) -> Tensor:
    return torch.zeros(batch, 4, 16, 16)  # alike halves: guidance


def run(sampling: Sampling, conditioning: dict[str, Tensor], timesteps: Tensor = TIMESTEPS) -> str:
    kinds = ""
    for timestep in timesteps:
        sampling.call(StepCall(latents(), timestep.expand(2), conditioning))
        assert sampling.record is not None
        kinds += sampling.record.kind.value[0].upper()
    return kinds


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[Any, ...]]]:
    """The arguments of every call of the selection's functions."""
    calls: dict[str, list[tuple[Any, ...]]] = {}

    def spy(module: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(module, name)
        calls[name] = []

        def remember(*arguments: Any) -> Any:
            # Copies: the selection works on memory that it changes later.
            calls[name].append(tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments))
            return original(*arguments)

        monkeypatch.setattr(module, name, remember)

    for name in ("cluster_features", "first_selection", "next_selection", "count_selection"):
        spy(selection, name)
    spy(kmeans, "kmeans")
    return calls


def test_the_timeline(
    session: NoiseSession, conditioning: dict[str, Tensor], spied: dict[str, list[tuple[Any, ...]]]
) -> None:
    sampling = Sampling(SessionPool(session.engine), SETTINGS)
    assert run(sampling, conditioning) == "FFFFPPPPPP"
    tokens = [session.engine.family.noise_tokens(noise) for noise in session.noises]
    both = torch.tensor([1, 1])  # the conditional row is both rows' guide

    # Clusters once, on n_{F-1} - n_{F-2}; so is the first selection.
    (features,), (clusters,), (first,) = spied["cluster_features"], spied["kmeans"], spied["first_selection"]
    torch.testing.assert_close(features[0], (tokens[3] - tokens[2])[both])
    assert features[2] == SETTINGS.noise_scale
    assert clusters[2] == SETTINGS.kmeans_iterations
    torch.testing.assert_close(first[0], (tokens[3] - tokens[2])[both])

    # Later ones on the last outputs against the same reference, with the same clusters.
    assert len(spied["next_selection"]) == 5
    for step, later in zip(range(5, 10), spied["next_selection"], strict=True):
        torch.testing.assert_close(later[0], (tokens[step - 1] - tokens[2])[both])
        assert torch.equal(later[1], first[1])

    # f counts from the first pruned step on: f_5 = [selected on 4], f_6 = f_5 / 2 + [selected on 5], ...
    expected = torch.zeros(2, 64)
    for step, later in zip(range(5, 10), spied["next_selection"], strict=True):
        chosen = torch.zeros(2, 64).scatter(1, session.kept[step - 1].long(), 1.0)
        expected = expected * SETTINGS.staleness_decay + chosen
        assert torch.equal(later[2], expected)


def test_full_steps_of_a_table_count_for_every_token(
    session: NoiseSession, conditioning: dict[str, Tensor], spied: dict[str, list[tuple[Any, ...]]]
) -> None:
    table = Schedule.of(10, (0, 1, 2, 3, 4, 6), pruned=(5, 7, 8, 9))
    sampling = Sampling(SessionPool(session.engine), SETTINGS.replace(schedule=table))
    assert run(sampling, conditioning) == "FFFFFPFPPP"
    assert [kept.shape[1] for kept in session.kept] == [64] * 5 + [25] + [64] + [25] * 3
    tokens = [session.engine.family.noise_tokens(noise) for noise in session.noises]
    (first,) = spied["first_selection"]
    torch.testing.assert_close(first[0], (tokens[4] - tokens[3])[torch.tensor([1, 1])])
    counts = spied["next_selection"][0][2]
    chosen = torch.zeros(2, 64).scatter(1, session.kept[5].long(), 1.0)
    assert torch.equal(counts, chosen * SETTINGS.staleness_decay + 1)


def test_a_new_image_begins(session: NoiseSession, conditioning: dict[str, Tensor]) -> None:
    sampling = Sampling(SessionPool(session.engine), SETTINGS)
    assert run(sampling, conditioning, TIMESTEPS[:6]) == "FFFFPP"
    assert run(sampling, conditioning, TIMESTEPS[:6]) == "FFFFPP"  # the timestep went up
    assert run(sampling, conditioning, TIMESTEPS.clone()[7:]) == "FFF"  # a new schedule, the timestep went down
    assert run(sampling, conditioning, TIMESTEPS[:6]) == "FFFFPP"
    other = {name: tensor + 1 for name, tensor in conditioning.items()}
    assert run(sampling, other, TIMESTEPS[6:9]) == "FFF"  # other conditioning
    other["pooled_projections"].add_(1)
    assert run(sampling, other, TIMESTEPS[9:]) == "F"  # written to
    assert sampling.record is not None
    assert sampling.record.step == 0


def test_a_step_that_failed_to_begin_leaves_no_trace(
    session: NoiseSession, conditioning: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(SessionPool(session.engine), SETTINGS)
    run(sampling, conditioning, TIMESTEPS[:4])
    with monkeypatch.context() as patch:
        patch.setattr(selection, "first_selection", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(sampling, conditioning, TIMESTEPS[4:5])
    assert run(sampling, conditioning, TIMESTEPS[4:]) == "FFFFPP"


def test_the_clusters_are_recorded(session: NoiseSession, conditioning: dict[str, Tensor]) -> None:
    sampling = Sampling(SessionPool(session.engine), SETTINGS)
    run(sampling, conditioning, TIMESTEPS[:4])
    assert sampling.record is not None
    assert sampling.record.cluster_ids is None
    run(sampling, conditioning, TIMESTEPS[4:5])
    assert sampling.record.cluster_ids is not None
    assert sampling.record.cluster_ids.shape == (2, 64)
    assert sampling.record.timestep == TIMESTEPS[4].item()


def test_an_image_begins_once_and_expects_its_schedule(session: NoiseSession, conditioning: dict[str, Tensor]) -> None:
    sampling = Sampling(SessionPool(session.engine), SETTINGS)
    run(sampling, conditioning)
    run(sampling, conditioning, TIMESTEPS[3:])
    assert session.expected == [TIMESTEPS.tolist()] * 2
    assert session.timesteps == [*TIMESTEPS.tolist(), *TIMESTEPS[3:].tolist()]


def test_timesteps_that_come_one_by_one_are_expected_again(
    session: NoiseSession, conditioning: dict[str, Tensor]
) -> None:
    """As FluxPipeline's, which are no views of a schedule."""
    sampling = Sampling(SessionPool(session.engine), SETTINGS)
    for steps in (4, 4, 2, 3):
        for timestep in TIMESTEPS[:steps]:
            sampling.call(StepCall(latents(), timestep.clone(), conditioning))
    seen = TIMESTEPS.tolist()
    assert session.expected == [[], seen[:4], seen[:4], seen[:2]]


@pytest.mark.parametrize(
    ("values", "rows"),
    [
        ([1, 1], [1, 1]),  # guided
        ([1, 2], [0, 1]),  # two prompts without guidance
        ([1, 2, 3, 1, 2, 3], [3, 4, 5, 3, 4, 5]),
        ([1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5]),
        ([1, 2, 1, 3], [0, 1, 2, 3]),  # halves that are alike in part
        ([1], [0]),
        ([1, 1, 1], [0, 1, 2]),
    ],
)
def test_guiding_rows(values: list[int], rows: list[int]) -> None:
    batch = torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 4, 2, 2).float()
    assert guiding_rows(batch).tolist() == rows


def test_guiding_rows_differ_by_one_value() -> None:
    batch = torch.zeros(2, 4, 8, 8)
    batch[1, 3, 7, 7] = 1e-6
    assert guiding_rows(batch).tolist() == [0, 1]


def test_memory() -> None:
    tensor = torch.arange(12.0).view(3, 4)
    memory = Memory(tensor)
    assert memory.holds(tensor)
    assert memory.holds(tensor.view(3, 4))
    assert memory.holds(tensor.detach())
    for other in (tensor.clone(), tensor[:2], tensor[1:], tensor.t(), tensor.view(4, 3), tensor.view(torch.int32)):
        assert not memory.holds(other)
    tensor[0, 0] = 1
    assert not memory.holds(tensor)


def test_memory_keeps_its_address() -> None:
    memories = [Memory(torch.zeros(1000)) for _ in range(10)]
    fresh = torch.zeros(1000)
    assert not any(memory.holds(fresh) for memory in memories)
