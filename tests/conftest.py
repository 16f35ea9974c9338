"""What every test may use: a tiny random transformer of every kind, exported, and what is in tests/fixtures."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the network
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the tools set it; see `cat_pruning.console.run`
if "PYTEST_XDIST_WORKER" in os.environ:  # there are as many workers as cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import functools
import gc
import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from diffusers import (
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tensorrt_stubs import build_stubs

from cat_pruning.checkpoints.library_logs import quiet_diffusers
from cat_pruning.exporter import step_graph
from cat_pruning.exporter.split import Graph
from cat_pruning.families import family_of
from cat_pruning.families.interception import StepModule
from cat_pruning.models import miniatures
from cat_pruning.plugins import onnx_ops
from cat_pruning.step_io import Part

# Fixtures of several rooms; these modules are in tests/fixtures.
pytest_plugins = [
    "pytester",
    "cpu_seconds",
    "store",
    "stored_traces",
    "stored_bundles",
    "step_fixtures",
    "mini_pipelines",
    "family_models",
]

PROMPT = "a large red circle left of a small blue star on a plain black background"

logging.getLogger("torch.onnx").setLevel(logging.ERROR)
logging.getLogger("torch.__trace").propagate = False  # pytest would format thousands of lines of each trace


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many long tests first, so that no worker begins one when the others have nothing left to do."""
    long = Counter(item.path for item in items if item.get_closest_marker("long") is not None)
    items.sort(key=lambda item: -long[item.path])


def pytest_collection_finish() -> None:
    """The libraries' million objects live as long as the process: the collector need not look at each of them again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="session")
def tensorrt_stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what TensorRT's bindings load with here: see `tensorrt_stubs.py`."""
    folder = tmp_path_factory.mktemp("tensorrt_stubs")
    build_stubs(folder)
    return folder


@pytest.fixture(scope="session")
def python_with_bindings(tensorrt_stubs: Path) -> Callable[[str], str]:
    """Runs a program that may import `tensorrt_bindings`, and returns what it prints."""

    def run(program: str) -> str:
        environment = os.environ | {"LD_LIBRARY_PATH": str(tensorrt_stubs)}
        result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


@pytest.fixture
def mini_pipeline() -> StableDiffusion3Pipeline:
    """The untouched diffusers pipeline of sd3-mini, fp32."""
    with quiet_diffusers():
        pipe = StableDiffusion3Pipeline.from_pretrained(
            miniatures()["sd3-mini"], dtype=torch.float32, text_encoder_3=None, tokenizer_3=None
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def make_tiny() -> Callable[..., Any]:
    """`tiny`, for tests, which cannot import it from here."""
    return tiny


@pytest.fixture(scope="session")
def make_tiny_sd3() -> Callable[..., SD3Transformer2DModel]:
    """`tiny("sd3", ...)`."""
    return functools.partial(tiny, "sd3")


@pytest.fixture(scope="session")
def make_bf16() -> Callable[[str], Any]:
    """A tiny transformer in bf16 with one layer of each sort and heads of 16: of sd3.5, pixart-alpha or flux-dev."""
    return lambda kind: tiny(kind, num_layers=1, attention_head_dim=16, **_WIDE[kind.partition("-")[0]]).bfloat16()


@pytest.fixture
def tiny_pixart() -> PixArtTransformer2DModel:
    """A tiny PixArt-Σ, the test's own."""
    return tiny("pixart")  # type: ignore[no-any-return]


@pytest.fixture
def tiny_flux() -> FluxTransformer2DModel:
    """A tiny FLUX.1-dev, the test's own."""
    return tiny("flux-dev")  # type: ignore[no-any-return]


@pytest.fixture(params=["sd3", "sd3.5", "pixart", "pixart-alpha", "flux-dev", "flux-schnell"])
def kind(request: pytest.FixtureRequest) -> str:
    """Every kind of tiny transformer in turn."""
    return str(request.param)


@pytest.fixture
def tiny_transformer(kind: str) -> Any:
    """A tiny transformer of every kind in turn, the test's own."""
    return tiny(kind)


@dataclass(frozen=True)
class TinyExport:
    """A tiny transformer and its files: `{part}.onnx`, and the whole step before it was split as `whole.onnx`."""

    kind: str
    step: StepModule
    directory: Path
    graphs: dict[Part, Graph]


@pytest.fixture(scope="session")
def export_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyExport]:
    """The tiny transformer of a kind, exported in fp32 once for all tests. Read only."""
    return functools.cache(lambda kind: _export_tiny(kind, tmp_path_factory.mktemp(kind)))


@pytest.fixture
def tiny_export(kind: str, export_tiny: Callable[[str], TinyExport]) -> TinyExport:
    """The tiny transformer of every kind in turn, exported in fp32. Read only."""
    return export_tiny(kind)


def _export_tiny(kind: str, directory: Path) -> TinyExport:
    transformer = tiny(kind)
    step = StepModule(transformer, family_of(transformer))
    trace = step_graph.trace_step

    def trace_and_save(*arguments: Any) -> ir.Model:
        model = trace(*arguments)  # which takes longer than all the rest, so once for both
        whole = model.clone()
        onnx_ops.attach_functions(whole)
        ir.save(whole, directory / "whole.onnx", external_data="whole.onnx.data")
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_graph, "trace_step", trace_and_save)
        graphs = step_graph.export_step_graph(step, directory)
    return TinyExport(kind, step, directory, graphs)


_SD3 = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 24,
}
_PIXART = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,  # mean and variance
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 6,  # a third of the width is each of PixArt-α's size embeddings
    "cross_attention_dim": 48,
    "caption_channels": 24,
    "interpolation_scale": 2,
    "use_additional_conditions": False,
}
_FLUX = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (2, 2, 4),
}
_KINDS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "sd3": (SD3Transformer2DModel, _SD3),
    "sd3.5": (SD3Transformer2DModel, _SD3 | {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}),
    "pixart": (PixArtTransformer2DModel, _PIXART),
    "pixart-alpha": (PixArtTransformer2DModel, _PIXART | {"use_additional_conditions": True}),
    "flux-dev": (FluxTransformer2DModel, _FLUX | {"guidance_embeds": True}),
    "flux-schnell": (FluxTransformer2DModel, _FLUX | {"guidance_embeds": False}),
}


_WIDE: dict[str, dict[str, Any]] = {  # what follows from heads of 16
    "sd3.5": {"caption_projection_dim": 64},
    "pixart": {"cross_attention_dim": 96},
    "flux": {"axes_dims_rope": (4, 4, 8), "num_single_layers": 1},
}


def tiny(kind: str, **changes: Any) -> Any:
    """A random transformer of a few small layers; the same on every call."""
    transformer_class, config = _KINDS[kind]
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    try:
        model = transformer_class(**{**config, **changes}).eval()
        torch.nn.init.normal_(model.proj_out.weight, std=0.1)  # a new model's output is almost zero
        for parameter in model.parameters():
            if parameter.dim() == 1:  # a new model's norms are all alike and do nothing
                parameter.data += 0.1 * torch.randn(parameter.shape)
    finally:
        torch.random.set_rng_state(generator_state)
    return model
