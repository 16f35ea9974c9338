"""Teach the text encoders of sd3-mini-256 to read, before the transformer learns to paint.

    python training/teach_captions.py build/grown-128 build/taught-128

At each place's word, the hidden states that the transformer reads shall tell the thing there, and the pooled embedding
the ground and which places are taken: linear heads, which are thrown away, predict them. Otherwise the transformer has
to teach it through the images: 275 steps of 16 images did not.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from cat_pruning.models.rich_scenes import (
    COLORS,
    PLACES,
    SIZES,
    TEXTURES,
    RichScene,
    is_held_out,
    sample_scene,
)
from cat_pruning.models.scenes import GROUNDS, SHAPES
from mini_models import quiet_libraries
from mini_sd3 import Sd3Denoiser, Sd3Mini256

logger = logging.getLogger("teach_captions")

BATCH = 64
LOG_EVERY = 10  # steps
WARMUP_STEPS = 30
# What a thing's words say, in their order, and what the ground's do.
THING = {
    name: list(words) for name, words in (("size", SIZES), ("texture", TEXTURES), ("color", COLORS), ("shape", SHAPES))
}
GROUND = {"texture": list(TEXTURES), "ground": list(GROUNDS)}


class Reader(nn.Module):
    """Linear heads on what the transformer gets of a caption."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.of_thing = nn.ModuleDict({name: nn.Linear(width, len(words)) for name, words in THING.items()})
        self.of_ground = nn.ModuleDict({name: nn.Linear(width, len(words)) for name, words in GROUND.items()})
        self.taken = nn.Linear(width, len(PLACES))

    def forward(self, hidden_states: Tensor, pooled: Tensor, scenes: list[RichScene], places: Tensor) -> Tensor:
        """The mean cross-entropy of all that the heads predict.

        Args:
            hidden_states: of both encoders, (B, T, D).
            pooled: of both, (B, D).
            scenes: of the captions.
            places: where the words of places are, bool (B, T); in the scenes' order.
        """
        at_places, things = hidden_states[places], [thing for scene in scenes for thing in scene.things]
        losses = [_cross_entropy(head, at_places, things, name, THING) for name, head in self.of_thing.items()]
        losses += [_cross_entropy(head, pooled, scenes, name, GROUND) for name, head in self.of_ground.items()]
        taken = torch.tensor([[float(p in {t.place for t in scene.things}) for p in PLACES] for scene in scenes])
        losses.append(functional.binary_cross_entropy_with_logits(self.taken(pooled), taken))
        return torch.stack(losses).mean()


def teach(
    denoiser: Sd3Denoiser, tokenizer: PreTrainedTokenizerBase, steps: int, peak_lr: float, seed: int = 0
) -> float:
    """Train both text encoders in place on captions that are not held out; returns the last step's loss."""
    encoders = (denoiser.text_encoder.train(), denoiser.text_encoder_2.train())
    torch.manual_seed(seed)
    reader = Reader(sum(each.config.hidden_size for each in encoders))
    parameters = [parameter for model in (*encoders, reader) for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    place_ids = torch.tensor(tokenizer.convert_tokens_to_ids([f"{place}</w>" for place in PLACES]))
    rng = np.random.default_rng((seed, steps))
    for step in range(steps):
        scenes = _sampled(rng)
        options = {"padding": "max_length", "max_length": Sd3Mini256.text_length, "return_tensors": "pt"}
        input_ids = tokenizer([scene.caption for scene in scenes], **options).input_ids
        encoded = [model(input_ids, output_hidden_states=True) for model in encoders]
        hidden_states = torch.cat([each.hidden_states[-2] for each in encoded], dim=-1)
        pooled = torch.cat([each.text_embeds for each in encoded], dim=-1)
        loss = reader(hidden_states, pooled, scenes, torch.isin(input_ids, place_ids))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / steps)
        optimizer.step()
        if step % LOG_EVERY == 0 or step == steps - 1:
            logger.info("step %d  loss %.4f", step, loss.item())
    return loss.item()


def _sampled(rng: np.random.Generator) -> list[RichScene]:
    scenes: list[RichScene] = []
    while len(scenes) < BATCH:
        if not is_held_out(scene := sample_scene(rng)):
            scenes.append(scene)
    return scenes


def _cross_entropy(head: nn.Module, states: Tensor, named: list[Any], name: str, words: dict[str, list[str]]) -> Tensor:
    targets = torch.tensor([words[name].index(getattr(each, name)) for each in named])
    return functional.cross_entropy(head(states), targets)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a pipeline of sd3-mini-256")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--peak-lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    miniature = Sd3Mini256()
    pipeline = miniature.load_pipeline(options.source)
    denoiser = miniature.denoiser_of(pipeline)
    teach(denoiser, pipeline.tokenizer, options.steps, options.peak_lr)
    miniature.save_pipeline(options.out, denoiser, pipeline.vae, pipeline.tokenizer)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    quiet_libraries()
    main()
