"""Teach cat-pruning a transformer class that it does not know.

    python examples/05_new_family.py

A *family* says what depends on a transformer's class: where it is intercepted, which inputs it has, how its output
becomes tokens. Here the class is a variant of SD3's that clamps its latents, so the family inherits all of that and
gives its names only. `docs/adding-a-model.md` says what a family of another architecture has to write.
"""

import os

# Before torch is imported: on a machine that others use too, its threads have to sleep between two calls, not to spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor

from cat_pruning import CatTransformer, PruneSettings, families
from cat_pruning.errors import SettingsError
from cat_pruning.families.sd3 import StableDiffusion3
from cat_pruning.models import miniatures

STEPS = int(os.environ.get("CAT_EXAMPLE_STEPS", "14"))
PROMPT = "a large red circle left of a small blue star on a plain black background"


class ClampedTransformer(SD3Transformer2DModel):
    """SD3's transformer on latents that are clamped to [-3, 3]."""

    def forward(self, hidden_states: Tensor, *arguments: Any, **others: Any) -> Any:
        """See `SD3Transformer2DModel.forward`."""
        return super().forward(hidden_states.clamp(-3, 3), *arguments, **others)


class Clamped(StableDiffusion3):
    """Every `ClampedTransformer`. It clamps latents pixel by pixel, so tokens stay independent before attention."""

    name = "clamped"
    transformer_class = "ClampedTransformer"


directory = miniatures()["sd3-mini"]
transformer = ClampedTransformer.from_pretrained(directory / "transformer", dtype=torch.float32)
try:
    CatTransformer.from_model(transformer)
except SettingsError as error:
    print(f"before: {error}")

# For this process. A family that is to stay becomes a module in families/ and a line in families/__init__.py.
families.register(Clamped)
print("after:  known are", ", ".join(family.transformer_class for family in families.FAMILIES))

pipe: Any = StableDiffusion3Pipeline.from_pretrained(
    directory, transformer=transformer, dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
)
pipe.set_progress_bar_config(disable=True)


def latents() -> Tensor:
    """The final latents of one seed."""
    result: Tensor = pipe(
        PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        max_sequence_length=24,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    return result


# The first test of every family: all tokens kept, it is the model itself, to the bit.
expected = latents()
pipe.transformer = CatTransformer.from_model(transformer, PruneSettings(keep_ratio=1))
print("keep 1 equals the module itself:", torch.equal(latents(), expected))

pipe.transformer.settings = PruneSettings(keep_ratio=0.3, full_steps=4)
error = torch.linalg.vector_norm(latents() - expected) / torch.linalg.vector_norm(expected)
print(f"keep 0.3: {pipe.transformer.last_step.num_kept} tokens on the last step, latents' error {error:.3f}")
