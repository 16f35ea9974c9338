from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file

from cat_pruning.checkpoints.checkpoint import model_names
from cat_pruning.engines.tensorrt_library import tensorrt_library
from cat_pruning.exporter import cli

CatExport = Callable[..., tuple[int, str, list[str]]]
PUBLISHED = r"flux-dev, flux-schnell, pixart-sigma, sd3\.5-large, sd3\.5-medium, sd3"


@pytest.fixture
def refused(cat_export: CatExport, tmp_path: Path) -> Callable[..., None]:
    """Checks that the tool refuses in one line that matches, and leaves nothing at --out or beside it."""

    def check(message: str, *arguments: object) -> None:
        out = tmp_path / "outs" / "bundle"
        code, printed, errors = cat_export(*arguments, "--out", out)
        assert code == 2
        assert printed == ""
        assert len(errors) == 1, errors
        assert errors[0].startswith("cat-export: ")
        assert re.search(message, errors[0]), errors[0]
        assert not out.parent.exists() or not list(out.parent.iterdir())

    return check


def test_the_help_names_every_model(cat_export: CatExport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # or it breaks lines at the names' hyphens
    code, printed, _ = cat_export("--help")
    assert code == 0
    assert ", ".join(["pixart-sigma", "sd3.5-large", "sd3.5-medium", "sd3"]) in " ".join(printed.split())
    assert all(name in printed for name in model_names())


# ------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--resolution", "1024"],
            r"--resolution: '1024': expected HEIGHTxWIDTH in pixels, like 1024x768; see .*--help",
        ),
        (["--resolution", "axb"], "expected HEIGHTxWIDTH"),
        (["--resolution", "100x64"], r"100x64: both sides must be multiples of 8 pixels .*; try 96x64"),
        (["--resolution", "0x64"], "0x64: both sides must be multiples"),
        (["--resolution", "200x64"], "200x64: the model's position table holds 192x192 pixels at most"),
        (["--resolution", "32x32"], "16 tokens, fewer than num_clusters=20; use a larger resolution"),
        (["--keep-ratio", "0"], r"--keep-ratio 0: expected a share of the tokens, > 0; .*--preset forecast"),
        (["--keep-ratio", "1.5"], r"--keep-ratio: '1\.5': expected a number from 0 to 1; see"),
        (["--keep-ratio", "nan"], "--keep-ratio: 'nan': expected a number"),
        (["--keep-ratio", "a third"], "--keep-ratio: 'a third': expected a number"),
        (["--components", "text_encoder,unet"], "--components unet: no part of a pipeline that becomes a graph; known"),
        (["--batch", "0"], "--batch: '0': expected a whole number from 1 to 4096"),
        (["--batch", "1", "--batch", "-2"], "--batch: '-2': expected"),
        (["--text-length", "0"], "--text-length: '0': expected a whole number from 1 to 65536"),
        (["--text-length", "-3"], "--text-length: '-3': expected"),
        (["--text-length", "13"], "--text-length 13: the pipeline makes 14 to 525 text tokens, 269 at its defaults; "),
        (["--text-length", "526"], "--text-length 526: the pipeline makes 14 to 525"),
        (["--text-length", "999999999999"], "--text-length: '999999999999': expected a whole number from 1 to 65536"),
        (["--dtype", "fp8"], r"--dtype: invalid choice: 'fp8' \(choose from '?fp32'?, '?fp16'?, '?bf16'?\)"),
        (["--target", "onnx", "--no-plugin"], "--no-plugin: only TensorRT's plans .*; give --target tensorrt too"),
        (["--target", "onnx", "--refittable"], "--refittable: only plans need it.* takes adapters from any bundle"),
        (["--target", "coreml"], r"invalid choice: 'coreml' \(choose from '?onnx'?, '?tensorrt'?, '?tensorrt_rtx'?\)"),
        (["--quantize", "int4"], r"--quantize: invalid choice: 'int4' \(choose from '?int8'?, '?fp8'?\)"),
        (["--weights-only", "int2"], r"--weights-only: invalid choice: 'int2' \(choose from '?int8'?, '?int4'?\)"),
        (["--quantize", "int8", "--weights-only", "int4"], "--weights-only: not allowed with argument --quantize"),
        (["--quantize", "int8", "--dtype", "fp16"], r"--quantize int8 --dtype fp16: .* in fp32; leave out --dtype"),
        (
            ["--weights-only", "int4", "--target", "onnx", "--target", "tensorrt"],
            "--weights-only int4 --target tensorrt: .* no plans are built from it; give --target onnx, ",
        ),
        (["--verify", "nothing"], r"--verify: invalid choice: 'nothing' .*outputs.*layers"),
        (
            ["--verify", "--dtype", "bf16"],
            r"bf16, and no plan is built that runs here; verify with --dtype fp32",
        ),
        (["--random-weights"], rf"--random-weights needs a published architecture \({PUBLISHED}\), got"),
        (["--revision", "main"], "--revision 'main': .* is a local directory, which has no revisions"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate; see cat-export --help"),
    ],
)
def test_arguments(refused: Callable[..., None], tiny_checkpoint: Path, arguments: list[str], message: str) -> None:
    refused(message, "--model", tiny_checkpoint, *arguments)


def test_a_family_without_control_nets(refused: Callable[..., None], write_checkpoint: Any, tmp_path: Path) -> None:
    message = "--controlnet: PixArtTransformer2DModel takes no ControlNet; leave it out"
    refused(message, "--model", write_checkpoint(tmp_path / "pipeline", "pixart"), "--controlnet")


def test_layers_need_polygraphy(
    refused: Callable[..., None], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the checkpoint is looked for, because what follows is long."""
    monkeypatch.setattr("cat_pruning.installation.find_spec", lambda name: None if name == "polygraphy" else name)
    message = r"--verify .* needs polygraphy, not installed here; pip install 'cat-pruning\[debug\]'$"
    refused(message, "--model", tiny_checkpoint / "nowhere", "--target", "onnx", "--verify", "layers")


def test_no_arguments(cat_export: CatExport) -> None:
    code, _, errors = cat_export()
    assert code == 2
    assert errors == ["cat-export: one of the arguments --model --add-plans is required; see cat-export --help"]


def test_random_weights_of_a_miniature(refused: Callable[..., None]) -> None:
    refused(rf"--random-weights needs a published architecture \({PUBLISHED}\), got 'sd3-mini'", "--model", "sd3-mini",
            "--random-weights")  # fmt: skip


def test_revision_of_a_miniature(refused: Callable[..., None]) -> None:
    refused("--revision 'v1': 'sd3-mini' is a local directory", "--model", "sd3-mini", "--revision", "v1")


# ------------------------------------------------------------------ targets; told before a checkpoint is looked for


@pytest.fixture
def clean_library() -> Iterator[None]:
    """`tensorrt_library` as in a new process, before and after."""
    tensorrt_library.cache_clear()
    yield
    tensorrt_library.cache_clear()


@pytest.mark.parametrize(
    ("flavour", "extra", "title"),
    [("tensorrt_rtx", "tensorrt-rtx", "TensorRT-RTX"), ("tensorrt", "tensorrt", "TensorRT")],
)
@pytest.mark.usefixtures("clean_library")
def test_a_target_that_is_not_installed(
    refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch, flavour: str, extra: str, title: str
) -> None:
    monkeypatch.setitem(sys.modules, flavour, None)
    refused(
        rf"--target {flavour}: {title} cannot be imported here .*; pip install 'cat-pruning\[{extra}\]'$",
        "--model", "nowhere", "--target", flavour,
    )  # fmt: skip


@pytest.mark.usefixtures("clean_library")
def test_a_tensorrt_that_is_too_old(refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.14.1.48"))
    refused(
        r"--target tensorrt: TensorRT 10\.14\.1\.48 is too old, expected 10\.15 or newer; pip install",
        "--model", "nowhere", "--target", "tensorrt",
    )  # fmt: skip


@pytest.mark.parametrize(
    "reason",
    [
        "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU",
        "The NVIDIA driver on your system is too old (found version 11040).\nPlease update your GPU driver",
        "No CUDA GPUs are available",
        "Torch not compiled with CUDA enabled",
    ],
)
@pytest.mark.usefixtures("clean_library")
def test_tensorrt_without_a_gpu(refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    def init() -> None:
        raise RuntimeError(reason)

    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.4.0.106"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    words = re.escape(" ".join(reason.split()))
    refused(
        rf"--target tensorrt: .*torch can use none here \({words}\); run it on that machine, or --target tensorrt_rtx",
        "--model", "nowhere", "--target", "tensorrt",
    )  # fmt: skip


# ------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("model", ["sd9", "./nowhere", "/nowhere/at/all", "a/b/c", ""])
def test_a_model_that_is_nothing(refused: Callable[..., None], model: str) -> None:
    assert {"flux-dev", "pixart-sigma", "sd3", "sd3-mini", "sd3.5-large"} <= set(model_names())
    names = re.escape(", ".join(model_names()))
    refused(rf"--model {model!r}: no such directory, and neither a hub id .*\({names}\)$", "--model", model)


def test_a_directory_that_is_no_pipeline(refused: Callable[..., None], tmp_path: Path) -> None:
    refused(r"is no diffusers pipeline: model_index\.json is missing", "--model", tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model_index.json", "{", r"model_index\.json cannot be read"),
        ("model_index.json", "[]", r"model_index\.json: expected a JSON object"),
        ("model_index.json", '{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet"]}',
         "is a StableDiffusionPipeline without a transformer; supported are .*SD3Transformer2DModel"),
        ("model_index.json", '{"transformer": ["diffusers", "DiTTransformer2DModel"]}',
         "class DiTTransformer2DModel is not supported; supported are SD3Transformer2DModel, "
         "PixArtTransformer2DModel, FluxTransformer2DModel"),
        ("transformer/config.json", None, r"has no transformer: transformer/config\.json is missing"),
        ("transformer/config.json", '{"num_layers": "two"}', r"transformer/config\.json: .* num_layers is two \("),
        ("transformer/config.json", '{"_class_name": null}', "config.json: _class_name is None, expected a"),
        ("transformer/config.json", '{"num_layers": 1000000000}', "num_layers is 1000000000 .*; download"),
        ("vae/config.json", None, r"has no VAE: vae/config\.json is missing"),
        ("vae/config.json", "{}", r"vae/config\.json"),
        ("tokenizer/tokenizer_config.json", None, r"tokenizer_config\.json"),
        ("tokenizer/tokenizer_config.json", "{}", r"tokenizer_config\.json"),
        ("transformer/diffusion_pytorch_model.safetensors", None, r"has no \*\.safetensors weights; download or"),
        ("text_encoder/model.safetensors", None, r"/text_encoder has no \*\.safetensors weights; download or"),
        ("text_encoder/config.json", "{", r"/text_encoder/config\.json cannot be read"),
        ("tokenizer_2/tokenizer.json", "{", "the pipeline cannot be loaded"),
        ("scheduler/scheduler_config.json", None, r"/scheduler is incomplete: scheduler_config\.json is missing"),
    ],
)  # fmt: skip
def test_a_broken_pipeline(
    refused: Callable[..., None], tiny_checkpoint: Path, name: str, content: str | None, message: str
) -> None:
    (tiny_checkpoint / name).unlink()
    if content is not None:
        (tiny_checkpoint / name).write_text(content)
    refused(message, "--model", tiny_checkpoint, "--target", "onnx")


def test_a_part_that_is_not_finite(refused: Callable[..., None], tiny_checkpoint: Path) -> None:
    path = tiny_checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["decoder.conv_in.weight"].view(-1)[5:6].fill_(torch.nan)
    save_file(weights, path, metadata={"format": "pt"})
    message = r"vae/diffusion_pytorch_model\.safetensors: decoder\.conv_in\.weight has values that are not finite; down"
    refused(message, "--model", tiny_checkpoint, "--target", "onnx")


@pytest.mark.parametrize("size", [0, 5, 1000, 20_000])
def test_truncated_weights(refused: Callable[..., None], tiny_checkpoint: Path, size: int) -> None:
    os.truncate(tiny_checkpoint / "transformer" / "diffusion_pytorch_model.safetensors", size)
    refused(r"transformer cannot be loaded \(.+\); download", "--model", tiny_checkpoint, "--target", "onnx")


def hub_error(error: type[Exception]) -> Exception:
    """As the hub's client raises it."""
    if issubclass(error, hub_errors.HfHubHTTPError):
        return error("refused\nfor a reason", response=hub_errors.Response(403, request=SimpleNamespace()))
    return error("refused\nfor a reason")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_errors.GatedRepoError, "some/sd3 at v2 is gated; accept its licence .*`hf auth login`"),
        (hub_errors.RepositoryNotFoundError, "some/sd3 is not on the hub, or is private"),
        (hub_errors.RevisionNotFoundError, "some/sd3 has no revision 'v2'"),
        (hub_errors.LocalEntryNotFoundError, "some/sd3 at v2 is not in the local cache.*cannot be reached"),
        (hub_errors.OfflineModeIsEnabled, "cannot be reached.*check the network, or pass a local directory"),
        (hub_errors.HfHubHTTPError, "some/sd3 at v2"),
        (hub_errors.HTTPError, "some/sd3 at v2"),
        (OSError, "some/sd3 at v2"),
    ],
)
def test_what_the_hub_refuses(
    refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch, error: type[Exception], message: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise hub_error(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused(message, "--model", "some/sd3", "--revision", "v2")


@pytest.mark.parametrize("model", ["sd3", "cat-pruning-tests/nothing-of-this-name"])
def test_offline(refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    refused(r"is not in the local cache and the hub cannot be reached .*pass a local directory", "--model", model)


def test_the_former_name_of_a_target_is_taken_with_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = cli._parser().parse_args(["--model", "sd3", "--target", "rtx", "--target", "onnx"])
    assert arguments.target == ["tensorrt_rtx", "onnx"]
    assert capsys.readouterr().err == "cat-export: --target rtx is spelt tensorrt_rtx, as --engine is\n"
