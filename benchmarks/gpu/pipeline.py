"""SD3's whole pipeline: text encoders, steps and decoding, by diffusers and with our transformer dropped in."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
from timing import Run, interleaved, medians, ratio, synchronize

from gpu.case import GUIDANCE, Case, shared_case
from gpu.loops import WARM_STEPS
from gpu.setting import Results, Setting
from gpu.text_encoders import Embeddings, TextEncoders, random_vae

IMAGE_FACTOR = 8  # pixels of a side of a latent pixel


def pipeline(setting: Setting) -> Results:
    """An image of 28 steps: encoding two prompts, the pipeline's steps, decoding; and the call as a whole.

    StableDiffusion3Pipeline itself runs, given the prompts' embeddings: without a network there are no tokenizers. What
    an image takes from tokens to pixels is `encode` and `whole`.
    """
    from cat_pruning.runtime.transformer import CatTransformer

    setting = setting.replace(model="sd3")
    case, num_steps, rounds = shared_case(setting), min(setting.steps), min(3, setting.rounds)
    started = time.perf_counter()
    encoders = TextEncoders(setting)
    vae = random_vae(setting)
    synchronize(setting.device)
    yield "seconds_to_make_encoders_and_vae", time.perf_counter() - started
    prompts = [encoders.encode(seed) for seed in (0, 1)]
    yield (
        "parameters",
        {
            "text encoders": sum(each.num_parameters() for each in (*encoders.clips, encoders.t5)),
            "transformer": case.transformer.num_parameters(),
            "vae": vae.num_parameters(),
        },
    )
    transformers: dict[str, Any] = {
        "diffusers": case.transformer,
        "CAT": CatTransformer(case.engine(compiled=False), setting.prune),
        "CAT, compiled": CatTransformer(case.engine(compiled=True), setting.prune),
    }
    runs: dict[str, Run] = {"encode": lambda: [encoders.encode(seed) for seed in (0, 1)]}
    latents = torch.randn_like(case.latents)
    runs["decode"] = functools.partial(_decode, vae, latents)
    for name, transformer in transformers.items():
        pipe = _pipe(transformer, vae, case)
        make = functools.partial(_image, pipe, case, prompts, num_steps)
        for _ in range(2):  # captures
            _image(pipe, case, prompts, min(num_steps, WARM_STEPS), output_type="latent")
        runs[f"{name}, steps"] = functools.partial(make, output_type="latent")
        runs[f"{name}, whole"] = functools.partial(make, output_type="pt")
    times = interleaved(runs, rounds, setting.device, warm_rounds=0 if setting.tiny else 1)
    yield (
        f"{num_steps} steps",
        {
            "ms": medians(times),
            "rounds_ms": times,
            **{name: _speedups(times, name) for name in transformers if name != "diffusers"},
        },
    )


def _speedups(times: dict[str, list[float]], name: str) -> dict[str, float]:
    """Over diffusers: of the pipeline's steps, of its call as a whole, and with the prompts encoded before it."""
    encoded = {each: _sums(times["encode"], times[f"{each}, whole"]) for each in ("diffusers", name)}
    return {
        "speedup_of_steps": ratio(times["diffusers, steps"], times[f"{name}, steps"]),
        "speedup_of_whole": ratio(times["diffusers, whole"], times[f"{name}, whole"]),
        "speedup_with_encoding": ratio(encoded["diffusers"], encoded[name]),
    }


def _sums(one: list[float], other: list[float]) -> list[float]:
    return [a + b for a, b in zip(one, other, strict=True)]


def _pipe(transformer: Any, vae: Any, case: Case) -> Any:
    import diffusers

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    none = dict.fromkeys(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3"))
    pipe = diffusers.StableDiffusion3Pipeline(transformer=case.transformer, scheduler=scheduler, vae=vae, **none)
    pipe.transformer = transformer  # as a user drops it in
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _image(pipe: Any, case: Case, prompts: list[Embeddings], num_steps: int, output_type: str) -> Any:
    positive, negative = prompts
    side = case.setting.grid[0] * case.config["patch_size"] * IMAGE_FACTOR
    return pipe(
        prompt_embeds=positive.rows,
        pooled_prompt_embeds=positive.pooled,
        negative_prompt_embeds=negative.rows,
        negative_pooled_prompt_embeds=negative.pooled,
        height=side,
        width=side,
        num_inference_steps=num_steps,
        guidance_scale=GUIDANCE["sd3"],
        latents=case.latents,
        output_type=output_type,
    ).images


@torch.no_grad()
def _decode(vae: Any, latents: Any) -> Any:
    return vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
