"""Compare presets and policies on one picture: how far are the final latents from the full run's?

    python examples/03_compare_policies.py

One picture is an illustration. `cat-eval` compares on as many as you want, with confidence intervals.
"""

import os

# Before torch is imported: on a machine that others use too, its threads have to sleep between two calls, not to spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import time
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from cat_pruning import CatTransformer, PruneSettings
from cat_pruning.models import miniatures
from cat_pruning.schedule import StepKind
from cat_pruning.settings import Policy
from cat_pruning.timeline import step_kinds

STEPS = int(os.environ.get("CAT_EXAMPLE_STEPS", "28"))
PROMPT = "a large red circle left of a small blue star on a plain black background"
TRIALS = {
    "paper": PruneSettings.preset("paper"),
    "refreshed": PruneSettings.preset("refreshed"),
    "forecast": PruneSettings.preset("forecast"),
    "stale tokens only": PruneSettings(policy=Policy.STALE),
    "highest noise only": PruneSettings(policy=Policy.NOISE),
    "random tokens": PruneSettings(policy=Policy.RANDOM),
}

pipe: Any = StableDiffusion3Pipeline.from_pretrained(
    miniatures()["sd3-mini"], dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
)
pipe.set_progress_bar_config(disable=True)
pipe.transformer = CatTransformer.from_model(pipe.transformer)


def latents(settings: PruneSettings) -> Tensor:
    """The final latents of one seed under `settings`."""
    pipe.transformer.settings = settings
    result: Tensor = pipe(
        PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        max_sequence_length=24,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    return result


full = latents(PruneSettings(keep_ratio=1))
print(f"{'':>18}  full steps  tokens between  latents' error  time")
for name, settings in TRIALS.items():
    started = time.perf_counter()
    error = torch.linalg.vector_norm(latents(settings) - full) / torch.linalg.vector_norm(full)
    seconds = time.perf_counter() - started
    full_steps = step_kinds(STEPS, settings).count(StepKind.FULL)
    print(f"{name:>18}  {full_steps:>10}  {settings.keep_ratio:>14.0%}  {error:>14.4f}  {seconds:.2f} s")
