"""What is imported when, in fresh interpreters; how long that takes is for benchmarks/bench_startup.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXTRAS = ("accelerate", "jinja2", "matplotlib", "onnx_ir", "onnxscript", "peft", "torchmetrics")
TOOLS = (
    "tools.bundle_cli",
    "tools.doctor_cli",
    "tools.generate_cli",
    "exporter.cli",
    "evaluation.cli",
    "serving.cli",
    "serving.load_cli",
)

_BLOCK = f"""
import sys
for name in {EXTRAS}:
    sys.modules[name] = None  # as Python itself marks what cannot be imported
"""

_ENGINE = """
import sys
import torch
import cat_pruning.runtime.transformer
transformer = {name for name in sys.modules}
import onnxruntime, onnx
from cat_pruning.bundle.bundle import Bundle
from cat_pruning.runtime.engine_choice import engine_from_bundle
from cat_pruning.runtime import pipeline
before = set(sys.modules)
engine_from_bundle(Bundle.open(sys.argv[1]), "onnxruntime").session()
roots = {name.partition(".")[0] for name in set(sys.modules) - before}
heavy = {"diffusers", "transformers", "peft", "scipy", "onnxscript", "onnx_ir", "matplotlib", "torch._dynamo"}
print(*sorted(heavy & (transformer | before)), "|", *sorted(roots), "|",
      *(name for name in transformer if name.startswith("cat_pruning.exporter")))
"""

# What imports ONNX Runtime: the package, and the script in every bundle, which runs without it.
_IMPORTS_ONNXRUNTIME = {
    "package": "import cat_pruning.engines.onnxruntime_sessions, onnxruntime",
    "data loader": (
        f"import runpy; runpy.run_path({str(Path(__file__).parents[1] / 'exporter/data_loader.py')!r}); "
        "import onnxruntime, sys; assert 'cat_pruning' not in sys.modules"
    ),
}

_GENERATE = """
from cat_pruning.tools.generate_cli import main
assert main([sys.argv[1], "a blue star", "-o", sys.argv[2], "--steps", "4", "--full-steps", "3"]) == 0
import torch
from diffusers import SD3Transformer2DModel
import cat_pruning
model = SD3Transformer2DModel(
    sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
    joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4, pos_embed_max_size=8,
)
transformer = cat_pruning.CatTransformer.from_model(model.eval(), cat_pruning.PruneSettings(num_clusters=4))
with torch.no_grad():
    (noise,) = transformer(
        torch.zeros(1, 4, 8, 8), timestep=torch.tensor([1.0]), encoder_hidden_states=torch.zeros(1, 3, 16),
        pooled_projections=torch.zeros(1, 16), return_dict=False,
    )
assert noise.shape == (1, 4, 8, 8)
try:
    transformer.load_lora_adapter({})
except cat_pruning.errors.CatError as error:
    print(error)
print(*(name for name in sys.modules if name.startswith(("cat_pruning.exporter", "cat_pruning.evaluation"))))
"""


def python(code: str, *arguments: object) -> str:
    """What a program prints; it must print nothing to standard error."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    return result.stdout


@pytest.mark.parametrize("tool", TOOLS)
def test_help_needs_no_torch(tool: str) -> None:
    said = python(
        "import contextlib, sys\n"
        f"from cat_pruning.{tool} import main\n"
        "with contextlib.suppress(SystemExit):\n"
        "    main(['--help'])\n"
        "print([name for name in ('torch', 'numpy', 'onnx', 'diffusers') if name in sys.modules])"
    )
    assert said.startswith("usage: cat-")
    assert said.endswith("[]\n")


@pytest.mark.long
def test_the_runtime_imports_torch_and_no_pipeline(mini_bundle: Path) -> None:
    heavy, by_the_engine, exporter = python(_ENGINE, mini_bundle).split("|")
    assert heavy.split() == []
    assert exporter.split() == []
    # The pipeline's libraries are imported meanwhile, by another thread: see `runtime.pipeline`.
    assert set(by_the_engine.split()) <= {"cat_pruning", "encodings", "onnxruntime", "onnx"}


@pytest.mark.parametrize("importer", _IMPORTS_ONNXRUNTIME)
def test_onnxruntime_keeps_no_device_id(importer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    python(_IMPORTS_ONNXRUNTIME[importer])
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.long
def test_bundles_run_and_models_are_wrapped_without_the_extras(mini_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    said = python(_BLOCK + _GENERATE, mini_bundle, out).replace("\n", " ")
    assert out.is_file()
    assert "load_lora_adapter needs peft, not installed here; pip install 'cat-pruning[lora]'" in said
    assert "cat_pruning.exporter" not in said
    assert "cat_pruning.evaluation" not in said
