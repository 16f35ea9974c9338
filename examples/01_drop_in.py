"""Put `CatTransformer` in the place of a diffusers pipeline's transformer; nothing else changes.

    python examples/01_drop_in.py

It generates one picture with every token on every step, and one with the paper's settings, from the same seed.
"""

import os

# Before torch is imported: on a machine that others use too, its threads have to sleep between two calls, not to spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import time
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline

from cat_pruning import CatTransformer, PruneSettings
from cat_pruning.models import miniatures

STEPS = int(os.environ.get("CAT_EXAMPLE_STEPS", "28"))
OUT = Path("build/examples")
PROMPT = "a large red circle left of a small blue star on a plain black background"

# sd3-mini comes with the package. Any StableDiffusion3Pipeline, PixArt pipeline or FluxPipeline would do.
pipe: Any = StableDiffusion3Pipeline.from_pretrained(
    miniatures()["sd3-mini"], dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
)
pipe.set_progress_bar_config(disable=True)


def paint(steps: int) -> Any:
    """One picture of one seed."""
    return pipe(
        PROMPT,
        num_inference_steps=steps,
        guidance_scale=3.0,
        max_sequence_length=24,
        generator=torch.Generator().manual_seed(0),
    ).images[0]


def generate(name: str) -> None:
    """Generate one picture and say how long it took."""
    paint(2)  # the first steps of a transformer allocate its memory
    started = time.perf_counter()
    image = paint(STEPS)
    seconds = time.perf_counter() - started
    OUT.mkdir(parents=True, exist_ok=True)
    image.save(OUT / f"{name}.png")
    print(f"{name:>8}  {seconds:.2f} s  {OUT / f'{name}.png'}")


original = pipe.transformer
pipe.transformer = CatTransformer.from_model(original, PruneSettings(keep_ratio=1))
generate("full")

# The settings may be replaced between two images.
pipe.transformer.settings = PruneSettings(keep_ratio=0.3, full_steps=8)
generate("pruned")

# The module itself was never changed, and can be put back.
pipe.transformer = original
