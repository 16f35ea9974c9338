"""Score a miniature on captions that it was not trained on; writes JSON.

    python training/evaluate_mini.py models/sd3-mini --captions 48
    python training/evaluate_mini.py models/pixart-mini --captions 48 --steps 20

It writes the coverage of the generated images, of the captions' real renderings, and of these renderings passed through
the autoencoder, which no transformer can exceed by much; each also against the next caption instead of its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from numpy.typing import NDArray
from PIL import Image

from cat_pruning.models.prompts import SCENES_SEED
from mini_models import TEXT_LENGTH, quiet_libraries
from mini_stages import to_images, to_pixels
from miniatures import miniature_in
from scene_kinds import SceneKind

logger = logging.getLogger("evaluate_mini")

BATCH = 8
SAMPLES = {
    SceneKind.FLAT: (
        "a large red circle left of a small blue star on a plain black background",
        "a large yellow triangle in the center on a striped navy background",
        "a small green square above a large pink ring on a plain beige background",
        "a large purple cross on the right on a plain gray background",
    ),
    SceneKind.RICH: (
        "large striped red circle northwest, small plain blue star north, large plain green triangle middle, "
        "small dotted orange square southwest, large checked purple cross southeast on a plain navy background",
        "large plain yellow ring north, large dotted blue square west, small striped pink circle east, "
        "large checked red triangle south on a striped teal background",
        "small plain orange star northwest, large checked green circle northeast, large striped purple square west, "
        "small plain red cross middle, large dotted blue triangle south, small plain pink ring southeast on a dotted "
        "beige background",
        "large dotted red square northwest, small plain yellow circle middle, large plain purple ring east, "
        "small striped blue triangle southwest, large striped green cross south on a checked gray background",
    ),
}


class SchedulerName(StrEnum):
    """What samples."""

    OWN = "own"  # the pipeline's
    EULER_KARRAS = "euler-karras"  # EulerDiscreteScheduler with Karras' sigmas; for a pipeline without flow matching


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """What to generate: `captions` images by `steps` steps.

    Attributes:
        pipeline: its folder.
        captions: how many.
        steps: of the sampler.
        guidance: None for the miniature's own.
        text_tokens: the pipeline's `max_sequence_length`.
        scheduler: the sampler.
        autoencoder_only: generate nothing.
        device: of torch. The noise is drawn on the CPU on every device.
    """

    pipeline: Path
    captions: int = 48
    steps: int = 28
    guidance: float | None = None
    text_tokens: int = TEXT_LENGTH
    scheduler: SchedulerName = SchedulerName.OWN
    autoencoder_only: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.captions < 2 or self.steps < 1:
            raise ValueError(f"captions={self.captions}, steps={self.steps}: expected at least 2 and 1")


def load(config: EvaluateConfig) -> DiffusionPipeline:
    """The pipeline, with the scheduler that the config asks for."""
    pipeline = miniature_in(config.pipeline).load_pipeline(config.pipeline)
    if config.scheduler is SchedulerName.EULER_KARRAS:
        pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, use_karras_sigmas=True)
    return pipeline.to(config.device)


def generate(pipeline: DiffusionPipeline, captions: list[str], config: EvaluateConfig) -> NDArray[np.uint8]:
    """One image for each caption, (B, H, W, 3); caption k starts from the noise of seed k."""
    miniature = miniature_in(config.pipeline)
    options = {**miniature.call_options, "max_sequence_length": config.text_tokens}
    images: list[NDArray[np.uint8]] = []
    for start in range(0, len(captions), BATCH):
        batch = captions[start : start + BATCH]
        generated = pipeline(
            batch,
            num_inference_steps=config.steps,
            guidance_scale=miniature.guidance if config.guidance is None else config.guidance,
            generator=[torch.Generator().manual_seed(start + k) for k in range(len(batch))],
            output_type="np",
            **options,
        ).images
        images.extend(np.round(generated * 255).astype(np.uint8))
        logger.info("%d of %d images", len(images), len(captions))
    return np.stack(images)


@torch.no_grad()
def through_autoencoder(pipeline: DiffusionPipeline, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The images, encoded and decoded."""
    batches = to_pixels(images).split(BATCH)
    vae = pipeline.vae
    decoded = [vae.decode(vae.encode(batch.to(vae.device)).latent_dist.mode()).sample.cpu() for batch in batches]
    return to_images(torch.cat(decoded))


def summary(images: NDArray[np.uint8], scenes: list[Any], kind: SceneKind) -> dict[str, float]:
    """The mean coverage with its standard error, and the mean against the next scene's caption."""
    scores = [kind.coverage(image, scene) for image, scene in zip(images, scenes, strict=True)]
    others = [kind.coverage(image, scene) for image, scene in zip(images, scenes[1:] + scenes[:1], strict=True)]
    error = float(np.std(scores, ddof=1)) / math.sqrt(len(scores))
    return {
        "coverage": round(float(np.mean(scores)), 4),
        "standard_error": round(error, 4),
        "shuffled_captions": round(float(np.mean(others)), 4),
    }


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """The coverage of the pipeline in `config.pipeline`, as JSON types."""
    pipeline, kind = load(config), miniature_in(config.pipeline).scenes
    rng = np.random.default_rng(SCENES_SEED)
    scenes = kind.unseen(config.captions, rng)
    side = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
    rendered = np.stack([kind.module.render(scene, side, rng) for scene in scenes])
    restored = through_autoencoder(pipeline, rendered)
    error = float(np.mean((restored.astype(float) - rendered.astype(float)) ** 2))
    result: dict[str, Any] = {
        "pipeline": str(config.pipeline),
        "captions": config.captions,
        "rendered": summary(rendered, scenes, kind),
        "autoencoder": {**summary(restored, scenes, kind), "psnr_db": round(10 * math.log10(255**2 / error), 2)},
    }
    if not config.autoencoder_only:
        images = generate(pipeline, [scene.caption for scene in scenes], config)
        guidance = miniature_in(config.pipeline).guidance if config.guidance is None else config.guidance
        settings = {"steps": config.steps, "guidance": guidance, "text_tokens": config.text_tokens}
        result["generated"] = {**summary(images, scenes, kind), **settings, "scheduler": str(config.scheduler)}
    return result


def write_samples(config: EvaluateConfig, file: Path) -> None:
    """Four images of fixed captions side by side."""
    images = generate(load(config), list(SAMPLES[miniature_in(config.pipeline).scenes]), config)
    Image.fromarray(np.concatenate(list(images), axis=1)).save(file)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path, help="folder in the diffusers layout")
    parser.add_argument("--captions", type=int, default=48)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--guidance", type=float, help="default: the miniature's own")
    parser.add_argument("--text-tokens", type=int, default=TEXT_LENGTH, help="the pipeline's max_sequence_length")
    schedulers = list(SchedulerName)
    parser.add_argument("--scheduler", type=SchedulerName, choices=schedulers, default=SchedulerName.OWN)
    parser.add_argument("--autoencoder-only", action="store_true", help="generate nothing")
    parser.add_argument("--device", default="cpu", help="of torch: cpu or cuda")
    parser.add_argument("--json", type=Path, help="write here instead of to the standard output")
    parser.add_argument("--samples", type=Path, help="also draw four fixed captions into this PNG")
    options = vars(parser.parse_args(arguments))
    json_file, samples_file = options.pop("json"), options.pop("samples")
    config = EvaluateConfig(**options)
    text = json.dumps(evaluate(config), indent=2) + "\n"
    if json_file is None:
        sys.stdout.write(text)
    else:
        json_file.write_text(text)
    if samples_file is not None:
        write_samples(config, samples_file)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    quiet_libraries()
    main()
