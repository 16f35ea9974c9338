"""Where weights come from: a packaged miniature, a local diffusers directory, the hub, or random ones.

find_checkpoint    `--model` -> Checkpoint: its family and configs, without its weights
load_transformer   its weights, as a diffusers module
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cat_pruning.bundle.schema import LoraSpec, Source
from cat_pruning.checkpoints.hub import download_checkpoint, is_hub_id, pipeline_snapshot
from cat_pruning.checkpoints.library_logs import first_line
from cat_pruning.checkpoints.lora import fuse_loras
from cat_pruning.checkpoints.parts import check_has_weights, load_module, read_object
from cat_pruning.checkpoints.published import Published, published_models
from cat_pruning.checkpoints.random_weights import random_transformer
from cat_pruning.dtype import DType
from cat_pruning.errors import CheckpointError
from cat_pruning.families import FAMILIES, family_of_class
from cat_pruning.families.configs import check_config
from cat_pruning.families.family import MOST_TEXT, Family
from cat_pruning.finite import first_not_finite
from cat_pruning.imports import diffusers_class
from cat_pruning.models import miniatures

_FORMER_CLASS = "Transformer2DModel"  # of several families; diffusers tells them apart by their norms


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint that was found, without its weights.

    family: bound to the transformer's config. directory: a pipeline in the diffusers layout, or a transformer
    alone; None for random weights.
    components: the pipeline's parts by name. pixels_per_latent: the VAE's factor.
    text_length: T, the text rows of the family's pipeline at its defaults. text_lengths: every T that it makes; of a
    transformer alone, which runs in whatever pipeline, every T there is.
    """

    family: Family
    source: Source
    num_parameters: int
    directory: Path | None
    components: tuple[str, ...]
    pixels_per_latent: int
    text_length: int
    text_lengths: range = range(1, MOST_TEXT + 1)

    @property
    def default_resolution(self) -> int:
        """Side in pixels of the images that the model was trained on."""
        return self.family.default_latent_size * self.pixels_per_latent

    @property
    def transformer_directory(self) -> Path | None:
        """Where the transformer's own files are; None for random weights."""
        return None if self.directory is None else _transformer_directory(self.directory)


def model_names() -> list[str]:
    """Every name that `--model` knows."""
    return sorted([*published_models(), *miniatures()])


def find_checkpoint(
    model: str, *, revision: str | None = None, random_weights: bool = False, loras: tuple[LoraSpec, ...] = ()
) -> Checkpoint:
    """Find the checkpoint that `--model` means, and read its configs.

    Args:
        model: a name of `model_names`, a local diffusers directory (a pipeline, or a transformer alone), or a hub id
            (owner/name).
        revision: branch, tag or commit on the hub; only for hub ids and published names.
        random_weights: a published architecture, without its weights and without the network.
        loras: adapters that `load_transformer` fuses into the weights.

    Raises:
        CheckpointError: nothing of that name, no access, no network, or no transformer of a supported family.
    """
    published = published_models()
    if random_weights:
        if model not in published:
            raise CheckpointError(
                f"--random-weights needs a published architecture ({', '.join(published)}), got {model!r}"
            )
        if loras:
            raise CheckpointError("--lora and --random-weights: an adapter says nothing about random weights")
        return _random(model, published[model])
    checkpoint = _found(model, revision)
    return dataclasses.replace(checkpoint, source=checkpoint.source.model_copy(update={"loras": loras}))


def _found(model: str, revision: str | None) -> Checkpoint:
    published = published_models()
    hub_id = published[model].hub_id if model in published else model
    # A Path of a name too long raises.
    local = miniatures().get(model) or (Path(model) if os.path.isdir(model) else None)  # noqa: PTH112
    if local is not None:
        if revision is not None:
            raise CheckpointError(f"--revision {revision!r}: {model!r} is a local directory, which has no revisions")
        if model in miniatures():
            return _local(local, Source(kind="packaged", location=model))
        return _local(local, Source(kind="directory", location=os.path.realpath(local)))
    if model not in published and not is_hub_id(model):
        raise CheckpointError(
            f"--model {model!r}: no such directory, and neither a hub id (owner/name) nor a known name "
            f"({', '.join(model_names())})"
        )
    directory, commit = download_checkpoint(hub_id, revision)
    return _local(directory, Source(kind="hub", location=hub_id, revision=commit))


def load_transformer(source: Source, dtype: DType) -> nn.Module:
    """Load the transformer's weights, once, directly in `dtype`, and fuse the adapters that belong to them.

    Raises:
        CheckpointError: it is gone, has no safetensors weights, they are damaged, or an adapter does not fit.
    """
    check_source(source)
    if source.kind == "random":
        assert source.seed is not None
        published = published_models()[source.location]
        return random_transformer(published.transformer_class, published.transformer, dtype, source.seed)
    transformer_class, folder = _transformer_of(source)
    module = fuse_loras(load_module(transformer_class, folder, dtype.torch), source.loras)
    check_weights(module, folder, dtype)
    return module.eval()


def pipeline_of(source: Source) -> Path:
    """The directory of the pipeline that weights came from; downloaded if it is on the hub.

    Raises:
        CheckpointError: it is gone, there is none, or the hub cannot be reached.
    """
    check_source(source)
    if source.kind == "hub":
        return pipeline_snapshot(source.location, source.revision)
    if source.kind == "random":
        raise CheckpointError(f"{source.location} of random weights has no other parts", "take another engine")
    return miniatures()[source.location] if source.kind == "packaged" else Path(source.location)


def _transformer_of(source: Source) -> tuple[Any, Path]:
    """The class of diffusers of a checkpoint's transformer, and the folder that it is in."""
    if source.kind == "packaged":
        directory = miniatures()[source.location]
    elif source.kind == "hub":
        directory = download_checkpoint(source.location, source.revision)[0]
    else:
        directory = Path(source.location)
    family = _local(directory, source).family
    return diffusers_class(family.transformer_class), _transformer_directory(directory)


def check_transformer(source: Source) -> None:
    """That `load_transformer` finds every weight, without reading one; what is on the hub is not asked for.

    Raises:
        CheckpointError: as `load_transformer`, but for values that are not finite.
    """
    check_source(source)
    if gone := [lora.path for lora in source.loras if not Path(lora.path).exists()]:
        raise CheckpointError(f"the adapter {gone[0]} is not there any more", "export it again")
    if source.kind in ("directory", "packaged"):
        transformer_class, folder = _transformer_of(source)
        check_has_weights(folder)
        if find_spec("accelerate") is not None:  # the extra of exports; without it, a load reads all weights
            load_module(transformer_class, folder, device_map="meta")


def check_weights(transformer: nn.Module, where: object, dtype: DType) -> None:
    """Check that a transformer's weights are finite in the dtype that they have now.

    Raises:
        CheckpointError: one is not, by name.
    """
    if name := first_not_finite(transformer.state_dict().items()):
        wider = ", or give --dtype bf16, whose range is fp32's" if dtype is DType.FP16 else ""
        problem = f"{where}: {name} has values that are not finite in {dtype}"
        raise CheckpointError(problem, f"download or convert it again{wider}")


def check_source(source: Source) -> None:
    """That the weights of an export can be loaded again, as far as that is known without the hub.

    Raises:
        CheckpointError: they were in memory only, or are gone.
    """
    if source.in_memory:
        raise CheckpointError(
            f"the bundle's weights were those of a module in memory and not of {source.location}",
            "only its exported graphs have them: --engine onnxruntime",
        )
    is_gone = {
        "packaged": source.location not in miniatures(),
        "directory": not Path(source.location).is_dir(),
    }
    if is_gone.get(source.kind):
        raise CheckpointError(f"the checkpoint {source.location} is not there any more", "export it again")
    if source.kind == "random" and source.location not in published_models():
        raise CheckpointError(f"no published architecture is called {source.location}", "export it again")


def _transformer_directory(directory: Path) -> Path:
    return directory / "transformer" if (directory / "model_index.json").is_file() else directory


def _random(name: str, published: Published) -> Checkpoint:
    transformer = _without_weights(published.family, published.transformer)
    return _without_pipeline(transformer, published, Source(kind="random", location=name, seed=0), directory=None)


def _local(directory: Path, source: Source) -> Checkpoint:
    if not (directory / "model_index.json").exists() and (directory / "config.json").exists():
        return _transformer_alone(directory, source)
    index = read_object(directory, "model_index.json", f"{directory} is no diffusers pipeline")
    named = index.get("transformer")
    if not isinstance(named, list) or len(named) != 2 or not named[1]:
        raise CheckpointError(
            f"{directory} is a {index.get('_class_name')} without a transformer; supported are pipelines with a "
            + ", ".join(family.transformer_class for family in FAMILIES)
        )
    transformer_config = read_object(directory, "transformer/config.json", f"{directory} has no transformer")
    family = family_of_class(_class_of(named[1], transformer_config))
    transformer = _without_weights(family, transformer_config)
    bound = family(config_of(transformer))
    vae = read_object(directory, "vae/config.json", f"{directory} has no VAE")
    try:
        pixels_per_latent = 2 ** (len(vae["block_out_channels"]) - 1)
        text_length, text_lengths = bound.pipeline_text_length(directory), bound.pipeline_text_lengths(directory)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{directory}: vae/config.json or tokenizer/tokenizer_config.json is not a {index.get('_class_name')}'s "
            f"({type(error).__name__}: {first_line(error)})",
            "download the checkpoint again",
        ) from error
    return Checkpoint(
        family=bound,
        source=source,
        num_parameters=transformer.num_parameters(),
        directory=directory,
        components=tuple(name for name, value in index.items() if isinstance(value, list) and any(value)),
        pixels_per_latent=pixels_per_latent,
        text_length=text_length,
        text_lengths=text_lengths,
    )


def _transformer_alone(directory: Path, source: Source) -> Checkpoint:
    """A directory that `transformer.save_pretrained` wrote; the rest is as in its family's first published one."""
    config = read_object(directory, "config.json", f"{directory} is no diffusers model")
    family = family_of_class(_class_of(str(config.get("_class_name")), config))
    published = next((each for each in published_models().values() if each.family is family), None)
    if published is None:
        raise CheckpointError(
            f"{directory} is a {family.transformer_class} alone, and no published pipeline has one: nothing says what "
            "its autoencoder and its text are",
            "give the directory of a whole pipeline",
        )
    transformer = _without_weights(family, config)
    return _without_pipeline(transformer, published, source, directory)


def _without_pipeline(transformer: Any, published: Published, source: Source, directory: Path | None) -> Checkpoint:
    """The checkpoint of a transformer alone, in the place of a published pipeline's."""
    return Checkpoint(
        family=published.family(config_of(transformer)),
        source=source,
        num_parameters=transformer.num_parameters(),
        directory=directory,
        components=(),
        pixels_per_latent=published.pixels_per_latent,
        text_length=published.text_length,
    )


def _class_of(name: str, config: dict[str, Any]) -> str:
    """The class of a transformer, by the name that the checkpoint gives it and its config."""
    if name == _FORMER_CLASS:
        for family in FAMILIES:
            if family.former_norm_type and family.former_norm_type == config.get("norm_type"):
                return family.transformer_class
    return name


def config_of(transformer: Any) -> dict[str, Any]:
    """The config of a diffusers module, by diffusers' names, without what diffusers notes for itself."""
    return {key: value for key, value in transformer.config.items() if not key.startswith("_")}


def _without_weights(family: type[Family], config: dict[str, Any]) -> Any:
    """The diffusers module of this config, without memory for its weights."""
    transformer_class = diffusers_class(family.transformer_class)
    if not isinstance(name := config.get("_class_name", ""), str):
        problem = f"transformer/config.json: _class_name is {name!r}, expected a name"
        raise CheckpointError(problem, "download the checkpoint again")
    # As the class itself does, this drops unknown keys and fills in what an old config leaves out.
    told = {name: value for name, value in config.items() if not name.startswith("_")}
    arguments, _, _ = transformer_class.extract_init_dict(told)
    defaults = {name: each.default for name, each in inspect.signature(transformer_class).parameters.items()}
    try:
        check_config(family.config_model, family.transformer_class, defaults | arguments)
    except CheckpointError as error:
        raise CheckpointError(f"transformer/config.json: {error.problem}", "download the checkpoint again") from error
    try:
        # Accelerate's empty weights would still compute the position tables: 3 GiB for SD3.5.
        with torch.device("meta"):
            return transformer_class(**arguments)
    except Exception as error:  # of a config that is damaged, whatever it leads to
        problem = f"is not a {family.transformer_class}'s ({first_line(error)})"
        raise CheckpointError(f"transformer/config.json {problem}", "download the checkpoint again") from error
