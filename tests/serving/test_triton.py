"""A model repository for Triton: its configuration against the published protobuf, its model.py over a stand-in."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format, text_format
from PIL import Image
from serving_server import PROMPT, SMALL
from signing_keys import write_keys
from triton_double import Array, InferenceRequest, Tensor, Triton, TritonError, served

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.changes import sign_bundle
from cat_pruning.bundle.signatures import PublicKey
from cat_pruning.errors import BundleError, OutputError, SettingsError
from cat_pruning.serving import cli
from cat_pruning.serving.config import ServeConfig
from cat_pruning.serving.triton_model import _choose_gpu, config_of
from cat_pruning.serving.triton_repository import as_text, export_repository, model_config

NAME = "sd3-mini"


@pytest.fixture(scope="module")
def repository(served_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("triton") / "models"
    assert cli.main([str(served_bundle), "--export-triton", str(place), "--max-batch", "3", "--max-steps", "50"]) == 0
    return place


def as_json(config: dict[str, Any]) -> dict[str, Any]:
    """As Triton hands a configuration to model.py: the map of parameters is an object."""
    return config | {"parameters": {each["key"]: each["value"] for each in config["parameters"]}}


@pytest.fixture(scope="module")
def triton(repository: Path, served_bundle: Path) -> Iterator[Triton]:
    config = ServeConfig(bundles=(served_bundle,), max_batch=3, max_steps=50)
    with served(repository, NAME, as_json(model_config(NAME, config))) as triton:
        yield triton


TYPES = {"prompt": object, "size": object, "preset": object, "negative_prompt": object, "seed": np.int64}
TYPES |= {"num_inference_steps": np.int32, "guidance_scale": np.float32, "speedup": np.float32}


def request(request_id: str = "", rows: int = 1, **fields: Any) -> InferenceRequest:
    """`SMALL` with some fields changed; a list has a value for each row. Texts come as bytes."""
    given = {name: value if isinstance(value, list) else [value] * rows for name, value in (SMALL | fields).items()}
    tensors = []
    for name, values in given.items():
        column = [[value.encode() if isinstance(value, str) else value] for value in values]
        tensors.append(Tensor(name, np.array(column, TYPES[name])))
    return InferenceRequest(tensors, request_id)


def outputs(response: Any) -> dict[str, Array]:
    assert not response.has_error(), response.error().message()
    return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}


# ------------------------------------------------------------------ the configuration


@pytest.fixture(scope="module")
def protobuf() -> ModuleType:
    """The published ModelConfig. Its package is not imported: that takes gRPC, and an older protobuf."""
    found = importlib.util.find_spec("tritonclient")
    if found is None or not found.submodule_search_locations:
        pytest.skip("tritonclient is not installed: pip install --no-deps tritonclient")
    path = Path(found.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it was made by a protobuf of another version
        spec.loader.exec_module(module)
    return module


def test_the_configuration_is_triton_s(repository: Path, served_bundle: Path, protobuf: ModuleType) -> None:
    read = text_format.Parse((repository / NAME / "config.pbtxt").read_text(), protobuf.ModelConfig())
    config = ServeConfig(bundles=(served_bundle,), max_batch=3, max_steps=50)
    assert read == json_format.ParseDict(as_json(model_config(NAME, config)), protobuf.ModelConfig())
    assert (read.name, read.backend, read.max_batch_size) == (NAME, "python", 3)
    assert [each.name for each in read.input if not each.optional] == ["prompt"]
    assert read.dynamic_batching.max_queue_delay_microseconds == 5000
    policy = read.dynamic_batching.default_queue_policy
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (64, 300_000_000)
    assert policy.timeout_action == protobuf.ModelQueuePolicy.REJECT
    assert read.parameters["max_steps"].string_value == "50"
    assert "EXECUTION_ENV_PATH" not in read.parameters


def test_the_environment_s_line_is_one_of_triton_s(repository: Path, protobuf: ModuleType) -> None:
    text = (repository / NAME / "config.pbtxt").read_text().replace("# parameters", "parameters")
    read = text_format.Parse(text, protobuf.ModelConfig())
    path = "$$TRITON_MODEL_DIRECTORY/environment.tar.gz"
    assert read.parameters["EXECUTION_ENV_PATH"].string_value == path


def test_any_text_is_quoted(protobuf: ModuleType) -> None:
    name = 'a "name"\\ \n é\0'
    assert text_format.Parse(as_text({"name": name}), protobuf.ModelConfig()).name == name


# ------------------------------------------------------------------ the model


def test_images_are_those_of_the_server(triton: Triton, server: Any) -> None:
    """To a level of 255: in a batch of three the sums of a matrix are taken in another order."""

    one, two = triton.infer(request(seed=7), request(rows=2, prompt=["a blue star", PROMPT], seed=[8, 9]))
    drawn = outputs(one) | {"more": outputs(two)["image"]}
    assert drawn["image"].shape == (1, 64, 64, 3)
    assert drawn["more"].shape == (2, 64, 64, 3)
    assert outputs(two)["seed"].tolist() == [[8], [9]]
    answers = [server.post(seed=7), server.post(prompt="a blue star", seed=8), server.post(seed=9)]
    for image, answer in zip((*drawn["image"], *drawn["more"]), answers, strict=True):
        file = base64.b64decode(answer.json()["data"][0]["b64_json"])
        with Image.open(io.BytesIO(file)) as expected:
            assert np.abs(image.astype(int) - np.asarray(expected)).max() <= 1
    assert outputs(one)["steps"].tolist() == [list(answers[0].json()["steps"].values())]


def test_settings_of_a_request(triton: Triton) -> None:
    (response,) = triton.infer(request(speedup=2.0, num_inference_steps=6))
    assert outputs(response)["steps"].tolist() == [[3, 0, 3]]
    (response,) = triton.infer(request(preset="paper", num_inference_steps=10, negative_prompt="a circle"))
    assert outputs(response)["steps"].tolist() == [[8, 2, 0]]


def test_an_error_is_its_requests_own(triton: Triton) -> None:
    good, *bad = triton.infer(request(), request(num_inference_steps=51), request(size="1x1"))
    assert outputs(good)
    assert [response.error().code() for response in bad] == [TritonError.INVALID_ARG] * 2
    assert "num_inference_steps is 51, more than 50" in bad[0].error().message()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": ""}, "prompt"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale: Input should be a finite number"),
        ({"preset": "nonsense"}, "preset: Input should be 'paper', 'refreshed' or 'forecast'"),
        ({"preset": "paper", "speedup": 2.0}, "speedup goes with no preset"),
        ({"size": ["64x64", "128x128"], "rows": 2}, "several sizes"),
    ],
)
def test_requests_that_make_no_sense(triton: Triton, fields: dict[str, Any], said: str) -> None:
    (response,) = triton.infer(request(**fields))
    assert response.error().code() == TritonError.INVALID_ARG
    assert said in response.error().message()


def test_a_client_that_cancels(triton: Triton) -> None:
    asked = request(num_inference_steps=50, size="128x128")

    def cancel() -> None:
        time.sleep(0.15)
        asked.cancelled = True

    thread = threading.Thread(target=cancel)
    thread.start()
    (response,) = triton.infer(asked)
    thread.join()
    assert response.error().code() == TritonError.CANCELLED
    (response,) = triton.infer(request())
    assert outputs(response)


@pytest.mark.parametrize(("seen", "number", "left"), [(None, 1, "1"), ("2,5", 1, "5"), ("GPU-a,GPU-b", 0, "GPU-a")])
def test_an_instance_sees_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, seen: str | None, number: int, left: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen or "")
    _choose_gpu({"model_instance_kind": "GPU", "model_instance_device_id": str(number)})
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left
    _choose_gpu({"model_instance_kind": "CPU", "model_instance_device_id": "0"})
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left


# ------------------------------------------------------------------ the repository


def test_the_repository_is_whole(repository: Path, served_bundle: Path) -> None:
    (model,) = repository.iterdir()
    files = ["1", "README.md", "bundle", "config.pbtxt", "environment.txt"]
    assert sorted(path.name for path in model.iterdir()) == files
    copied = model / "bundle"
    inside = {path.relative_to(copied).as_posix() for path in copied.rglob("*") if path.is_file()}
    assert inside == {path.relative_to(served_bundle).as_posix() for path in served_bundle.rglob("*") if path.is_file()}
    assert json.loads((copied / "manifest.json").read_text())
    lines = (model / "environment.txt").read_text().splitlines()
    assert all(line.count("==") == 1 and "+" not in line for line in lines)
    assert {line.partition("==")[0] for line in lines} >= {"cat-pruning", "torch", "diffusers", "onnxruntime"}


@pytest.fixture
def copied(served_bundle: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(served_bundle, tmp_path / name, copy_function=os.link))


def test_a_model_is_added_and_none_is_replaced(copied: Callable[[str], Path], tmp_path: Path) -> None:
    one, two, place = copied("one"), copied("two"), tmp_path / "models"
    (place / "of-others").mkdir(parents=True)
    assert export_repository(ServeConfig(bundles=(one,)), place) == [place / "one"]
    with pytest.raises(OutputError, match="one is there already"):
        export_repository(ServeConfig(bundles=(two, one)), place)
    assert not (place / "two").exists()
    export_repository(ServeConfig(bundles=(two,)), place)
    assert {path.name for path in place.iterdir()} == {"of-others", "one", "two"}


def test_no_repository_in_a_bundle_or_a_file(copied: Callable[[str], Path], tmp_path: Path) -> None:
    bundle = copied("one")
    with pytest.raises(SettingsError, match=r"--export-triton .* would be among the own files of the bundle"):
        export_repository(ServeConfig(bundles=(bundle,)), bundle / "models")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"--export-triton .* cannot be written"):
        export_repository(ServeConfig(bundles=(bundle,)), tmp_path / "file" / "models")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_bundle_that_must_be_signed(copied: Callable[[str], Path], tmp_path: Path) -> None:
    """By the key that was given to the export, Triton's copy too."""
    private, public = write_keys(tmp_path)
    config = ServeConfig(bundles=(copied("one"),), public_key=public, prompt_cache_mb=0)
    with pytest.raises(BundleError):
        export_repository(config, tmp_path / "models")
    sign_bundle(Bundle.open(config.bundles[0]), private)
    (model,) = export_repository(config, tmp_path / "models")
    given = {"model_config": json.dumps(as_json(model_config("one", config))), "model_repository": str(model)}
    read = config_of(given)
    assert read.prompt_cache_mb == 0
    assert read.public_key is not None
    assert read.public_key.read_bytes() == public.read_bytes()
    assert Bundle.open(read.bundles[0], PublicKey.read(read.public_key)).path == model / "bundle"
