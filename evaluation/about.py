"""What a tool has to know of a bundle's pipeline, which only a worker has loaded."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Self

import torch

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.errors import BundleError
from cat_pruning.evaluation.results import machine


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class About:
    """A bundle's pipeline.

    Attributes:
        digest: the bundle's. engine: what computes. dtype: of the transformer.
        steps, guidance_scale: the pipeline's own, where a call says nothing.
        scheduler: the pipeline's.
        machine: processor and libraries.
    """

    digest: str
    engine: str
    dtype: torch.dtype
    steps: int
    guidance_scale: float
    scheduler: Any
    machine: dict[str, str]

    @classmethod
    def of(cls, bundle: Bundle, pipe: Any) -> Self:
        """Of a pipeline that this process has loaded."""
        defaults = inspect.signature(pipe.__call__).parameters
        return cls(
            digest=bundle.manifest.digest,
            engine=pipe.transformer.engine.name,
            dtype=pipe.transformer.dtype,
            steps=defaults["num_inference_steps"].default,
            guidance_scale=float(defaults["guidance_scale"].default),
            scheduler=pipe.scheduler,
            machine=machine(),
        )

    def check(self, bundle: Bundle) -> None:
        """Check that workers have the bundle that this process has, which results are said to be of.

        Raises:
            BundleError: they have another at its path.
        """
        here = bundle.manifest.digest
        if self.digest != here:
            raise BundleError(
                f"the workers have another bundle than {bundle.path} is here: its digest is {self.digest}, expected "
                f"{here}",
                "have the same at this path on every machine, or give a URL",
            )

    def differs(self, other: About) -> str:
        """What results depend on and the other has otherwise: "engine torch, not onnxruntime"; empty if it has not."""
        pairs = {name: (getattr(other, name), getattr(self, name)) for name in ("digest", "engine", "dtype")}
        return ", ".join(f"{name} {theirs}, not {ours}" for name, (theirs, ours) in pairs.items() if theirs != ours)
