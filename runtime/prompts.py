"""Text encoders between two prompts: what they returned is kept, or their weights are let go."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from cat_pruning.components import TEXT_ENCODERS
from cat_pruning.errors import SettingsError
from cat_pruning.runtime.components import EngineTextEncoder


class PromptCache:
    """What text encoders returned, by their input; the least lately used go first. For any number of threads.

    Args:
        max_bytes: of the tensors that are kept.

    Attributes:
        num_bytes: that are kept now. hits, misses: calls so far.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = self.hits = self.misses = 0
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What is kept under a key, or what `make` makes; two threads may both make it."""
        with self._lock:
            if key in self._kept:
                self.hits += 1
                self._kept.move_to_end(key)
                return self._kept[key][0]
            self.misses += 1
        made = make()
        size = sum(tensor.nbytes for tensor in _tensors(made))
        with self._lock:
            if size <= self.max_bytes and key not in self._kept:
                self._kept[key] = made, size
                self.num_bytes += size
                while self.num_bytes > self.max_bytes:
                    self.num_bytes -= self._kept.popitem(last=False)[1][1]
        return made

    def clear(self) -> None:
        """Forget all, as after the text encoders were changed."""
        with self._lock:
            self._kept.clear()
            self.num_bytes = 0


def cache_prompts(pipe: Any, max_bytes: int) -> PromptCache:
    """Let a pipeline's text encoders return what they returned for the same prompt before.

    Each encoder's forward looks its arguments up: token ids, mask and options. They are compared on the host, so on a
    GPU an encoding waits for the ids to come there; pipelines make them there. What is returned must not be changed in
    place; diffusers' pipelines do not. The encoders must not be changed either, as by an adapter, or `clear` is called.
    A batch of prompts is one entry. Under autograd, or
    of arguments other than tensors, numbers and strings, nothing is kept.

    Args:
        pipe: a diffusers pipeline; its text encoders are changed.
        max_bytes: of the tensors that are kept, for all encoders together. One prompt of SD3 takes about 10 MB in fp16,
            because CLIP's hidden states of all layers are kept.
    """
    cache = PromptCache(max_bytes)
    for name in TEXT_ENCODERS:
        encoder = getattr(pipe, name, None)
        if isinstance(encoder, nn.Module):
            encoder.forward = _cached(cache, name, encoder.forward)  # as accelerate's hooks do
    return cache


def _cached(cache: PromptCache, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def cached(*arguments: Any, **options: Any) -> Any:
        if torch.is_grad_enabled():
            return forward(*arguments, **options)
        try:
            key = (name, *map(_key, arguments), *((each, _key(value)) for each, value in sorted(options.items())))
        except TypeError:
            return forward(*arguments, **options)
        return cache.get(key, lambda: forward(*arguments, **options))

    return cached


def _key(value: Any) -> Hashable:
    """What one argument is told from others by.

    Raises:
        TypeError: it is none that is looked at.
    """
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return str(value.dtype), str(value.device), tuple(value.shape), content
    if value is None or isinstance(value, bool | int | float | str):
        return type(value).__name__, value
    raise TypeError(f"a {type(value).__name__} is not compared")


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in an output of transformers, each piece of memory once."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def offload_text(pipe: Any) -> None:
    """Let go of a pipeline's text encoders whenever its transformer begins a step; the next prompt loads them again.

    Args:
        pipe: a pipeline of `load_pipeline`; its transformer is changed.

    Raises:
        SettingsError: a text encoder is torch's.
    """
    encoders = {name: getattr(pipe, name, None) for name in TEXT_ENCODERS}
    graphs = [encoder.engine for encoder in encoders.values() if isinstance(encoder, EngineTextEncoder)]
    if others := [
        name for name, each in encoders.items() if each is not None and not isinstance(each, EngineTextEncoder)
    ]:
        raise SettingsError(
            f"offload: {', '.join(others)} of this bundle run in torch",
            "export with --components, or take diffusers' pipe.enable_model_cpu_offload()",
        )

    def release(module: nn.Module, arguments: Any) -> None:
        for engine in graphs:
            engine.release()

    pipe.transformer.register_forward_pre_hook(release)
