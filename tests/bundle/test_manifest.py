from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from cat_pruning.bundle.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest, read_manifest
from cat_pruning.bundle.schema import FileSpec, PipelineSpec, PlanSpec, Source
from cat_pruning.dtype import DType
from cat_pruning.errors import BundleError
from cat_pruning.schedule import Schedule
from cat_pruning.settings import Pooling, PruneSettings
from cat_pruning.step_io import Part, StepDims

TEXT = {"name": "encoder_hidden_states", "dtype": "FLOAT16", "shape": ["batch", "text_length", 24]}
TIMESTEP = {"name": "timestep", "dtype": "FLOAT", "shape": ["batch"]}
PROMPT_STATES = {"name": "prompt_states_0", "dtype": "FLOAT16", "shape": [2, "batch", "text_length", 64]}
TIMESTEP_STATES = {"name": "timestep_states_0", "dtype": "FLOAT16", "shape": [22, "batch", 1, 64]}

LATENTS = {"name": "latents", "dtype": "FLOAT16", "shape": ["batch", 16, "latent_height", "latent_width"]}
IMAGE = {"name": "image", "dtype": "FLOAT16", "shape": ["batch", 3, "height", "width"]}
MOMENTS = {"name": "moments", "dtype": "FLOAT16", "shape": ["batch", 32, "latent_height", "latent_width"]}
VAE: list[dict[str, Any]] = [
    {"component": "vae_decoder", "file": "vae_decoder.onnx", "inputs": [LATENTS], "outputs": [IMAGE]},
    {"component": "vae_encoder", "file": "vae_encoder.onnx", "inputs": [IMAGE], "outputs": [MOMENTS]},
]
IDS, MASK = (
    {"name": name, "dtype": "INT32", "shape": ["batch", "text_length"]} for name in ("input_ids", "attention_mask")
)
LAST = {"name": "last_hidden_state", "dtype": "FLOAT16", "shape": ["batch", "text_length", 64]}
T5: dict[str, Any] = {
    "component": "text_encoder_3", "file": "text_encoder_3.onnx", "inputs": [IDS, MASK], "outputs": [LAST],
    "text_lengths": [1, 13, 512],
}  # fmt: skip

# As it lies on disk: a small SD3, 256 tokens at 256 x 256, 76 of them kept.
FIELDS: dict[str, Any] = {
    "format_version": 7,
    "family": "sd3",
    "source": {
        "kind": "hub",
        "location": "some/sd3",
        "revision": "0123abcd",
        "seed": None,
        "loras": [{"path": "/adapters/ink.safetensors", "scale": 0.5}],
        "in_memory": False,
    },
    "transformer_class": "SD3Transformer2DModel",
    "transformer_config": {"num_layers": 2, "dual_attention_layers": [0, 1], "qk_norm": None},
    "dtype": "fp16",
    "quantization": None,
    "calibration": None,
    "unquantized": [],
    "guidance": True,
    "settings": PruneSettings().to_dict() | {"fresh_quotas": [0.15, 0.1, 0.05], "schedule": None},
    "geometry": {
        "pixels_per_latent": 8,
        "patch_size": 2,
        "latent_channels": 16,
        "max_latent_size": 32,
        "text_length": 13,
    },
    "graphs": [
        {"part": "prompt", "file": "prompt.onnx", "inputs": [TEXT], "outputs": [PROMPT_STATES]},
        {"part": "timestep", "file": "timestep.onnx", "inputs": [TIMESTEP], "outputs": [TIMESTEP_STATES]},
        {
            "part": "step",
            "file": "step.onnx",
            "inputs": [
                {"name": "keep_indices", "dtype": "INT32", "shape": ["batch", "num_kept"]},
                {"name": "key_cache_0", "dtype": "FLOAT16", "shape": ["batch", "joint_rows", 64]},
                PROMPT_STATES,
                TIMESTEP_STATES,
            ],
            "outputs": [{"name": "key_cache_0_out", "dtype": "FLOAT16", "shape": ["batch", "joint_rows", 64]}],
        },
    ],
    "profiles": [
        {
            "name": "256x256",
            "height": 256,
            "width": 256,
            "prompts": 1,
            "batch": 2,
            "latent_height": 32,
            "latent_width": 32,
            "num_tokens": 256,
            "num_kept": 76,
            "text_length": 13,
        }
    ],
    "macs": [
        {
            "profile": "256x256",
            "full_linear": 600,
            "full_attention": 290,
            "pruned_linear": 210,
            "pruned_attention": 100,
            "prompt_linear": 7,
            "timestep_linear": 5,
        }
    ],
    "components": [],
    "plans": [
        {
            "part": "step",
            "flavour": "tensorrt_rtx",
            "version": "1.7.0",
            "architectures": ["sm80", "sm120"],
            "token_ops": "function",
            "plugin_layers": None,
            "attention": "fused",
            "fused_attention": 48,
            "scratch_bytes": 1000,
            "score_bytes": 2000,
            "refittable": False,
            "file": "rtx.plan",
        }
    ],
    "pipeline": {"kind": "copied", "path": "pipeline", "hub_id": None, "revision": None, "variant": None},
    "schedules": [],
    "versions": {"torch": "2.13.0"},
    "files": {
        "prompt.onnx": {"size": 1, "sha256": "3" * 64},
        "timestep.onnx": {"size": 2, "sha256": "4" * 64},
        "step.onnx": {"size": 3, "sha256": "0" * 64},
        "rtx.plan": {"size": 4, "sha256": "1" * 64},
        "pipeline/vae/config.json": {"size": 5, "sha256": "2" * 64},
    },
}


def changed(path: str, value: object) -> dict[str, Any]:
    """FIELDS with one value replaced, found by its dotted path."""
    fields = json.loads(json.dumps(FIELDS))  # deepcopy would keep tensors shared by two graphs shared
    *parents, last = path.split("/")
    place: Any = fields
    for key in parents:
        place = place[int(key) if isinstance(place, list) else key]
    place[int(last) if isinstance(place, list) else last] = value
    return fields


def write(directory: Path, fields: object) -> Path:
    (directory / MANIFEST_NAME).write_text(json.dumps(fields), encoding="utf-8")
    return directory


def test_round_trip_through_disk(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path, FIELDS))
    assert json.loads(manifest.model_dump_json()) == FIELDS
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
    assert manifest.dtype is DType.FP16
    assert manifest.settings == PruneSettings()
    assert manifest.settings.pooling is Pooling.MAX


def test_round_trip_of_settings_that_are_not_the_papers(tmp_path: Path) -> None:
    settings = PruneSettings(
        keep_ratio=0.5,
        pooling=Pooling.MEAN,
        fresh_quotas=(0.2, 1 / 3),
        schedule=Schedule.of(28, (0, 12, 20)),
        num_clusters=7,
    )
    manifest = read_manifest(write(tmp_path, FIELDS | {"settings": settings.to_dict(), "macs": [], "profiles": [
        FIELDS["profiles"][0] | {"num_kept": settings.num_kept(256)}
    ]}))  # fmt: skip
    assert manifest.settings == settings
    assert Manifest.model_validate_json(manifest.model_dump_json()).settings == settings


def test_a_manifest_built_in_python_equals_what_is_read_back() -> None:
    manifest = Manifest.model_validate_json(json.dumps(FIELDS))
    fields = dict(manifest) | {"transformer_config": {"dual_attention_layers": (0, 1)}, "plans": list(manifest.plans)}
    built = Manifest(**fields)
    assert built.transformer_config == {"dual_attention_layers": [0, 1]}
    assert Manifest.model_validate_json(built.model_dump_json()) == built


@pytest.mark.parametrize("value", [float("nan"), Path("x"), object()])
def test_a_config_that_json_cannot_hold_is_refused(value: object) -> None:
    manifest = Manifest.model_validate_json(json.dumps(FIELDS))
    with pytest.raises(ValidationError, match="transformer_config"):
        Manifest(**(dict(manifest) | {"transformer_config": {"value": value}}))


def test_it_is_frozen() -> None:
    manifest = Manifest.model_validate_json(json.dumps(FIELDS))
    with pytest.raises(ValidationError, match="frozen"):
        manifest.family = "pixart"


def test_derived_values() -> None:
    manifest = Manifest.model_validate_json(json.dumps(FIELDS))
    profile, macs = manifest.profiles[0], manifest.macs[0]
    assert (macs.full_total, macs.pruned_total) == (890, 310)
    dims = StepDims.of(batch=2, latent_height=32, latent_width=32, patch_size=2, text_length=13, num_kept=76)
    assert manifest.graph(Part.PROMPT).input_shapes(dims) == {"encoder_hidden_states": (2, 13, 24)}
    assert manifest.graph(Part.TIMESTEP).input_shapes(dims) == {"timestep": (2,)}
    assert manifest.graph(Part.STEP).input_shapes(dims) == {
        "keep_indices": (2, 76),
        "key_cache_0": (2, 256 + 13, 64),
        "prompt_states_0": (2, 2, 13, 64),
        "timestep_states_0": (22, 2, 1, 64),
    }
    assert profile.model_copy(update={"width": 512}).resolution == "256x512"


@pytest.mark.parametrize(
    ("dtype", "expected", "num_bytes"),
    [(DType.FP32, torch.float32, 4), (DType.FP16, torch.float16, 2), (DType.BF16, torch.bfloat16, 2)],
)
def test_dtype(dtype: DType, expected: torch.dtype, num_bytes: int) -> None:
    assert dtype.torch is expected
    assert dtype.num_bytes == num_bytes == expected.itemsize


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("guidence", True, "guidence: Extra inputs"),
        ("profiles/0/heigth", 256, r"profiles\.0\.heigth: Extra inputs"),
        ("dtype", "fp8", "dtype: Input should be 'fp32', 'fp16' or 'bf16'"),
        ("dtype", None, "dtype:"),
        ("guidance", "yes", "guidance: Input should be a valid boolean"),
        ("family", "", "family:"),
        ("source/kind", "ftp", r"source\.kind: Input should be 'directory'"),
        ("source/kind", "random", "source: .*need a seed"),
        ("settings", [], "settings: .*expected an object"),
        ("settings/keep_ratio", 1.5, r"settings: .*keep_ratio=1\.5: expected a number in \[0, 1\]"),
        ("settings/keep_ratio", "0.3", "settings: .*keep_ratio='0.3': expected a number"),
        ("settings/keep_ration", 0.3, "settings: .*unknown settings keep_ration"),
        ("geometry/patch_size", 0, r"geometry\.patch_size: .*greater than 0"),
        ("graphs/0/part", "image", r"graphs\.0\.part: Input should be 'prompt', 'timestep' or 'step'"),
        ("graphs/0/part", "step", "graphs of step, timestep, step; expected one each of prompt, timestep, step"),
        ("graphs", FIELDS["graphs"][:2], "graphs of prompt, timestep; expected one each of prompt, timestep, step"),
        ("graphs", [*FIELDS["graphs"], FIELDS["graphs"][0]], "graphs of prompt, timestep, step, prompt; expected one"),
        ("graphs/0/file", "../prompt.onnx", r"graphs\.0\.file: .*not a path inside the bundle"),
        ("graphs/1/file", "other.onnx", r"graphs that are not among the files: other\.onnx"),
        ("graphs/2/inputs/0/name", "", r"graphs\.2\.inputs\.0\.name:"),
        (
            "graphs/2/inputs/0/shape",
            ["batch", "num_keep"],
            "'num_keep' is no dimension; known are batch, latent_height",
        ),
        ("graphs/2/inputs/1/shape", ["batch", "joint_rows", 0], r"graphs\.2\.inputs\.1\.shape\.2.*greater than 0"),
        ("graphs/0/outputs/0/name", "other", "the step does not take other"),
        ("graphs/0/outputs/0/shape", [3, "batch", "text_length", 64], "the step does not take prompt_states_0"),
        ("graphs/1/outputs/0/dtype", "FLOAT", "the step does not take timestep_states_0"),
        ("graphs/2/inputs", FIELDS["graphs"][2]["inputs"][:2], "does not take prompt_states_0, timestep_states_0"),
        ("profiles", [], "profiles:"),
        ("profiles/0/height", "256", r"profiles\.0\.height: Input should be a valid integer"),
        ("profiles/0/height", 512, "profile 256x256: height is 512, the other fields make it 256"),
        ("profiles/0/latent_width", 31, "profile 256x256: width is 256, the other fields make it 248"),
        ("profiles/0/num_tokens", 255, "profile 256x256: num_tokens is 255, the other fields make it 256"),
        ("profiles/0/num_kept", 77, "profile 256x256: num_kept is 77, the other fields make it 76"),
        ("profiles/0/batch", 1, "profile 256x256: batch is 1, the other fields make it 2"),
        ("geometry/max_latent_size", 16, "latent_height is 32, the other fields make it 16"),
        ("profiles", FIELDS["profiles"] * 2, "two profiles of one name"),
        ("macs/0/profile", "512x512", "macs of unknown profiles 512x512; known are 256x256"),
        ("macs/0/prompt_linear", -1, r"macs\.0\.prompt_linear: .*greater than or equal to 0"),
        ("plans/0/part", "image", r"plans\.0\.part: .*'image' is no graph; known are prompt, timestep, step, text_e"),
        ("plans/0/part", "text_encoder", "plans of text_encoder, of which there is no graph"),
        ("components", [VAE[0]], "vae has no graph vae_encoder, and no weights without it"),
        ("components", [*VAE, VAE[1]], "two graphs of one component: vae_decoder, vae_encoder, vae_encoder"),
        ("components", VAE, "graphs that are not among the files: vae_decoder.onnx, vae_encoder.onnx"),
        ("components", [VAE[0] | {"component": "vae"}, VAE[1]], r"components\.0\.component: Input should be 'text_e"),
        ("components", [VAE[0] | {"inputs": [VAE[0]["inputs"][0] | {"shape": ["rows"]}]}, VAE[1]], "'rows' is no dim"),
        ("components", [T5], "graphs that are not among the files: text_encoder_3.onnx"),
        (
            "components",
            [T5 | {"file": "step.onnx"}],
            "text_encoder_3 is the file step.onnx, expected text_encoder_3.onn",
        ),
        ("components", [T5 | {"inputs": [IDS]}], "text_encoder_3 takes input_ids and returns last_hidden_state"),
        ("components", [T5 | {"inputs": [IDS, MASK, MASK]}], "takes input_ids, attention_mask, attention_mask and ret"),
        (
            "components",
            [T5 | {"inputs": [LATENTS], "outputs": [IMAGE]}],
            "text_encoder_3 takes latents and returns ima",
        ),
        (
            "components",
            [T5 | {"outputs": [LAST | {"name": "x"}]}],
            "no graph of a component has a 'x'; known are input",
        ),
        (
            "components",
            [T5 | {"outputs": [LAST | {"dtype": "DOUBLE"}]}],
            r"outputs\.0\.dtype: String should match patt",
        ),
        ("components", [T5 | {"outputs": [LAST | {"shape": ["batch", 64]}]}], "last_hidden_state has the shape"),
        ("components", [T5 | {"inputs": [IDS | {"shape": ["batch", 7]}, MASK]}], "input_ids has the shape"),
        ("components", [T5 | {"text_lengths": [1, 600, 512]}], "has the text lengths .*, expected three, none less th"),
        ("components", [T5 | {"text_lengths": None}], "has the text lengths None, expected three"),
        ("components", [VAE[0] | {"text_lengths": [1, 1, 1]}, VAE[1]], "vae_decoder has the text .*, expected none"),
        ("plans/0/flavour", "openvino", r"plans\.0\.flavour"),
        ("plans/0/architectures", [], r"plans\.0\.architectures: .*at least 1"),
        ("plans/0/architectures/1", "sm_90", r"plans\.0\.architectures\.1: .*match pattern"),
        ("plans/0/plugin_layers", -1, r"plans\.0\.plugin_layers: Input should be greater than or equal to 0"),
        ("plans/0/token_ops", "kernel", r"plans\.0\.token_ops: Input should be 'plugin' or 'function'"),
        ("plans/0/token_ops", "plugin", r"plans\.0: .*TensorRT-RTX has no plugins; expected token_ops 'function'"),
        ("plans/0/file", "other.plan", r"not among the files: other\.plan"),
        ("plans/0/file", "/etc/passwd", r"plans\.0\.file: .*not a path inside the bundle"),
        ("pipeline/path", None, "pipeline: .*'copied' needs path"),
        ("pipeline/path", "pipelin", "no files below the pipeline's pipelin/"),
        ("files", {}, "files: it lists none"),
        ("files/step.onnx/size", -1, r"files\.step\.onnx\.size"),
        ("files/step.onnx/sha256", "00", r"files\.step\.onnx\.sha256"),
    ],
)
def test_an_edited_manifest_is_refused_by_field(tmp_path: Path, path: str, value: object, message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        read_manifest(write(tmp_path, changed(path, value)))
    assert "was edited or is damaged" in str(caught.value)
    assert str(tmp_path / MANIFEST_NAME) in str(caught.value)
    assert f"cat-export --model some/sd3 --out {tmp_path} --force" in str(caught.value)


WITH_DEFAULTS = {"format_version", "macs", "plans", "pipeline", "schedules", "files"}
WITH_DEFAULTS |= {"components", "quantization", "calibration", "unquantized"}


@pytest.mark.parametrize("field", sorted(set(FIELDS) - WITH_DEFAULTS))
def test_a_missing_field_is_refused(tmp_path: Path, field: str) -> None:
    with pytest.raises(BundleError, match=f"{field}: Field required"):
        read_manifest(write(tmp_path, {key: value for key, value in FIELDS.items() if key != field}))


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ("macs/0", "prompt_linear"),
        ("macs/0", "timestep_linear"),
        ("plans/0", "part"),
        ("plans/0", "token_ops"),
        ("graphs/1", "outputs"),
    ],
)
def test_a_missing_field_of_a_record_is_refused(tmp_path: Path, record: str, field: str) -> None:
    name, index = record.split("/")
    fields = {key: value for key, value in FIELDS[name][int(index)].items() if key != field}
    with pytest.raises(BundleError, match=rf"{name}\.{index}\.{field}: Field required"):
        read_manifest(write(tmp_path, changed(record, fields)))


def test_a_missing_setting_is_not_replaced_by_the_default(tmp_path: Path) -> None:
    settings = {key: value for key, value in FIELDS["settings"].items() if key != "keep_ratio"}
    with pytest.raises(BundleError, match=r"settings: .*missing keep_ratio"):
        read_manifest(write(tmp_path, FIELDS | {"settings": settings}))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a//b", "./a", "a/", "", "..\\x", "a\0b"])
def test_a_path_that_leaves_the_bundle_is_refused(tmp_path: Path, name: str) -> None:
    files = FIELDS["files"] | {name: {"size": 1, "sha256": "0" * 64}}
    with pytest.raises(BundleError, match="not a path inside the bundle"):
        read_manifest(write(tmp_path, FIELDS | {"files": files}))


@pytest.mark.parametrize("version", [0, 1, 2, 3, 4, 5, FORMAT_VERSION + 1, "6", None])
def test_another_format_version_is_told_before_the_schema(tmp_path: Path, version: object) -> None:
    fields = {"format_version": version, "source": {"location": "my models/sd3"}, "something": "new", "files": {}}
    with pytest.raises(BundleError) as caught:
        read_manifest(write(tmp_path, fields))
    message = str(caught.value)
    assert f"format version {version!r}, this cat-pruning reads version {FORMAT_VERSION}" in message
    assert f"cat-export --model 'my models/sd3' --out {tmp_path} --force" in message
    assert "something" not in message


@pytest.mark.parametrize("fields", [[], "x", 1, {}, {"source": "x"}, {"source": {"location": 1}}])
def test_json_that_is_no_manifest(tmp_path: Path, fields: object) -> None:
    with pytest.raises(BundleError, match=r"format version None.*cat-export --model"):
        read_manifest(write(tmp_path, fields))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"not json", b"[" * 9999, b"9" * 9999])
def test_not_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(
        BundleError,
        match=r"manifest\.json is not JSON.*or make one: cat-export --model MODEL --out DIR",
    ):
        read_manifest(tmp_path)


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json is missing: not a bundle, or an export.*give the directory"):
        read_manifest(tmp_path)


def test_export_command_makes_the_bundle_again() -> None:
    manifest = Manifest.model_validate_json(json.dumps(FIELDS))
    assert manifest.export_command(Path("/b/sd3")) == (
        "cat-export --model some/sd3 --dtype fp16 --revision 0123abcd --lora /adapters/ink.safetensors:0.5 "
        "--resolution 256x256 --batch 1 --text-length 13 --keep-ratio 0.3 --target tensorrt_rtx --out /b/sd3 --force"
    )
    assert "--target tensorrt_rtx --target tensorrt " in manifest.export_command(Path("/b"), "tensorrt", "tensorrt_rtx")


@pytest.mark.parametrize("token_ops", ["plugin", "function"])
def test_export_command_tells_the_token_operators_of_tensorrt(token_ops: str) -> None:
    plan = FIELDS["plans"][0] | {"flavour": "tensorrt", "architectures": ["sm90"], "token_ops": token_ops}
    manifest = Manifest.model_validate_json(json.dumps(FIELDS | {"plans": [plan]}))
    words = shlex.split(manifest.export_command(Path("/b"), "tensorrt_rtx"))
    assert words[words.index("--target") :][:4] == ["--target", "tensorrt", "--target", "tensorrt_rtx"]
    assert ("--no-plugin" in words) == (token_ops == "function")
    assert "--refittable" not in words
    manifest = Manifest.model_validate_json(json.dumps(FIELDS | {"plans": [plan | {"refittable": True}]}))
    assert "--refittable" in shlex.split(manifest.export_command(Path("/b")))


def test_export_command_tells_what_is_not_the_default() -> None:
    settings = PruneSettings(keep_ratio=0.5, fresh_quotas=(0.2, 0.1), pooling=Pooling.MEAN)
    square = FIELDS["profiles"][0] | {"num_kept": 128, "prompts": 2}
    wide = square | {"name": "wide", "height": 128, "latent_height": 16, "num_tokens": 128, "num_kept": 64}
    fields = FIELDS | {
        "source": {"kind": "random", "location": "my configs/sd3", "seed": 7},
        "guidance": False,
        "settings": settings.to_dict(),
        "profiles": [square, wide],
        "plans": [],
    }
    command = Manifest.model_validate_json(json.dumps(fields)).export_command(Path("out"))
    assert shlex.split(command) == shlex.split(
        "cat-export --model 'my configs/sd3' --dtype fp16 --random-weights --resolution 256x256 --resolution 128x256 "
        "--batch 2 --text-length 13 --keep-ratio 0.5 --no-guidance --out out --force"
    )


@pytest.mark.parametrize(
    ("quantization", "words"), [("int8", "--quantize int8"), ("weights-int4", "--weights-only int4")]
)
def test_commands_of_a_quantized_bundle(quantization: str, words: str) -> None:
    fields = FIELDS | {"dtype": "fp32", "quantization": quantization, "plans": []}
    manifest = Manifest.model_validate_json(json.dumps(fields))
    assert f" {words} " in manifest.export_command(Path("/b"))
    with_plans = manifest.export_command(Path("/b"), "tensorrt")
    assert words not in with_plans  # from which none are built
    assert manifest.add_plans_command(Path("/b"), "tensorrt") == with_plans
    with pytest.raises(ValidationError, match=f"plans of a step in {quantization}, of which none are built"):
        Manifest.model_validate_json(json.dumps(fields | {"plans": FIELDS["plans"]}))


@pytest.mark.parametrize("quantization", ["int8-calibrated", "fp8"])
def test_commands_of_a_calibrated_bundle(quantization: str) -> None:
    """Plans are built from it."""
    more = {"quantization": quantization, "calibration": "my prompts.txt", "unquantized": ["blocks.0.*"]}
    fields = FIELDS | {"dtype": "bf16", **more}
    manifest = Manifest.model_validate_json(json.dumps(fields))
    words = f" --quantize {quantization[:4].strip('-')} --calibrate 'my prompts.txt' --unquantized 'blocks.0.*' "
    assert words in manifest.export_command(Path("/b"), "tensorrt")
    assert manifest.add_plans_command(Path("/b"), "tensorrt").startswith("cat-export --add-plans /b --target tensorrt")
    for wrong in ({"calibration": None}, {"quantization": "int8", "plans": []}, {"quantization": None}):
        with pytest.raises(ValidationError, match=r"a step in (\w|-)+, calibrated by "):
            Manifest.model_validate_json(json.dumps(fields | wrong))


def test_export_command_of_a_bundle_for_control_nets() -> None:
    manifest = Manifest.model_validate_json(json.dumps(FIELDS))
    assert "--controlnet" not in shlex.split(manifest.export_command(Path("/b")))
    residual = {"name": "residual_0", "dtype": "FLOAT16", "shape": ["batch", "num_tokens", 8]}
    graphs = [
        graph | {"inputs": [*graph["inputs"], residual]} if graph["part"] == "step" else graph
        for graph in FIELDS["graphs"]
    ]
    manifest = Manifest.model_validate_json(json.dumps(FIELDS | {"graphs": graphs}))
    assert "--controlnet" in shlex.split(manifest.export_command(Path("/b")))


def test_with_files_is_validated() -> None:
    manifest = Manifest.model_validate_json(json.dumps(FIELDS | {"files": {}}))
    file = FileSpec(size=1, sha256="0" * 64)
    graphs = {f"{part}.onnx": file for part in ("prompt", "timestep", "step")}
    with pytest.raises(ValidationError, match=r"plans that are not among the files: rtx\.plan"):
        manifest.with_files(graphs)
    with pytest.raises(ValidationError, match=r"graphs that are not among the files: prompt\.onnx, timestep\.onnx"):
        manifest.with_files({"step.onnx": file, "rtx.plan": file})
    files = graphs | {"rtx.plan": file, "pipeline/model_index.json": file}
    assert manifest.with_files(files).files == files
    assert manifest.files == {}


def test_parts_say_what_they_lack() -> None:
    with pytest.raises(ValidationError, match="needs hub_id"):
        PipelineSpec(kind="hub")
    with pytest.raises(ValidationError, match="seed"):
        Source(kind="random", location="x")
    with pytest.raises(ValidationError, match="not a path inside"):
        PlanSpec(
            part=Part.STEP,
            flavour="tensorrt",
            version="10.15",
            architectures=("sm90",),
            token_ops="plugin",
            file="../x.plan",
        )
