"""Whether a model computes numbers, told in words and not by a black picture.

SD3 overflows in fp16 at some prompts: an activation beyond 65504 becomes an infinity, and every later step is NaN. In
any dtype, so does a damaged weight or prompt embedding. The first step of an image is a full one and sees every token,
so its output is looked at, once per image: a reduction that a GPU does in microseconds, whose answer is copied to the
host while the next steps are launched, and read when it is there. Nothing waits for it; a loop that launches without
end is told a few steps later than it happened.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cat_pruning.engines.host_flag import HostFlag
from cat_pruning.errors import EngineError
from cat_pruning.finite import is_finite


class FiniteCheck:
    """The check of one session. Not thread-safe."""

    def __init__(self) -> None:
        self._flag = HostFlag()
        self._dtype = torch.float32  # of the output that it is about

    def forget(self) -> None:
        """The image is another one; nobody needs the answer about the last one."""
        self._flag.forget()

    def watch(self, output: Tensor) -> None:
        """Begin to look at the first output of an image. Does not synchronise with a GPU.

        Raises:
            EngineError: it is on the host and not finite.
        """
        if output.device.type not in ("cpu", "cuda"):
            return
        finite, self._dtype = is_finite(output), output.dtype
        if output.device.type == "cpu":
            _check(bool(finite), self._dtype)
        else:
            self._flag.send(finite)

    def poll(self) -> None:
        """Read the answer if it is there. Does not synchronise.

        Raises:
            EngineError: the output was not finite.
        """
        if (finite := self._flag.poll()) is not None:
            _check(finite, self._dtype)


def _check(finite: bool, dtype: torch.dtype) -> None:
    if finite:
        return
    if dtype is torch.float16:
        raise EngineError(
            "the first step of this image has values that are not finite: the model overflows in fp16",
            "export it with --dtype bf16, whose range is fp32's",
        )
    raise EngineError(
        "the first step of this image has values that are not finite: the latents, the prompt's embeddings, the "
        "weights or a scale of an adapter are not",
        "look at what the pipeline was given; adapters: pipe.unload_lora_weights",
    )
