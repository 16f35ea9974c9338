"""What the configs of a pipeline's parts must be, and what the parts must be to each other.

diffusers takes whatever a config.json says, and stumbles over it in the middle of an image or counts to it without
end. Anybody may have edited one, so its scalars are checked against the annotations of the class that it is for.
"""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from cat_pruning.checked import shown
from cat_pruning.errors import CheckpointError

_NUMBERS: Final = (int, float, bool)
_MOST: Final = 1 << 24  # of a whole number: a scheduler makes tables of so many entries
_NUMBER: Final = f"a number of at most {_MOST}"
_WORDS: Final = {int: _NUMBER, float: _NUMBER, bool: "true or false", str: "a text", types.NoneType: "null"}


def check_scalars(part_class: Any, config: Mapping[str, Any], where: Path) -> None:
    """Check that the scalars of a diffusers class's config are of the kinds that the class takes, finite and countable.

    Args:
        part_class: a class of diffusers whose `__init__` is annotated.
        config: by the names of its arguments; what is none of them is left to diffusers.
        where: the file, for the error.

    Raises:
        CheckpointError: one is not, by name.
    """
    defaults = {name: each.default for name, each in inspect.signature(part_class).parameters.items()}
    for name, hint in _annotations(part_class).items():
        kinds = _scalar_kinds(hint)
        if name not in config or not kinds:
            continue
        value = config[name]
        if value != defaults[name] and not _fits(value, kinds):  # a default may be infinite
            expected = " or ".join(dict.fromkeys(_WORDS[kind] for kind in kinds))
            raise CheckpointError(
                f"{where}: {name} is {shown(value)}, expected {expected}", "download or convert it again"
            )


def check_together(pipeline: Any, where: Path) -> None:
    """Check that the text encoders of a pipeline can read what its tokenizers make.

    Raises:
        CheckpointError: a tokenizer has more tokens than its text encoder, or makes longer texts.
    """
    for name, tokenizer in pipeline.components.items():
        encoder = getattr(pipeline, name.replace("tokenizer", "text_encoder"), None)
        if not name.startswith("tokenizer") or tokenizer is None or encoder is None:
            continue
        largest, known = max(tokenizer.get_vocab().values(), default=0), encoder.config.vocab_size
        if largest >= known:
            raise CheckpointError(
                f"{where}: {name} has the token {largest}, its text encoder knows {known} tokens", "download it again"
            )
        longest, positions = tokenizer.model_max_length, getattr(encoder.config, "max_position_embeddings", None)
        if not isinstance(longest, int) or longest < 1 or longest > (positions or longest):
            raise CheckpointError(
                f"{where}: model_max_length of {name} is {shown(longest)}, expected a whole number from 1"
                + (f" to its text encoder's {positions}" if positions else " on"),
                "download it again",
            )


def check_pipeline_class(pipeline_class: Any, transformer_class: str, where: Path) -> None:
    """Check that a pipeline is one for a transformer's class.

    Raises:
        CheckpointError: it is one for other transformers.
    """
    hint = _annotations(pipeline_class).get("transformer")
    taken = [kind.__name__ for kind in typing.get_args(hint) or (hint,) if isinstance(kind, type)]
    if taken and transformer_class not in taken:
        raise CheckpointError(
            f"{where}: a {pipeline_class.__name__} has a {' or a '.join(taken)}, the transformer is a "
            f"{transformer_class}",
            "download it again",
        )


def _annotations(annotated: Any) -> dict[str, Any]:
    """Of the arguments that a class is made with; none where a name in them is there for type checkers only."""
    try:
        return typing.get_type_hints(inspect.unwrap(annotated.__init__))
    except NameError:
        return {}


def _scalar_kinds(hint: Any) -> tuple[type, ...]:
    """The kinds of scalars that an annotation allows; none if it allows anything else."""
    if typing.get_origin(hint) is Literal:
        return tuple({type(each) for each in typing.get_args(hint)})
    kinds = typing.get_args(hint) if _is_union(hint) else (hint,)
    return kinds if all(kind in _WORDS for kind in kinds) else ()


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _fits(value: object, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, _NUMBERS):  # diffusers' own annotations take one kind of number for another
        return any(kind in kinds for kind in _NUMBERS) and math.isfinite(value) and abs(value) <= _MOST
    return isinstance(value, kinds)
