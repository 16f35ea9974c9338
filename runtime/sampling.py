"""One image (or batch of images) in progress: where it is in its schedule, and what it computes next."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from cat_pruning.runtime import kmeans, selection
from cat_pruning.runtime.record import StepRecord
from cat_pruning.runtime.step_engine import StepSession
from cat_pruning.runtime.timesteps import TimestepReader, version_of
from cat_pruning.schedule import StepKind, schedule
from cat_pruning.settings import PruneSettings

logger = logging.getLogger(__name__)


class Sampling:
    """Algorithm 2 over the calls that a diffusers pipeline makes, for one thread.

    A step is one noise level: schedulers of second order (Heun) call the model twice at the same timestep,
    and both calls compute the same tokens. A new image begins when the pipeline sets a new schedule, when the
    timestep goes up, or when the conditioning or a shape changes; so an image that was broken off leaves no
    trace in the next one. The first `full_steps` steps of every image are full, wherever in the schedule it
    starts, so an image-to-image run with fewer steps is never pruned.
    """

    def __init__(self, session: StepSession, settings: PruneSettings) -> None:
        self.session = session
        self.settings = settings
        self.record: StepRecord | None = None  # of the last step
        self._timesteps = TimestepReader()
        self.reset()

    def reset(self) -> None:
        """Forget the image in progress."""
        self.session.reset()
        self._step = -1
        self._timestep = float("inf")
        self._conditioning: dict[str, Memory] = {}  # what the pipeline passed
        self._converted: dict[str, Tensor] = {}  # the same for the engine
        self._keep_indices: Tensor | None = None  # (B, n) of the step in progress
        self._noise: Tensor | None = None  # (B, C, H, W), the last output
        self._reference: Tensor | None = None  # (B, N, p*p*C), n_t0
        self._cluster_ids: Tensor | None = None  # (B, N)
        self._selection_count: Tensor | None = None  # (B, N)

    def call(self, model_inputs: Mapping[str, Tensor]) -> Tensor:
        """Compute one call of the transformer: `StepSession.step` on the tokens of this step.

        Args:
            model_inputs: the transformer's inputs by diffusers' names, in the pipeline's dtype, wherever they are.

        Returns:
            The noise prediction (B, C, H, W), in the engine's dtype.

        Once per image the clusters are found and the timesteps are read, which synchronises with a GPU when they
        are on it; nothing else here does.
        """
        timestep, new_schedule = self._timesteps.read(model_inputs["timestep"])
        if new_schedule or timestep > self._timestep or self._is_other_image(model_inputs):
            self._begin_image(model_inputs)
        latents = self._to_engine("hidden_states", model_inputs["hidden_states"])
        changing = {"hidden_states": latents, "timestep": self._to_engine("timestep", model_inputs["timestep"])}
        try:
            if timestep != self._timestep:
                self._begin_step(timestep, latents)
            assert self._keep_indices is not None
            self._noise = self.session.step({**changing, **self._converted}, self._keep_indices)
        except BaseException:
            self.reset()  # a step may have begun that was never computed
            raise
        if self._step == self.settings.reference_step:
            self._reference = self._patchify(self._noise)
        return self._noise

    def _begin_image(self, model_inputs: Mapping[str, Tensor]) -> None:
        self.reset()
        for name, tensor in model_inputs.items():
            if name not in ("hidden_states", "timestep"):
                self._conditioning[name] = Memory(tensor)
                self._converted[name] = self._to_engine(name, tensor)

    def _to_engine(self, name: str, tensor: Tensor) -> Tensor:
        engine = self.session.engine
        return tensor.to(engine.device, engine.family.input_dtype(name, engine.dtype))

    def _begin_step(self, timestep: float, latents: Tensor) -> None:
        self._step += 1
        self._timestep = timestep
        kind = schedule(self._step, self.settings)
        batch, _, height, width = latents.shape
        patch = self.session.engine.config["patch_size"]
        grid = (height // patch, width // patch)
        num_tokens = grid[0] * grid[1]
        num_kept = self.settings.num_kept(num_tokens)  # on every step, so that a bad setting is told at once
        if kind is StepKind.PRUNED:
            self._keep_indices = self._select(latents, grid, num_kept)
        elif self._keep_indices is None or self._keep_indices.shape[1] != num_tokens:
            self._keep_indices = (
                torch.arange(num_tokens, dtype=torch.int32, device=latents.device).expand(batch, -1).contiguous()
            )
        if self._selection_count is not None:
            self._selection_count = selection.count_selection(
                self._selection_count, self._keep_indices, self.settings.staleness_decay
            )
        self.record = StepRecord(
            step=self._step,
            kind=kind,
            timestep=timestep,
            grid=grid,
            keep_indices=self._keep_indices,
            cluster_ids=self._cluster_ids,
        )

    def _select(self, latents: Tensor, grid: tuple[int, int], num_kept: int) -> Tensor:
        """The tokens of a pruned step (algorithm 2), (B, n) int32."""
        assert self._noise is not None
        assert self._reference is not None
        rows = guiding_rows(latents)
        noise = (self._patchify(self._noise) - self._reference).float()[rows]  # (B, N, p*p*C), RN
        settings = self.settings
        if self._cluster_ids is None:
            position = kmeans.position_encoding(*grid, noise.shape[-1], noise.device)
            features = selection.cluster_features(noise, position, settings.noise_scale)
            initial = kmeans.initial_tokens(*grid, settings.num_clusters).to(noise.device)
            self._cluster_ids = kmeans.kmeans(features, initial, settings.kmeans_iterations)
            self._selection_count = torch.zeros(noise.shape[:2], device=noise.device)
            return selection.first_selection(noise, self._cluster_ids, num_kept, settings)
        assert self._selection_count is not None
        return selection.next_selection(noise, self._cluster_ids, self._selection_count, num_kept, settings)

    def _patchify(self, noise: Tensor) -> Tensor:
        engine = self.session.engine
        return engine.family.patchify(noise, engine.config)

    def _is_other_image(self, model_inputs: Mapping[str, Tensor]) -> bool:
        if self._noise is None:
            return True
        latents = model_inputs["hidden_states"]
        if (latents.shape[0], *latents.shape[2:]) != (self._noise.shape[0], *self._noise.shape[2:]):
            return True
        return not all(memory.holds(model_inputs[name]) for name, memory in self._conditioning.items())


def guiding_rows(latents: Tensor) -> Tensor:
    """The row of the batch that each row's selection is taken from, (B,) int64.

    With classifier-free guidance the rows are [negative; positive] over the same latents, and both follow the
    positive row. Without it the halves of the batch differ, and every row follows itself. That is read off the
    latents on their device: the values depend on data, the shapes do not, and nothing synchronises.
    """
    batch = latents.shape[0]
    rows = torch.arange(batch, device=latents.device)
    if batch % 2:
        return rows
    half = batch // 2
    guided = (latents[:half] == latents[half:]).all()
    return torch.where(guided, rows % half + half, rows)


class Memory:
    """Where a tensor's values are, to tell without reading them whether a later tensor is the same one."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor  # kept alive, so that no other tensor takes its address
        self._version = version_of(tensor)

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` is the same memory, seen the same way and not written to since."""
        mine = self._tensor
        return (
            tensor.data_ptr() == mine.data_ptr()
            and tensor.dtype == mine.dtype
            and tensor.shape == mine.shape
            and tensor.stride() == mine.stride()
            and version_of(tensor) == self._version
        )
