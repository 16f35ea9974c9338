"""The parts of a pipeline on disk but for its transformer: each is there, whole, and what the index says that it is.

diffusers and transformers fill in a missing weight at random and say so in their logs. Here it is an error that names
the weight. An export checks the parts by their files' headers, on torch's meta device; a pipeline is loaded through
the same function with the weights.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from cat_pruning.checkpoints.library_logs import first_line, quiet_diffusers
from cat_pruning.checkpoints.part_configs import check_pipeline_class, check_scalars, check_together
from cat_pruning.checkpoints.variants import chosen_variant, without_other_variants
from cat_pruning.errors import CheckpointError
from cat_pruning.files import read_json
from cat_pruning.finite import first_not_finite
from cat_pruning.imports import importing

INDEX: Final = "model_index.json"
_AGAIN: Final = "download or convert it again"
_MOST_LAYERS: Final = 1024
_MOST_NAMED: Final = 3  # of many weights that are wrong alike


def read_object(directory: Path, name: str, problem: str) -> dict[str, Any]:
    """A file of a checkpoint that holds a JSON object.

    Args:
        directory: of the checkpoint.
        name: of the file in it.
        problem: what to say of the checkpoint if there is no such file.

    Raises:
        CheckpointError: it is missing, cannot be read, or is something else.
    """
    path = directory / name
    try:
        content = read_json(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{problem}: {name} is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return content


def check_parts(directory: Path, transformer_class: str) -> None:
    """Check that the pipeline in a directory can be loaded, without reading a weight. Needs accelerate.

    Raises:
        CheckpointError: as `load_parts`.
    """
    load_parts(directory, transformer_class, device_map="meta")


def load_parts(
    directory: Path,
    transformer_class: str,
    dtype: torch.dtype | None = None,
    without: Collection[str] = (),
    **options: Any,
) -> Any:
    """The diffusers pipeline in a directory, with None for its transformer.

    Args:
        directory: in the diffusers layout.
        transformer_class: of the transformer that it is to have.
        dtype: of its modules; None for that of their files.
        without: parts that have a config and no weights; None in the pipeline.
        options: for the modules' `from_pretrained`.

    Raises:
        CheckpointError: the index is damaged or names what there is not; a part is missing, pickled, damaged, does not
            fit the others, or its weights are not those of its class; what is wrong, by name.
    """
    index = read_object(directory, INDEX, f"{directory} is no diffusers pipeline")
    pipeline_class = _pipeline_class(directory, index)
    check_pipeline_class(pipeline_class, transformer_class, directory / INDEX)
    needed = {name for name, each in inspect.signature(pipeline_class).parameters.items() if each.default is each.empty}
    if missing := sorted(needed - index.keys() - set(pipeline_class._optional_components)):
        problem = f"{directory / INDEX} names no {', '.join(missing)}, which a {pipeline_class.__name__} has"
        raise CheckpointError(problem, _AGAIN)
    parts: dict[str, Any] = {"transformer": None}
    for part, value in index.items():
        if part.startswith("_") or part == "transformer" or (part not in needed and not isinstance(value, list)):
            continue  # what diffusers notes for itself, and settings of the pipeline's own
        if value == [None, None]:  # SD3 without T5, say
            parts[part] = None
            continue
        part_class = _class_of(directory, part, value)
        _check_files(part_class, directory / part)
        if part in without:
            parts[part] = None
        elif issubclass(part_class, nn.Module):
            parts[part] = load_module(part_class, directory / part, dtype=dtype, **options)
    try:
        with quiet_diffusers():
            pipeline = pipeline_class.from_pretrained(directory, **parts, dtype=dtype, local_files_only=True)
    except Exception as error:  # tokenizers raise whatever they like over a damaged file
        raise CheckpointError(f"{directory}: the pipeline cannot be loaded ({first_line(error)})", _AGAIN) from error
    check_together(pipeline, directory)
    return pipeline


def _pipeline_class(directory: Path, index: dict[str, Any]) -> Any:
    """The class of diffusers that an index names."""
    with importing:
        import diffusers

        name = index.get("_class_name")
        found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
        raise CheckpointError(
            f"{directory / INDEX}: _class_name is {name!r}, which is no pipeline of diffusers {diffusers.__version__}",
            "update diffusers, or " + _AGAIN,
        )
    return found


def class_of_part(directory: Path, part: str) -> Any:
    """The class of diffusers or transformers that a pipeline's index gives a part.

    Raises:
        CheckpointError: the index is damaged or has no such part.
    """
    index = read_object(directory, INDEX, f"{directory} is no diffusers pipeline")
    return _class_of(directory, part, index.get(part))


def _class_of(directory: Path, part: str, value: Any) -> Any:
    """The class that the index gives a part."""
    with importing:
        import diffusers
        import transformers

    libraries = {"diffusers": diffusers, "transformers": transformers}
    named = isinstance(value, list) and len(value) == 2 and all(isinstance(each, str) for each in value)
    found = getattr(libraries.get(value[0]), value[1], None) if named else None
    if not hasattr(found, "from_pretrained"):
        raise CheckpointError(
            f"{directory / INDEX}: {part} is {value!r}; expected a class of diffusers {diffusers.__version__} or "
            f"transformers {transformers.__version__}, as [library, class]",
            "update that library, or " + _AGAIN,
        )
    return found


def _check_files(part_class: Any, folder: Path) -> None:
    """That a part has the files without which transformers and diffusers make it from defaults, or look on the hub."""
    vocabulary: dict[str, str] | None = getattr(part_class, "vocab_files_names", None)
    if vocabulary is None:
        name = getattr(part_class, "config_name", None) or "config.json"
        config = read_object(folder, name, f"{folder} is incomplete")
        for key, value in config.items():
            if "layer" in key and isinstance(value, int) and value > _MOST_LAYERS:  # or they would be made, for hours
                raise CheckpointError(f"{folder / name}: {key} is {value}, expected at most {_MOST_LAYERS}", _AGAIN)
        if part_class.__module__.startswith("diffusers."):  # transformers checks its own
            check_scalars(part_class, config, folder / name)
        return
    read_object(folder, "tokenizer_config.json", f"{folder} is incomplete")
    whole, *apart = sorted(vocabulary.values(), key=lambda name: name != "tokenizer.json")
    if not (folder / whole).is_file() and not (apart and all((folder / name).is_file() for name in apart)):
        raise CheckpointError(f"{folder} has no vocabulary ({whole}, or {' and '.join(apart)})", _AGAIN)


def load_module(module_class: Any, folder: Path, dtype: torch.dtype | None = None, **options: Any) -> Any:
    """A module of diffusers or transformers, with every weight from its files.

    Args:
        module_class: the class.
        folder: with its config and safetensors weights; of several variants, the plain one.
        dtype: of the weights; None for that of the files.
        options: for `from_pretrained`.

    Raises:
        CheckpointError: no weights, pickled ones only, or damaged ones; weights that are missing, of another shape, or
            of more layers than the config has.
    """
    with importing:
        from transformers import PreTrainedModel

    check_has_weights(folder)
    if issubclass(module_class, PreTrainedModel):  # which else tells the shapes in a table, in its log
        options["ignore_mismatched_sizes"] = True
    load = functools.partial(
        module_class.from_pretrained,
        folder,
        variant=chosen_variant(path.name for path in folder.iterdir()),
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **({} if dtype is None else {"dtype": dtype}),
        **options,
    )
    try:
        with quiet_diffusers(errors=False):
            module, told = load()
    except Exception as error:  # of a config that is damaged, whatever it leads to
        raise CheckpointError(
            f"{folder} cannot be loaded ({first_line(error)})", "download or convert it again"
        ) from error
    wrong = {
        "lacks": told["missing_keys"],
        "has in another shape": [name for name, *_ in told["mismatched_keys"]],
        "has, beyond the layers of its config,": _beyond(module, told["unexpected_keys"]),
    }
    for what, names in wrong.items():
        if names:
            more = f" and {len(names) - _MOST_NAMED} more weights" if len(names) > _MOST_NAMED else ""
            raise CheckpointError(f"{folder} {what} {', '.join(sorted(names)[:_MOST_NAMED])}{more}", _AGAIN)
    return module


def check_has_weights(folder: Path) -> None:
    """Check that a part's folder has weights that are no pickles, which can run code.

    Raises:
        CheckpointError: it has none.
    """
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for suffix in ("bin", "pt", "ckpt") for path in folder.glob(f"*.{suffix}"))
        only = f", only pickled ones ({pickled[0]})" if pickled else ""
        raise CheckpointError(f"{folder} has no *.safetensors weights{only}", "download or convert them")


def check_finite(folder: Path) -> None:
    """Check that the weights of a part, as they are loaded from its folder, are finite.

    Of a fp16 file of 4.3 GB in the page cache that took 0.07 to 0.12 CPU-seconds a gigabyte, and its SHA-256 0.7.

    Raises:
        CheckpointError: one is not, by name, or a file is damaged.
    """
    for path in without_other_variants(sorted(folder.glob("*.safetensors"))):
        try:
            with safe_open(path, "pt") as file:
                names = file.keys()
                broken = first_not_finite((name, file.get_tensor(name)) for name in names)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read ({first_line(error)})", _AGAIN) from error
        if broken:
            raise CheckpointError(f"{path}: {broken} has values that are not finite", _AGAIN)


def _beyond(module: nn.Module, names: Any) -> list[str]:
    """The unexpected weights that are of layers beyond the last of a module's; others are of older classes."""
    lengths = {name: len(layers) for name, layers in module.named_modules() if isinstance(layers, nn.ModuleList)}

    def is_beyond(name: str) -> bool:
        steps = name.split(".")
        return any(
            step.isdigit() and int(step) >= lengths.get(".".join(steps[:depth]), len(steps) + int(step) + 1)
            for depth, step in enumerate(steps)
        )

    return [name for name in names if is_beyond(name)]
