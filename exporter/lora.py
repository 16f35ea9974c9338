"""LoRA adapters fused into a transformer before it is exported (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from cat_pruning.engines.records import LoraSpec
from cat_pruning.errors import CheckpointError
from cat_pruning.exporter.library_logs import first_line, quiet_diffusers


def parse_lora(text: str) -> LoraSpec:
    """`--lora PATH[:SCALE]`: the adapter and the factor of its change, 1 unless given."""
    path, colon, scale = text.rpartition(":")
    try:
        return LoraSpec(path=str(Path(path).resolve()), scale=float(scale)) if colon else _unscaled(text)
    except ValueError:  # a path with a colon
        return _unscaled(text)


def fuse_loras(transformer: nn.Module, loras: Sequence[LoraSpec]) -> nn.Module:
    """Add each adapter's change of the weights, scale · B A · alpha / r, to `transformer`, in place.

    An adapter is a diffusers file (`*.safetensors`, whose keys begin with "transformer." or with a module's name), or
    a directory that PEFT wrote (with `adapter_config.json`).

    Raises:
        CheckpointError: PEFT is not installed, or an adapter is missing, unreadable or of another model.
    """
    for lora in loras:
        try:
            with quiet_diffusers(errors=False):
                transformer = _fuse(transformer, lora)
        except ImportError as error:
            raise CheckpointError("--lora: PEFT is not installed here; pip install 'cat-pruning[lora]'") from error
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise CheckpointError(
                f"--lora {lora.path} cannot be fused into this {type(transformer).__name__} ({first_line(error)}); "
                "give an adapter of this model: a diffusers *.safetensors file or a PEFT directory"
            ) from error
    return transformer


def _unscaled(path: str) -> LoraSpec:
    return LoraSpec(path=str(Path(path).resolve()), scale=1.0)


def _fuse(transformer: Any, lora: LoraSpec) -> nn.Module:
    import peft

    path = Path(lora.path)
    if (path / "adapter_config.json").is_file():
        adapted = peft.PeftModel.from_pretrained(transformer, str(path))
        for module in adapted.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.set_scale("default", lora.scale)
        merged: nn.Module = adapted.merge_and_unload()
        return merged
    if not path.is_file():
        raise FileNotFoundError("no such file, and no directory with adapter_config.json")
    if not hasattr(transformer, "load_lora_adapter"):
        raise ValueError("diffusers loads no LoRA files for this class; a PEFT directory works")
    from safetensors.torch import load_file

    weights = load_file(path)
    prefix = "transformer" if any(name.startswith("transformer.") for name in weights) else None
    transformer.load_lora_adapter(weights, prefix=prefix)
    if not getattr(transformer, "peft_config", None):
        raise ValueError("none of its weights belongs to this model")
    transformer.fuse_lora(lora_scale=lora.scale)
    transformer.unload_lora()
    return transformer  # type: ignore[no-any-return]
