"""What an engine is made of, from what its inspector says in JSON; whatever is not known is None, never an error.

10.x says {"Layers": [{"Name", "LayerType": "PluginV3", …}, …], "Bindings": […]}, or bare names where the verbosity is
low; 11.x has "I/O Tensors", and Myelin's layer types in lower case. A format that is none of these costs the numbers,
and not the plan that was built.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final

# Of kernels, by their names; a layer made of an Attention node is called "attention" whatever runs it.
_FUSED: Final = re.compile(r"f?mha|flash_?att|fused_?att", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLayers:
    """How many layers an engine has, how many are plugins, and how many are kernels of fused attention.

    A layer counts once for every profile.
    """

    layers: int | None = None
    plugins: int | None = None
    fused_attention: int | None = None


def count_layers(information: object) -> EngineLayers:
    """The layers of an engine, from what the inspector says of it in JSON."""
    try:
        said = json.loads(information) if isinstance(information, str | bytes) else None
    except ValueError:
        return EngineLayers()
    layers = said if isinstance(said, list) else _field(said, "layers")
    if not isinstance(layers, list):
        return EngineLayers()
    entries = [entry for entry in layers if isinstance(entry, dict)]
    if layers and not entries:  # names only, of which a plugin's is the node's
        return EngineLayers(layers=len(layers))
    return EngineLayers(
        layers=len(layers),
        plugins=sum(str(_field(entry, "layertype")).lower().startswith("plugin") for entry in entries),
        fused_attention=sum(_is_fused_attention(entry) for entry in entries),
    )


def _is_fused_attention(entry: dict[str, Any]) -> bool:
    return any(_FUSED.search(str(_field(entry, field))) for field in ("name", "layertype", "tacticname"))


def _field(record: object, name: str) -> Any:
    """A field by its name without case, spaces or underscores; None where there is none."""
    if isinstance(record, dict):
        for key, value in record.items():
            if re.sub(r"[\s_]", "", str(key)).lower() == name:
                return value
    return None
