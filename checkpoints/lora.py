"""LoRA adapters fused into a transformer before it is exported (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cat_pruning.bundle.schema import LoraSpec
from cat_pruning.checkpoints.library_logs import first_line, quiet_diffusers
from cat_pruning.errors import CheckpointError, SettingsError
from cat_pruning.families import family_of
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
_PEFT_PREFIX = "base_model.model."
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
    return LoraSpec(path=str(Path(path or text).resolve()), scale=scale)


def fuse_loras(transformer: nn.Module, loras: Sequence[LoraSpec]) -> nn.Module:
    """Add each adapter's change of the weights, scale · B A · alpha / r, to `transformer`, in place.

    An adapter is a file that diffusers' pipeline of the family loads (`*.safetensors`; for FLUX Kohya's and XLabs'
    too), or a directory that PEFT wrote (with `adapter_config.json`). What a file has for text encoders is left out,
    with a warning.

    Raises:
        CheckpointError: PEFT is not installed, or an adapter is missing, unreadable, damaged, or of another model, be
            it in part.
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
        check_adapter(read_peft_directory(path)[0], transformer)
        adapted = peft.PeftModel.from_pretrained(transformer, str(path))
        for module in adapted.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.set_scale("default", lora.scale)
        merged: nn.Module = adapted.merge_and_unload()
        return merged
    if not path.is_file():
        raise FileNotFoundError("no such file, and no directory with adapter_config.json")
    lora_loader = family_of(transformer).lora_loader
    if lora_loader is None:
        raise ValueError("diffusers loads no LoRA files for this class; a PEFT directory works")
    weights, alphas, metadata = _read(path, getattr(diffusers.loaders, lora_loader))
    _check(weights, transformer)
    # Its own metadata says what the alphas would, and diffusers takes one of them only.
    transformer.load_lora_adapter(weights, network_alphas=None if metadata else alphas, metadata=metadata)
    transformer.fuse_lora(lora_scale=lora.scale)
    transformer.unload_lora()
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
    """That every weight is of a module of `transformer`, finite, and has its other half; diffusers leaves out the rest.

    Args:
        weights: by the names of their modules in `transformer`.
        transformer: with adapters in it or none.

    Raises:
        ValueError: the first that is not; by name.
    """
    modules = {name.replace(".base_layer", ""): module for name, module in transformer.named_modules()}
    for name, weight in weights.items():
        if _ADAPTED.split(name)[0] not in modules:
            raise ValueError(f"its {name} belongs to no module of the model")
        if not torch.isfinite(weight).all():
            raise ValueError(f"its {name} is not finite")
        if _KINDS.search(name) is None:
            raise ValueError(f"its {name} is of no kind that can be loaded")
        if (other := _other_half(name)) is not None and other not in weights:
            raise ValueError(f"its {name} has no {other.rpartition(_ADAPTED.split(name)[0])[2].removeprefix('.')}")
        _check_shape(name, weight, getattr(modules[_ADAPTED.split(name)[0]], "weight", None))
    if not weights:
        raise ValueError("it has no weights for the transformer")


def _check_shape(name: str, weight: Tensor, base: Any) -> None:
    if not isinstance(base, Tensor) or base.dim() != 2 or weight.dim() != 2:
        return
    for ends, axis in (((".lora_A.weight", "down.weight"), 1), ((".lora_B.weight", "up.weight"), 0)):
        if name.endswith(ends) and weight.shape[axis] != base.shape[axis]:
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

    weights = peft.load_peft_weights(str(path), device="cpu")
    config = peft.PeftConfig.from_pretrained(str(path))
    if not isinstance(config, peft.LoraConfig):
        raise ValueError(f"it is a {type(config).__name__}, not a LoraConfig")
    metadata = {key: value for key, value in config.to_dict().items() if key not in _NOT_OF_AN_ADAPTER}
    return {name.removeprefix(_PEFT_PREFIX): weight for name, weight in weights.items()}, metadata
