"""Pipelines of sd3-mini around both engines, and what a run of one of them did, step by step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)
from tensorrt_double import TensorRTDouble, write_plan
from torch import Tensor

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.profiles import plan_profiles, profile_spec
from cat_pruning.checkpoints.checkpoint import quiet_diffusers
from cat_pruning.engines import plan as plan_module
from cat_pruning.engines.graph_weights import GraphWeights
from cat_pruning.engines.onnxruntime_engine import OnnxRuntimeStepEngine
from cat_pruning.engines.plan import Plan
from cat_pruning.engines.step_engine import StepEngine, StepSession, TokenChoice
from cat_pruning.engines.tensorrt_engine import TensorRTStepEngine
from cat_pruning.families import family_named
from cat_pruning.models import miniatures
from cat_pruning.runtime.engine_choice import engine_from_bundle
from cat_pruning.runtime.record import StepRecord
from cat_pruning.runtime.transformer import CatTransformer
from cat_pruning.settings import PruneSettings
from cat_pruning.step_io import TIMESTEP, Part, cache_names, output_name

PROMPT = "a large red circle left of a small blue star on a plain black background"
ENGINES = ("onnxruntime", "torch")
TENSORRT_SIZES = ((128, 128), (96, 160))
TENSORRT_KINDS = {"in place": ("tensorrt", True), "two cache sets": ("tensorrt_rtx", False)}


@dataclass
class Sampled:
    """One image: the latents after every step, and the record after every call of the transformer."""

    latents: list[Tensor] = field(default_factory=list)
    calls: list[StepRecord] = field(default_factory=list)

    @property
    def records(self) -> list[StepRecord]:
        """One per step; a scheduler of second order makes two calls of one step."""
        return list(dict.fromkeys(self.calls))

    @property
    def final(self) -> Tensor:
        return self.latents[-1]

    @property
    def kinds(self) -> str:
        """The steps' kinds by their first letters: FFFPPP."""
        return "".join(record.kind.value[0].upper() for record in self.records)

    def same_tokens_as(self, other: Sampled) -> bool:
        mine, others = ([record.keep_indices for record in run.records] for run in (self, other))
        return len(mine) == len(others) and all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))


@pytest.fixture(scope="session")
def engines(mini_bundle: Path) -> dict[str, StepEngine]:
    """Both engines of the bundle, loaded once; sessions are each test's own."""
    bundle = Bundle.open(mini_bundle)
    return {name: engine_from_bundle(bundle, name) for name in ENGINES}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, engines: dict[str, StepEngine]) -> StepEngine:
    """Each engine in turn."""
    return engines[request.param]


@pytest.fixture(scope="session")
def parts() -> dict[str, Any]:
    """The components of the untouched pipeline, loaded once. No test changes them; schedulers are made anew."""
    with quiet_diffusers():
        pipe = StableDiffusion3Pipeline.from_pretrained(
            miniatures()["sd3-mini"], dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
        )
    return dict(pipe.components)


@pytest.fixture(scope="session")
def pipeline(parts: dict[str, Any]) -> Callable[..., Any]:
    """Makes a pipeline around a transformer, or the untouched one around None."""

    def make(transformer: Any = None, pipeline_class: Any = StableDiffusion3Pipeline, scheduler: Any = None) -> Any:
        old = parts["scheduler"]
        changes = {"scheduler": (scheduler or type(old)).from_config(old.config)}
        if transformer is not None:
            changes["transformer"] = transformer
        pipe = pipeline_class(**parts | changes)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture(scope="session")
def drop_in(pipeline: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a pipeline with a new `CatTransformer` over an engine; keywords are those of `PruneSettings`."""

    def make(
        engine: StepEngine, pipeline_class: Any = StableDiffusion3Pipeline, scheduler: Any = None, **s: Any
    ) -> Any:
        return pipeline(CatTransformer(engine, PruneSettings(**s)), pipeline_class, scheduler)

    return make


@pytest.fixture(scope="session")
def sample() -> Callable[..., Sampled]:
    """Runs a pipeline and returns what it did: `sample(pipe, steps=12, ...)`."""

    def run(
        pipe: Any,
        steps: int = 12,
        size: tuple[int, int] = (128, 128),
        prompt: str | list[str] = PROMPT,
        seed: int | list[int] = 0,
        on_step: Callable[[int], None] = lambda step: None,
        **arguments: Any,
    ) -> Sampled:
        sampled = Sampled()

        def after_step(_: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            sampled.latents.append(tensors["latents"].clone())
            on_step(step)
            return {}

        def after_call(module: Any, _: Any, __: Any) -> None:
            if isinstance(module, CatTransformer):
                assert module.last_step is not None
                sampled.calls.append(module.last_step)

        callbacks: dict[str, Any] = {"callback_on_step_end": after_step}
        if isinstance(pipe, (PixArtAlphaPipeline, PixArtSigmaPipeline)):  # theirs are of the older kind
            callbacks = {
                "callback": lambda step, timestep, latents: after_step(pipe, step, timestep, {"latents": latents})
            }
            callbacks |= {"use_resolution_binning": False, "clean_caption": False}
        seeds = [torch.Generator().manual_seed(s) for s in ([seed] if isinstance(seed, int) else seed)]
        hook = pipe.transformer.register_forward_hook(after_call)
        try:
            with warnings.catch_warnings():
                # diffusers' schedulers, of the pair of torch and numpy; nothing that a test is about.
                warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
                pipe(
                    prompt,
                    height=size[0],
                    width=size[1],
                    num_inference_steps=steps,
                    generator=seeds if isinstance(prompt, list) else seeds[0],
                    max_sequence_length=24,
                    output_type="latent",
                    **callbacks,
                    **arguments,
                )
        finally:
            hook.remove()
        return sampled

    return run


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tokens of every step that any session computes meanwhile, side branches' too; cleared by the test."""
    tokens: list[Tensor] = []
    original = StepSession.step

    def step(session: StepSession, latents: Tensor, timestep: float, chosen: Tensor | TokenChoice) -> Tensor:
        noise = original(session, latents, timestep, chosen)
        num_kept = chosen.shape[1] if isinstance(chosen, Tensor) else chosen.num_kept
        tokens.append(session._keep_indices[num_kept].clone())
        return noise

    monkeypatch.setattr(StepSession, "step", step)
    return tokens


@pytest.fixture
def small_graph_runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Part, int]]:
    """Every run of prompt.onnx and timestep.onnx meanwhile, with the number of timesteps; cleared by the test."""
    runs: list[tuple[Part, int]] = []
    original = OnnxRuntimeStepEngine.run

    def run(
        engine: OnnxRuntimeStepEngine, part: Part, inputs: dict[str, Tensor], graphs: Any = None
    ) -> dict[str, Tensor]:
        runs.append((part, inputs[TIMESTEP].unique().numel() if part is Part.TIMESTEP else 0))
        return original(engine, part, inputs, graphs)

    monkeypatch.setattr(OnnxRuntimeStepEngine, "run", run)
    return runs


@pytest.fixture(scope="session")
def image_to_image() -> Any:
    """The pipeline class."""
    return StableDiffusion3Img2ImgPipeline


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> TensorRTDouble:
    double = TensorRTDouble()
    monkeypatch.setattr(plan_module, "tensorrt_library", lambda flavour: double)
    return double


@pytest.fixture
def make_tensorrt(library: TensorRTDouble, mini_bundle: Path, tmp_path: Path) -> Callable[..., TensorRTStepEngine]:
    """Makes an engine of sd3-mini's graphs; as the plugin's, whose caches share memory, or without it.

    combined: not None for refittable plans; see `write_plan`.
    """

    def engine(
        kind: str = "in place",
        sizes: tuple[tuple[int, int], ...] = TENSORRT_SIZES,
        prompts: tuple[int, ...] = (1,),
        kernels: Path | None = None,
        cuda_graphs: bool = False,
        any_shape: bool = False,
        combined: list[list[str]] | None = None,
    ) -> TensorRTStepEngine:
        cpu = torch.device("cpu")
        flavour, in_place = TENSORRT_KINDS[kind]
        manifest = Bundle.open(mini_bundle).manifest
        family = family_named(manifest.family, manifest.transformer_config)
        specs = [
            profile_spec(*size, count, geometry=manifest.geometry, settings=manifest.settings, guidance=True)
            for size in sizes
            for count in prompts
        ]
        plans = {}
        for graph in manifest.graphs:
            shared = cache_names(len(family.caches())) if graph.part is Part.STEP and in_place else []
            file = tmp_path / f"{graph.part}.plan"
            profiles: Any = plan_profiles(graph, specs, manifest.geometry.patch_size)
            if any_shape:
                ranks = {tensor.name: len(tensor.shape) for tensor in graph.inputs}
                profiles = [{name: ((1,) * rank, (1,) * rank, (4096,) * rank) for name, rank in ranks.items()}]
            write_plan(file, mini_bundle / graph.file, profiles, {output_name(name): name for name in shared}, combined)
            plans[graph.part] = Plan(flavour, file, cpu, kernels)  # type: ignore[arg-type]
        return TensorRTStepEngine(
            flavour,  # type: ignore[arg-type]
            plans,
            "plugin" if in_place else "function",
            manifest.graphs,
            family=family,
            dtype=torch.float32,
            device=cpu,
            rebuild="cat-export …",
            cuda_graphs=cuda_graphs,
            weights=None if combined is None else lambda: GraphWeights(mini_bundle),
        )

    return engine
