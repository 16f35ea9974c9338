"""Use another scheduler: pruning follows the timesteps, not the calls, so `full_steps` means the same everywhere.

    python examples/04_new_scheduler.py

Heun calls the transformer twice at one timestep. Both calls compute the same tokens.
"""

import os

# Before torch is imported: on a machine that others use too, its threads have to sleep between two calls, not to spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    StableDiffusion3Pipeline,
)

from cat_pruning import CatTransformer, PruneSettings
from cat_pruning.models import miniatures
from cat_pruning.schedule import StepKind

STEPS = int(os.environ.get("CAT_EXAMPLE_STEPS", "14"))
PROMPT = "a large red circle left of a small blue star on a plain black background"

pipe: Any = StableDiffusion3Pipeline.from_pretrained(
    miniatures()["sd3-mini"], dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
)
pipe.set_progress_bar_config(disable=True)
pipe.transformer = CatTransformer.from_model(pipe.transformer, PruneSettings(full_steps=4))

config = pipe.scheduler.config
schedulers = {
    "Euler": FlowMatchEulerDiscreteScheduler.from_config(config),
    "Heun": FlowMatchHeunDiscreteScheduler.from_config({"shift": config.shift}),
    "DPM-Solver++": DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=config.shift
    ),
}

for name, scheduler in schedulers.items():
    pipe.scheduler = scheduler
    calls = []
    # `last_step` says what the last call computed; both calls of a Heun step have the same record.
    hook = pipe.transformer.register_forward_hook(
        lambda transformer, arguments, output, calls=calls: calls.append(transformer.last_step)
    )
    pipe(
        PROMPT,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        max_sequence_length=24,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    hook.remove()
    steps = list(dict.fromkeys(calls))
    letters = "".join("F" if step.kind is StepKind.FULL else "p" for step in steps)
    print(f"{name:>13}: {len(calls)} calls, {len(steps)} steps: {letters}")
