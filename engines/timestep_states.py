"""What depends on the timestep only, computed for many steps of a schedule at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from cat_pruning.step_io import LATENTS, MAX_TIMESTEPS, SYMBOLIC, TIMESTEP, Shape

Run = Callable[[dict[str, Tensor]], dict[str, Tensor]]  # inputs by name -> outputs by name


class TimestepStates:
    """What depends on the timestep only, for the steps of one image, in batches of at most `MAX_TIMESTEPS` steps.

    Args:
        run: computes it: `timestep.onnx`, or the module's own layers.
        reads, writes: the shapes of its inputs and outputs by name, with dynamic dimensions by name; `batch` counts
            rows of all steps.
        inputs: the model's inputs for one step; those that are not read are not kept.
        timesteps: those that are expected, in order.
    """

    def __init__(
        self,
        run: Run,
        reads: Mapping[str, Shape],
        writes: Mapping[str, Shape],
        inputs: Mapping[str, Tensor],
        timesteps: Sequence[float],
    ) -> None:
        self._run, self._outputs, self._timesteps = run, writes, timesteps
        self._inputs = {name: inputs[name] for name in reads if name != TIMESTEP}
        self._per_row = {name for name in self._inputs if SYMBOLIC.batch in reads[name]}
        self._batch, self._device = inputs[LATENTS].shape[0], inputs[LATENTS].device
        self._states: dict[float, dict[str, Tensor]] = {}

    def at(self, timestep: float) -> dict[str, Tensor]:
        """The results for one step by name, each contiguous. Computes them when they are not there yet."""
        if timestep not in self._states:
            expected = list(dict.fromkeys(self._timesteps))
            start = expected.index(timestep) if timestep in expected else len(expected)
            self._states = self._compute(expected[start : start + MAX_TIMESTEPS] or [timestep])
        return self._states[timestep]

    def _compute(self, timesteps: Sequence[float]) -> dict[float, dict[str, Tensor]]:
        count, batch = len(timesteps), self._batch
        inputs = {
            name: tensor.repeat(count, *[1] * (tensor.dim() - 1)) if name in self._per_row else tensor
            for name, tensor in self._inputs.items()
        }
        # Filled on the device: a copy of Python's numbers would stop a GPU amid a long schedule.
        rows = torch.empty(count, batch, dtype=torch.float32, device=self._device)
        for row, timestep in zip(rows, timesteps, strict=True):
            row.fill_(timestep)
        inputs[TIMESTEP] = rows.flatten()
        states: dict[float, dict[str, Tensor]] = {timestep: {} for timestep in timesteps}
        for name, packed in self._run(inputs).items():
            shape = self._outputs[name]
            if SYMBOLIC.batch not in shape:
                steps = [packed] * count
            else:
                axis = shape.index(SYMBOLIC.batch)
                # Step by step in memory, so that the step reads its part as it lies.
                by_step = packed.unflatten(axis, (count, batch)).movedim(axis, 0).contiguous()
                steps = list(by_step.unbind())
            for timestep, tensor in zip(timesteps, steps, strict=True):
                states[timestep][name] = tensor
        return states
