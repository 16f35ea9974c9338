"""Weights in another precision beside or instead of the plain ones, as `save_pretrained(variant="fp16")` names them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

# model.fp16.safetensors, model.fp16-00001-of-00002.safetensors, model.safetensors.index.fp16.json
_VARIANT = re.compile(r"\.(fp16|bf16|fp32)(?=[.-])")


def variant_of(name: str) -> str | None:
    """The variant that a file's name names; None for a plain one."""
    match = _VARIANT.search(name)
    return match and match.group(1)


def chosen_variant(names: Iterable[str]) -> str | None:
    """Which weights of a folder to load: the plain ones (None) where there are any, else the first variant there is."""
    variants = {variant_of(name) for name in names if name.endswith(".safetensors")}
    return None if None in variants or not variants else min(variant for variant in variants if variant)


def without_other_variants(files: Iterable[Path]) -> list[Path]:
    """The files of one folder that a pipeline loads: those without a variant, and the weights of the chosen one."""
    files = list(files)
    chosen = chosen_variant(path.name for path in files)
    return [path for path in files if variant_of(path.name) in (None, chosen)]
