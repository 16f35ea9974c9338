"""What a tool has to know of a bundle's pipeline, which only a worker has loaded."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.errors import BundleError
from cat_pruning.evaluation.results import machine


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedBundle:
    """A quantized bundle of the same model: its quantization's name, its digest, and what computes."""

    name: str
    digest: str
    engine: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class About:
    """A bundle's pipeline.

    Attributes:
        digest: the bundle's. engine: what computes. dtype: of the transformer.
        steps, guidance_scale: the pipeline's own, where a call says nothing.
        scheduler: the pipeline's.
        machine: processor and libraries.
        quantized: other bundles of the same model, whose transformers are loaded too.
    """

    digest: str
    engine: str
    dtype: torch.dtype
    steps: int
    guidance_scale: float
    scheduler: Any
    machine: dict[str, str]
    quantized: tuple[QuantizedBundle, ...] = ()

    @classmethod
    def of(cls, bundle: Bundle, pipe: Any, quantized: Sequence[QuantizedBundle] = ()) -> Self:
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
            quantized=tuple(quantized),
        )

    def check(self, bundle: Bundle, quantized: Sequence[Bundle] = ()) -> None:
        """Check that workers have the bundles that this process has, which results are said to be of.

        Raises:
            BundleError: they have another at its path.
        """
        theirs = (self.digest, *(each.digest for each in self.quantized))
        for expected, digest in zip((bundle, *quantized), theirs, strict=True):
            if digest != (here := expected.manifest.digest):
                raise BundleError(
                    f"the workers have another bundle than {expected.path} is here: its digest is {digest}, expected "
                    f"{here}",
                    "have the same at this path on every machine, or give a URL",
                )

    def differs(self, other: About) -> str:
        """What results depend on and the other has otherwise: "engine torch, not onnxruntime"; empty if it has not."""
        theirs, ours = other._facts(), self._facts()
        named = {**theirs, **ours}
        changes = {name: (theirs.get(name), ours.get(name)) for name in named}
        return ", ".join(f"{name} {there}, not {here}" for name, (there, here) in changes.items() if there != here)

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"digest": self.digest, "engine": self.engine, "dtype": self.dtype}
        for each in self.quantized:
            facts |= {f"digest of {each.name}": each.digest, f"engine of {each.name}": each.engine}
        return facts
