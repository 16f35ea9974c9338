"""A plan as a runner of Polygraphy.

Polygraphy's own `TrtRunner` serves one of TensorRT and TensorRT-RTX per process, and gives every output memory of its
own, where our plugin's caches are changed in place. This one runs a plan as production does (`engines/plan.py`).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from torch import Tensor

from cat_pruning.engines.plan import Plan
from cat_pruning.engines.side_stream import SideStream
from cat_pruning.names import Flavour
from cat_pruning.step_io import Shape, output_name


class PlanRunner(BaseRunner):  # type: ignore[misc]  # from an untyped module
    """Runs one plan on tensors of the host, and waits for the device.

    Args:
        flavour: whose plan it is.
        file: the plan.
        output_shapes: of every output, by name.
        in_place: the inputs whose memory their outputs share.
        device: where the plan runs.
        name: of the runner.
    """

    def __init__(
        self,
        flavour: Flavour,
        file: Path,
        *,
        output_shapes: Mapping[str, Shape],
        in_place: Collection[str],
        device: torch.device,
        name: str,
    ) -> None:
        super().__init__(name=name)
        self._flavour, self._file, self._device = flavour, file, device
        self._output_shapes, self._in_place = output_shapes, in_place

    def activate_impl(self) -> None:
        """Load the plan."""
        self.plan = Plan(self._flavour, self._file, self._device)

    def deactivate_impl(self) -> None:
        """Let go of the plan and its memory."""
        del self.plan

    def get_input_metadata_impl(self) -> Any:
        """The inputs' dtypes and ranks. Their sizes are the profiles', which `infer` finds."""
        metadata = TensorMetadata()
        for name, dtype in self.plan.inputs.items():
            lowest, _ = self.plan.profiles[0][name]
            metadata.add(name, dtype=dtype, shape=[None] * len(lowest))
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the plan once.

        Raises:
            ShapeError: no profile holds the inputs.
            EngineError: the library refuses.
        """
        inputs = {name: feed_dict[name].to(self._device).contiguous().clone() for name in self.plan.inputs}
        shared = {output_name(name): inputs[name] for name in self._in_place}
        outputs = {
            name: shared[name]
            if name in shared
            else torch.empty([int(size) for size in self._output_shapes[name]], dtype=dtype, device=self._device)
            for name, dtype in self.plan.outputs.items()
        }
        profile = self.plan.profile_for({name: tuple(tensor.shape) for name, tensor in inputs.items()})
        scratch = torch.empty(max(256, self.plan.scratch_bytes), dtype=torch.uint8, device=self._device)
        context = self.plan.context(profile, scratch, SideStream(self._device))
        started = time.perf_counter()
        context.run({**inputs, **outputs})
        results = {name: tensor.cpu() for name, tensor in outputs.items()}
        self.inference_time = time.perf_counter() - started
        return results
