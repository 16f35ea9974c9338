"""Export a checkpoint to ONNX, and generate from the bundle without its torch weights.

    python examples/02_export_and_load.py

`cat-export --model sd3-mini --text-length 48 --target onnx` and `cat-generate` do the same.
"""

import os

# Before torch is imported: on a machine that others use too, its threads have to sleep between two calls, not to spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pathlib import Path

import torch

from cat_pruning import PruneSettings, load_pipeline
from cat_pruning.exporter.export import ExportConfig, Target, export

STEPS = int(os.environ.get("CAT_EXAMPLE_STEPS", "28"))
OUT = Path("build/examples")

# `model` takes a local directory in the diffusers layout or a hub id, too. The family is detected.
config = ExportConfig(
    model="sd3-mini",
    out=OUT / "sd3-mini",
    text_length=48,  # sd3-mini was trained with 24 CLIP tokens and 24 empty ones in T5's place
    targets=(Target.ONNX,),
    force=True,
)
OUT.mkdir(parents=True, exist_ok=True)
bundle = export(config)
for name, spec in bundle.manifest.files.items():
    if "/" not in name:
        print(f"{spec.size / 1e6:8.2f} MB  {bundle.path.name}/{name}")
cost = bundle.manifest.macs[0]
print(f"a full step is {cost.full_total / cost.pruned_total:.2f} times the MACs of a pruned one")

# A StableDiffusion3Pipeline whose transformer is a CatTransformer over ONNX Runtime.
pipe = load_pipeline(bundle.path, "onnxruntime", settings=PruneSettings.preset("forecast"))
pipe.set_progress_bar_config(disable=True)
image = pipe(
    "a small green square above a large pink ring on a plain beige background",
    height=128,
    width=128,
    num_inference_steps=STEPS,
    guidance_scale=3.0,
    max_sequence_length=24,
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save(OUT / "exported.png")
print(f"{pipe.transformer.engine.name}: {OUT / 'exported.png'}")
