"""A component's plan of TensorRT or TensorRT-RTX."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cat_pruning.bundle.schema import ComponentSpec
from cat_pruning.components import with_both_sizes
from cat_pruning.engines.cuda_graphs import capturing
from cat_pruning.engines.plan import Plan, PlanContext
from cat_pruning.engines.side_stream import SideStream
from cat_pruning.errors import EngineError


class PlanComponent:
    """A component's plan: a context for every profile that is used, which share their scratch memory.

    Args:
        spec: of the graph that the plan was built from.
        plan: the plan.
        device: where it was loaded.
        pixels_per_latent: the autoencoder's factor.

    Raises:
        EngineError: it is no plan of this graph.
    """

    def __init__(self, spec: ComponentSpec, plan: Plan, device: torch.device, pixels_per_latent: int) -> None:
        self._spec, self._plan, self._device, self._pixels = spec, plan, device, pixels_per_latent
        expected = ({tensor.name for tensor in spec.inputs}, {tensor.name for tensor in spec.outputs})
        if (set(plan.inputs), set(plan.outputs)) != expected:
            raise EngineError(f"the plan of {spec.file} has other inputs or outputs than the graph", "export it again")
        self._stream = SideStream(device)
        self._scratch: Tensor | None = None
        self._contexts: dict[int, PlanContext] = {}

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Runner`."""
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        profile = self._plan.profile_for(shapes)
        sizes = with_both_sizes(self._spec.sizes_of(shapes), self._pixels)
        results = {
            tensor.name: torch.empty(tensor.shape_at(sizes), dtype=self._plan.outputs[tensor.name], device=self._device)
            for tensor in self._spec.outputs
        }
        with capturing:  # a context is for one thread at a time, and none launches while another captures
            if self._scratch is None:  # a null pointer is none
                self._scratch = torch.empty(max(256, self._plan.scratch_bytes), dtype=torch.uint8, device=self._device)
            if profile not in self._contexts:
                self._contexts[profile] = self._plan.context(profile, self._scratch, self._stream)
            self._contexts[profile].run({**inputs, **results})
        return results
