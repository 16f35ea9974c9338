"""A model repository of Triton Inference Server, which serves bundles by its Python backend."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import cat_pruning
from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.outside import check_directory_outside
from cat_pruning.bundle.signatures import PublicKey
from cat_pruning.errors import OutputError
from cat_pruning.serving.config import ServeConfig
from cat_pruning.serving.triton_model import KINDS, OPTIONAL, PUBLIC_KEY

_BATCH: Final = 4  # where none is given
# What a bundle's results may depend on, at the versions of this installation.
_PACKAGES: Final = ("torch", "diffusers", "transformers", "onnxruntime", "onnx", "numpy", "pillow", "safetensors")
_MODEL: Final = '''\
"""Written by cat-serve --export-triton; all that it does is in the package cat-pruning."""

import triton_python_backend_utils as pb_utils
from cat_pruning.serving.triton_model import Model


class TritonPythonModel:
    """What Triton calls."""

    def initialize(self, args):
        self._model = Model(args, pb_utils)

    def execute(self, requests):
        return self._model.execute(requests)

    def finalize(self):
        self._model.close()
'''
_ENVIRONMENT: Final = """
# Where the Python of Triton's own installation has not what environment.txt lists: pack an environment that has, as
# README.md says, and take the mark from this line.
# parameters: { key: "EXECUTION_ENV_PATH" value: { string_value: "$$TRITON_MODEL_DIRECTORY/environment.tar.gz" } }
"""
_README: Final = """\
# A model for Triton Inference Server

Written by cat-serve --export-triton: `config.pbtxt`, `1/model.py` and the bundle itself. The directory above is
Triton's model repository.

## The environment

`environment.txt` has the versions of the installation that wrote this. cat-pruning needs Python 3.11 or newer, and
Triton's Python backend takes packages of its own Python's version only: `ldd` of its `triton_python_backend_stub` names
it. Either install into the Python of Triton's image,

    python3 -m pip install --constraint environment.txt 'cat_pruning-….whl[serve]'

where the wheel is made in a checkout by `pip wheel --no-deps --wheel-dir dist .`; or pack an environment, and take the
mark from the line with EXECUTION_ENV_PATH in config.pbtxt:

    conda create --prefix ./environment python=3.12 && conda activate ./environment
    PYTHONNOUSERSITE=True pip install --constraint environment.txt 'cat_pruning-….whl[serve]'
    conda-pack --prefix ./environment --output environment.tar.gz

## Start

    tritonserver --model-repository=.. --backend-config=python,shm-default-byte-size=16777216

The shared memory holds the images on their way: 3 bytes a pixel, of all of a batch. In a container raise `--shm-size`
too.

## Ask

Inputs: `prompt` and, where given, `negative_prompt`, `size` (WIDTHxHEIGHT), `num_inference_steps`, `guidance_scale`,
`seed`, `preset` and `speedup`, each of shape (rows, 1). Outputs: `image` (rows, height, width, 3) in 8 bits, `seed`
(rows, 1), and `steps` (rows, 3): how many were full, pruned and forecast. A row is an image; the rows of a request have
one size. The same seed gives the same image.

    import numpy as np, tritonclient.http as triton

    prompt = triton.InferInput("prompt", [1, 1], "BYTES")
    prompt.set_data_from_numpy(np.array([["a blue star"]], object))
    image = triton.InferenceServerClient("localhost:8000").infer("MODEL", [prompt]).as_numpy("image")[0]
"""


class Word(str):
    """A value of an enum in config.pbtxt, which has no quotes there."""

    __slots__ = ()


def export_repository(config: ServeConfig, directory: Path) -> list[Path]:
    """Write a model repository with a model for each bundle, whole or not at all.

    Args:
        config: which bundles; engine, batch, wait, queue, timeout and limits go into each config.pbtxt. The API key
            does not.
        directory: of the repository. Other models may be in it.

    Returns:
        The models' directories.

    Raises:
        BundleError: there is no whole bundle.
        OutputError: a model is there already, or it cannot be written.
        SettingsError: the directory is in a bundle.
    """
    key = None if config.public_key is None else PublicKey.read(config.public_key)
    bundles = {name: Bundle.open(path, key) for name, path in zip(config.names, config.bundles, strict=True)}
    check_directory_outside("--export-triton", directory)
    for name in bundles:
        if os.path.lexists(directory / name):
            raise OutputError(
                f"--export-triton {directory}: {name} is there already", "remove it, or give another directory"
            )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _beside(directory) as part:
            for name, bundle in bundles.items():
                _write_model(part / name, name, bundle, config)
            for name in bundles:
                (part / name).rename(directory / name)
    except OSError as error:
        raise OutputError(
            f"--export-triton {directory} cannot be written ({error.strerror or error})", "give another directory"
        ) from error
    return [directory / name for name in bundles]


@contextmanager
def _beside(directory: Path) -> Iterator[Path]:
    """A directory on the same disk, which is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix=".part-", dir=directory) as part:
        yield Path(part)


def _write_model(place: Path, name: str, bundle: Bundle, config: ServeConfig) -> None:
    (place / "1").mkdir(parents=True)
    (place / "1" / "model.py").write_text(_MODEL, encoding="utf-8")
    text = as_text(model_config(name, config)) + _ENVIRONMENT
    (place / "config.pbtxt").write_text(text, encoding="utf-8")
    if config.public_key is not None:
        shutil.copyfile(config.public_key, place / PUBLIC_KEY)
    (place / "README.md").write_text(_README, encoding="utf-8")
    (place / "environment.txt").write_text("".join(_versions()), encoding="utf-8")
    shutil.copytree(bundle.path, place / "bundle", copy_function=shutil.copyfile)


def _versions() -> Iterator[str]:
    yield f"cat-pruning=={cat_pruning.__version__}\n"
    for name in _PACKAGES:
        try:
            yield f"{name}=={version(name).partition('+')[0]}\n"  # a local version is on no index
        except PackageNotFoundError:  # of another distribution's name
            continue


def model_config(name: str, config: ServeConfig) -> dict[str, Any]:
    """A model's `ModelConfig`, as its protobuf has it.

    Triton gathers requests for up to `config.max_wait_ms`; those that wait longer than the timeout, or find the queue
    full, are refused. There is an instance for each GPU, or one without a GPU.
    """
    most = config.max_batch or _BATCH
    parameters = {
        "bundle": "bundle",
        "engine": config.engine,
        "max_batch": most,
        "timeout_s": config.timeout_s,
        "max_steps": config.max_steps,
        "max_prompt_chars": config.max_prompt_chars,
        "prompt_cache_mb": config.prompt_cache_mb,
        "max_pixels": config.max_pixels or "",
        "public_key": "" if config.public_key is None else PUBLIC_KEY,
    }
    optional = [
        {"name": each, "data_type": Word(kind), "dims": [1], "optional": True} for each, kind in OPTIONAL.items()
    ]
    return {
        "name": name,
        "backend": "python",
        "max_batch_size": most,
        "input": [{"name": "prompt", "data_type": Word("TYPE_STRING"), "dims": [1]}, *optional],
        "output": [
            {"name": "image", "data_type": Word("TYPE_UINT8"), "dims": [-1, -1, 3]},
            {"name": "seed", "data_type": Word("TYPE_INT64"), "dims": [1]},
            {"name": "steps", "data_type": Word("TYPE_INT32"), "dims": [len(KINDS)]},
        ],
        "instance_group": [{"count": 1, "kind": Word("KIND_AUTO")}],
        "dynamic_batching": {
            "max_queue_delay_microseconds": round(config.max_wait_ms * 1e3),
            "default_queue_policy": {
                "timeout_action": Word("REJECT"),
                "default_timeout_microseconds": round(config.timeout_s * 1e6),
                "allow_timeout_override": True,
                "max_queue_size": config.queue,
            },
        },
        "parameters": [{"key": key, "value": {"string_value": str(value)}} for key, value in parameters.items()],
    }


def as_text(message: dict[str, Any], indent: str = "") -> str:
    """A message in protobuf's text format."""
    lines = []
    for name, value in message.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict):
                lines.append(f"{indent}{name} {{\n{as_text(each, indent + '  ')}{indent}}}\n")
            else:
                lines.append(f"{indent}{name}: {_scalar(each)}\n")
    return "".join(lines)


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and not isinstance(value, Word):
        escaped = "".join(
            chr(byte) if 32 <= byte < 127 and chr(byte) not in '"\\' else f"\\{byte:03o}" for byte in value.encode()
        )
        return f'"{escaped}"'
    return str(value)
