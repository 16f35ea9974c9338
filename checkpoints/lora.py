"""LoRA adapters fused into a transformer before it is exported (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import logging
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from cat_pruning.bundle.schema import LoraSpec
from cat_pruning.checkpoints.library_logs import first_line, quiet_diffusers
from cat_pruning.errors import CheckpointError, SettingsError
from cat_pruning.families import family_of
from cat_pruning.finite import first_not_finite, is_finite
from cat_pruning.imports import importing

logger = logging.getLogger(__name__)

_PREFIX = "transformer."
_ADAPTED = re.compile(r"\.(?:lora_|lora\.|lokr_)")  # what follows a module's name
_KINDS = re.compile(
    r"\.(lora_A\.weight|lora_B\.(weight|bias)|lora_(down|up)\.weight|lora\.(down|up)\.weight|lokr_\w+|"
    r"lora_magnitude_vector(\.weight)?)$"
)
_HALVES = [("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up")]
_HALVES += [(other, one) for one, other in _HALVES]
_FIRST, _SECOND = (".lora_A.weight", "down.weight"), (".lora_B.weight", "up.weight")
_PEFT_PREFIX = "base_model.model."
_PEFT_WEIGHTS = "adapter_model.safetensors"
_NOT_OF_AN_ADAPTER = ("task_type", "peft_type", "auto_mapping", "base_model_name_or_path", "peft_version")


def parse_lora(text: str) -> LoraSpec:
    """`--lora PATH[:SCALE]`: the adapter and the factor of its change, 1 unless given.

    Raises:
        SettingsError: a scale that is not finite.
    """
    path, colon, number = text.rpartition(":")
    try:
        scale = float(number) if colon else 1.0
    except ValueError:  # a path with a colon
        path, scale = text, 1.0
    if not math.isfinite(scale):
        raise SettingsError(f"--lora {text}: expected a finite scale")
    return LoraSpec(path=os.path.realpath(path or text), scale=scale)


def fuse_loras(transformer: nn.Module, loras: Sequence[LoraSpec]) -> nn.Module:
    """Add each adapter's change of the weights, scale · B A · alpha / r, to `transformer`, in place.

    An adapter is a file that diffusers' pipeline of the family loads (`*.safetensors`; for FLUX Kohya's and XLabs'
    too), or a directory that PEFT wrote (with `adapter_config.json`). What a file has for text encoders is left out,
    with a warning.

    Raises:
        CheckpointError: PEFT is not installed; an adapter is missing, unreadable, damaged, or of another model, be it
            in part; or what it makes of a weight overflows the weight's dtype.
    """
    for lora in loras:
        try:
            with quiet_diffusers(errors=False):
                transformer = _fuse(transformer, lora)
        except ImportError as error:
            raise CheckpointError("--lora: PEFT is not installed here", "pip install 'cat-pruning[lora]'") from error
        except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, SafetensorError) as error:
            raise CheckpointError(
                f"--lora {lora.path} cannot be fused into this {type(transformer).__name__} ({first_line(error)})",
                "give an adapter of this model: a diffusers *.safetensors file or a PEFT directory",
            ) from error
    return transformer


def _fuse(transformer: Any, lora: LoraSpec) -> nn.Module:
    with importing:
        import diffusers.loaders
        import peft

    path = Path(lora.path)
    if (path / "adapter_config.json").is_file():
        weights = read_peft_directory(path)[0]
        check_adapter(weights, transformer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what `_check_layers` refuses
            adapted = peft.PeftModel.from_pretrained(transformer, str(path))
        _check_layers(weights, adapted.base_model.model)
        for module in adapted.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.set_scale("default", lora.scale)
        merged: nn.Module = adapted.merge_and_unload()
        _check_fused(weights, merged)
        return merged
    if not path.is_file():
        raise FileNotFoundError("no such file, and no directory with adapter_config.json")
    lora_loader = family_of(transformer).lora_loader
    if lora_loader is None:
        raise ValueError("diffusers loads no LoRA files for this class; a PEFT directory works")
    weights, alphas, metadata = _read(path, getattr(diffusers.loaders, lora_loader))
    _check(weights, transformer)
    names = [name.removeprefix(_PREFIX) for name in weights]  # diffusers empties the dictionary
    # Its own metadata says what the alphas would, and diffusers takes one of them only.
    transformer.load_lora_adapter(weights, network_alphas=None if metadata else alphas, metadata=metadata)
    transformer.fuse_lora(lora_scale=lora.scale)
    transformer.unload_lora()
    _check_fused(names, transformer)
    return transformer  # type: ignore[no-any-return]


def _read(path: Path, loader: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any] | None]:
    """An adapter's weights and alphas by name, beginning with "transformer.", and its metadata."""
    with safe_open(path, "pt") as file:
        if dropped := [name for name in file.keys() if "dora_scale" in name]:  # noqa: SIM118  # it is no dict
            raise ValueError(f"it has {dropped[0]}: a DoRA's dora_scale, which diffusers leaves out")
    read = {"weight_name": path.name, "use_safetensors": True, "local_files_only": True}
    weights, *more = loader.lora_state_dict(str(path.parent), **read, return_alphas=True, return_lora_metadata=True)
    metadata, alphas = more[-1], dict(more[0] or {}) if len(more) == 2 else {}  # only FLUX's loader returns alphas
    alphas |= {name: weights.pop(name) for name in list(weights) if name.endswith(".alpha")}
    if others := sorted({name.split(".")[0] for name in weights if name.startswith("text_encoder")}):
        logger.warning("%s: what it has for %s is not exported; load it into the pipeline", path, ", ".join(others))
        weights = {name: weight for name, weight in weights.items() if not name.startswith("text_encoder")}
    if not any(name.startswith(_PREFIX) for name in weights):
        weights, alphas = ({f"{_PREFIX}{name}": each for name, each in by.items()} for by in (weights, alphas))
        metadata = metadata and {f"{_PREFIX}{name}": value for name, value in metadata.items()}
    return weights, alphas, metadata


def _check(weights: dict[str, Tensor], transformer: nn.Module) -> None:
    """That every weight is the transformer's, and what `check_adapter` says."""
    for name in weights:
        if not name.startswith(_PREFIX):
            raise ValueError(f"its {name} belongs to no module of the model")
    check_adapter({name.removeprefix(_PREFIX): weight for name, weight in weights.items()}, transformer)


def check_adapter(weights: Mapping[str, Tensor], transformer: nn.Module) -> None:
    """That every weight is of a module of `transformer`, finite, and fits its other half; diffusers drops the rest.

    Args:
        weights: by the names of their modules in `transformer`.
        transformer: with adapters in it or none.

    Raises:
        ValueError: the first that is not; by name.
    """
    modules = {name.replace(".base_layer", ""): module for name, module in transformer.named_modules()}
    for name, weight in weights.items():
        if _module_of(name) not in modules:
            raise ValueError(f"its {name} belongs to no module of the model")
        if not weight.is_floating_point():
            raise ValueError(f"its {name} is of {weight.dtype}")
        if not is_finite(weight):
            raise ValueError(f"its {name} is not finite")
        if _KINDS.search(name) is None:
            raise ValueError(f"its {name} is of no kind that can be loaded")
        if (other := _other_half(name)) is not None and other not in weights:
            raise ValueError(f"its {name} has no {other.rpartition(_module_of(name))[2].removeprefix('.')}")
        _check_shape(name, weight, getattr(modules[_module_of(name)], "weight", None))
        if other is not None and name.endswith(_FIRST) and weight.shape[0] != weights[other].shape[1]:
            raise ValueError(f"its {name} has rank {weight.shape[0]}, its other half {weights[other].shape[1]}")
    if not weights:
        raise ValueError("it has no weights for the transformer")


def _module_of(name: str) -> str:
    """The module that a weight of an adapter belongs to."""
    return _ADAPTED.split(name)[0]


def _check_layers(names: Iterable[str], transformer: nn.Module) -> None:
    """That PEFT made no layer of which the weights say nothing: it would be filled in, at random if need be."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    known = {_module_of(name) for name in names}
    for name, layer in transformer.named_modules():
        if isinstance(layer, BaseTunerLayer) and name not in known:
            raise ValueError(f"its configuration names {name}, for which it has no weights")


def _check_fused(names: Iterable[str], transformer: nn.Module) -> None:
    """That the weights which an adapter has changed are still finite."""
    weights = transformer.state_dict()
    changed = {f"{_module_of(name)}.weight" for name in names}
    if name := first_not_finite((name, weights[name]) for name in sorted(changed & weights.keys())):
        raise ValueError(f"at this scale it makes {name} overflow {weights[name].dtype}")


def _check_shape(name: str, weight: Tensor, base: Any) -> None:
    axis = next((axis for ends, axis in ((_FIRST, 1), (_SECOND, 0)) if name.endswith(ends)), None)
    if not isinstance(base, Tensor) or axis is None:
        return
    if weight.dim() != base.dim() or weight.shape[axis] != base.shape[axis]:
        raise ValueError(f"its {name} has shape {tuple(weight.shape)}, of a weight of {tuple(base.shape)}")


def _other_half(name: str) -> str | None:
    """The weight without which this one says nothing: of A it is B, of B and its bias it is A."""
    for one, other in _HALVES:
        if f".{one}." in name:
            return name.replace(f".{one}.", f".{other}.").replace(".bias", ".weight")
    return None


def read_peft_directory(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights by the names of their modules, and the configuration, of a directory that PEFT wrote.

    Raises:
        OSError, ValueError: it cannot be read, or is none of a LoRA.
    """
    import peft

    if not (path / _PEFT_WEIGHTS).is_file():  # or PEFT would read pickled ones, or look on the hub
        pickled = "; it has pickled weights, which can run code" if any(path.glob("adapter_model.bin")) else ""
        raise ValueError(f"it has no {_PEFT_WEIGHTS}{pickled}")
    weights = load_file(path / _PEFT_WEIGHTS)
    config = peft.PeftConfig.from_pretrained(str(path))
    if not isinstance(config, peft.LoraConfig):
        raise ValueError(f"it is a {type(config).__name__}, not a LoraConfig")
    metadata = {key: value for key, value in config.to_dict().items() if key not in _NOT_OF_AN_ADAPTER}
    return {name.removeprefix(_PEFT_PREFIX): weight for name, weight in weights.items()}, metadata
