"""What is remembered of a step, for pictures and reports."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cat_pruning.schedule import ScheduledStep, StepKind


# eq=False: tensors have no single truth value, so two records are equal only if they are the same one.
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CallRecord:
    """One step of one image, or one call of a step.

    Attributes:
        step: number of the step, 0-based: in the schedule, where there is one, else in the image.
        row: of the schedule, or by rule; full where the schedule's reads what the image has not computed.
        timestep: the scheduler's timestep that the transformer was called with.
    """

    step: int
    row: ScheduledStep
    timestep: float

    @property
    def kind(self) -> StepKind:
        """What was computed."""
        return self.row.kind


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepRecord(CallRecord):
    """One step of one image, and the tokens that were computed.

    Attributes:
        grid: image tokens (high, wide); N = high * wide.
        keep_indices: (B, n) int32, the tokens that were computed in each row of the batch, ascending.
        cluster_ids: (B, N) int64, the cluster of each token; None before there are clusters.
    """

    grid: tuple[int, int]
    keep_indices: Tensor
    cluster_ids: Tensor | None

    @property
    def num_tokens(self) -> int:
        """N, the image tokens."""
        height, width = self.grid
        return height * width

    @property
    def num_kept(self) -> int:
        """n, the tokens that the step computed."""
        return self.keep_indices.shape[1]
