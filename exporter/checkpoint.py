"""Where weights come from: a packaged miniature, a local diffusers directory, the hub, or random ones.

find_checkpoint    `--model` -> Checkpoint: its family and configs, without its weights
load_transformer   its weights, as a diffusers module
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import huggingface_hub
import torch
import transformers
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils._validators import validate_repo_id
from safetensors import SafetensorError
from torch import nn

from cat_pruning.dtype import DType
from cat_pruning.engines.manifest import Source
from cat_pruning.errors import CheckpointError
from cat_pruning.exporter.families import FAMILIES, family_of_class
from cat_pruning.exporter.families.family import Family
from cat_pruning.models import miniatures

# What an export reads. The pipeline's other parts stay on the hub; the bundle refers to them by id and revision.
_NEEDED_FROM_HUB = ["model_index.json", "transformer/*", "vae/config.json", "tokenizer/tokenizer_config.json"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was found, without its weights.

    config: the transformer's, by diffusers' names. directory: in the diffusers layout; None for random weights.
    components: the pipeline's parts by name. pixels_per_latent: the VAE's factor.
    text_length: T, the text rows of the family's pipeline at its defaults.
    """

    family: Family
    source: Source
    config: dict[str, Any]
    num_parameters: int
    directory: Path | None
    components: tuple[str, ...]
    pixels_per_latent: int
    text_length: int

    @property
    def default_resolution(self) -> int:
        """Side in pixels of the images that the model was trained on."""
        return int(self.config["sample_size"]) * self.pixels_per_latent


def model_names() -> list[str]:
    """Every name that `--model` knows."""
    return sorted([*(family.name for family in FAMILIES), *miniatures()])


def find_checkpoint(model: str, *, revision: str | None = None, random_weights: bool = False) -> Checkpoint:
    """Find the checkpoint that `--model` means, and read its configs.

    Args:
        model: a name of `model_names`, a local diffusers directory, or a hub id (owner/name).
        revision: branch, tag or commit on the hub; only for hub ids and published names.
        random_weights: the published architecture of a family, without its weights and without the network.

    Raises:
        CheckpointError: nothing of that name, no access, no network, or no pipeline of a supported family.
    """
    published = {family.name: family for family in FAMILIES}
    if random_weights:
        if model not in published:
            raise CheckpointError(
                f"--random-weights needs a published architecture ({', '.join(published)}), got {model!r}"
            )
        return _published(published[model])
    hub_id = published[model].hub_id if model in published else model
    local = miniatures().get(model) or (Path(model) if model and Path(model).is_dir() else None)
    if local is not None:
        if revision is not None:
            raise CheckpointError(f"--revision {revision!r}: {model!r} is a local directory, which has no revisions")
        if model in miniatures():
            return _local(local, Source(kind="packaged", location=model))
        return _local(local, Source(kind="directory", location=str(local.resolve())))
    if model not in published and not _is_hub_id(model):
        raise CheckpointError(
            f"--model {model!r}: no such directory, and neither a hub id (owner/name) nor a known name "
            f"({', '.join(model_names())})"
        )
    directory, commit = _download(hub_id, revision, allow_patterns=_NEEDED_FROM_HUB)
    return _local(directory, Source(kind="hub", location=hub_id, revision=commit))


def load_transformer(source: Source, dtype: DType) -> nn.Module:
    """Load the transformer's weights, once, directly in `dtype`.

    Raises:
        CheckpointError: it is gone, has no safetensors weights, or they are damaged.
    """
    if source.kind == "random":
        assert source.seed is not None
        family = next(family for family in FAMILIES if family.name == source.location)
        return random_transformer(family.transformer_class, _published(family).config, dtype, source.seed)
    if source.kind == "packaged":
        directory = miniatures().get(source.location)
    elif source.kind == "hub":
        directory = _download(source.location, source.revision, allow_patterns=_NEEDED_FROM_HUB)[0]
    else:
        directory = Path(source.location)
    if directory is None or not directory.is_dir():
        raise CheckpointError(f"the checkpoint {source.location} is not there any more; export it again")
    checkpoint = _local(directory, source)
    transformer_class = getattr(diffusers, checkpoint.family.transformer_class)
    if not any((directory / "transformer").glob("*.safetensors")):
        raise CheckpointError(f"{directory / 'transformer'} has no *.safetensors weights; download or convert them")
    try:
        with quiet_diffusers():
            module = transformer_class.from_pretrained(
                directory, subfolder="transformer", dtype=dtype.torch, use_safetensors=True, local_files_only=True
            )
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{directory / 'transformer'} cannot be loaded ({_first_line(error)}); download or convert it again"
        ) from error
    return module.eval()  # type: ignore[no-any-return]


def pipeline_snapshot(hub_id: str, revision: str | None) -> Path:
    """Everything but the transformer's weights of a pipeline on the hub, downloaded once.

    Raises:
        CheckpointError: no access, or no network.
    """
    return _download(hub_id, revision, ignore_patterns=["transformer/*.safetensors", "*.bin", "*.msgpack", "*.onnx*"])[
        0
    ]


def random_transformer(transformer_class: str, config: dict[str, Any], dtype: DType, seed: int) -> nn.Module:
    """A transformer of this architecture with weights from N(0, 0.02²), the same for the same seed on every machine.

    Every parameter has a generator of its own, so that they are filled in parallel. Position tables are real.
    """
    with accelerate.init_empty_weights(include_buffers=False):
        module: nn.Module = getattr(diffusers, transformer_class)(**config)
    names = [name for name, _ in module.named_parameters()]

    def fill(index: int) -> None:
        owner, _, leaf = names[index].rpartition(".")
        parent = module.get_submodule(owner)
        values = torch.empty(getattr(parent, leaf).shape, dtype=dtype.torch)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        setattr(parent, leaf, nn.Parameter(values.normal_(0.0, 0.02, generator=generator), requires_grad=False))

    with ThreadPoolExecutor() as pool:
        list(pool.map(fill, range(len(names))))
    for parent in module.modules():
        for name, buffer in parent.named_buffers(recurse=False):
            parent.register_buffer(name, buffer.to(dtype.torch) if buffer.is_floating_point() else buffer)
    return module.eval()


def _published(family: Family) -> Checkpoint:
    published = json.loads((files("cat_pruning.exporter") / "configs" / family.published_config).read_text())
    return Checkpoint(
        family=family,
        source=Source(kind="random", location=family.name, seed=0),
        config=published["transformer"],
        num_parameters=_without_weights(family, published["transformer"]).num_parameters(),
        directory=None,
        components=(),
        pixels_per_latent=published["pixels_per_latent"],
        text_length=published["text_length"],
    )


def _local(directory: Path, source: Source) -> Checkpoint:
    index = _read_json(directory, "model_index.json", f"{directory} is no diffusers pipeline")
    named = index.get("transformer")
    if not isinstance(named, list) or len(named) != 2 or not named[1]:
        raise CheckpointError(
            f"{directory} is a {index.get('_class_name')} without a transformer; supported are pipelines with a "
            + ", ".join(family.transformer_class for family in FAMILIES)
        )
    family = family_of_class(named[1])
    transformer_config = _read_json(directory, "transformer/config.json", f"{directory} has no transformer")
    transformer = _without_weights(family, transformer_config)
    vae = _read_json(directory, "vae/config.json", f"{directory} has no VAE")
    try:
        pixels_per_latent = 2 ** (len(vae["block_out_channels"]) - 1)
        text_length = family.pipeline_text_length(directory)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{directory}: vae/config.json or tokenizer/tokenizer_config.json is not a {family.pipeline_class}'s "
            f"({type(error).__name__}: {_first_line(error)}); download the checkpoint again"
        ) from error
    return Checkpoint(
        family=family,
        source=source,
        config={key: value for key, value in transformer.config.items() if not key.startswith("_")},
        num_parameters=transformer.num_parameters(),
        directory=directory,
        components=tuple(name for name, value in index.items() if isinstance(value, list) and value[-1]),
        pixels_per_latent=pixels_per_latent,
        text_length=text_length,
    )


def _without_weights(family: Family, config: dict[str, Any]) -> Any:
    """The diffusers module of this config, without memory for its weights."""
    transformer_class = getattr(diffusers, family.transformer_class)
    # As the class itself would: unknown keys dropped, what an old config leaves out filled in.
    arguments, _, _ = transformer_class.extract_init_dict(config)
    try:
        with accelerate.init_empty_weights():
            return transformer_class(**arguments)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        problem = f"is not a {family.transformer_class}'s ({_first_line(error)})"
        raise CheckpointError(f"transformer/config.json {problem}; download the checkpoint again") from error


def _read_json(directory: Path, name: str, problem: str) -> dict[str, Any]:
    path = directory / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{problem}: {name} is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return content


def _is_hub_id(model: str) -> bool:
    try:
        validate_repo_id(model)
    except hub_errors.HFValidationError:
        return False
    return model.count("/") == 1


def _download(
    hub_id: str, revision: str | None, allow_patterns: list[str] | None = None, ignore_patterns: list[str] | None = None
) -> tuple[Path, str]:
    """The snapshot's directory and its commit; the patterns are those of `snapshot_download`."""
    at = f"{hub_id} at {revision}" if revision else hub_id
    try:
        directory = Path(
            huggingface_hub.snapshot_download(
                hub_id, revision=revision, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
        )
    except hub_errors.GatedRepoError as error:
        raise CheckpointError(
            f"{at} is gated: accept its licence on its page on the hub, then log in with `hf auth login`"
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{hub_id} has no revision {revision!r}; see its page on the hub") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise CheckpointError(f"{hub_id} is not on the hub, or is private: check the id, or `hf auth login`") from error
    except (OSError, hub_errors.HTTPError) as error:  # type: ignore[attr-defined]  # not in the cache, no network
        raise CheckpointError(
            f"{at} is not in the local cache and the hub cannot be reached ({_first_line(error)}); "
            "check the network, or pass a local directory as --model"
        ) from error
    return directory, directory.name  # snapshots/COMMIT


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Without the progress bars and hints of a load that the caller reports on itself."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
