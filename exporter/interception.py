"""A diffusers transformer as a pure function of kept tokens and caches.

Three interception points on an otherwise unmodified module; its own `forward` runs:

1. after the patch embedding, the kept tokens are gathered;
2. in every self or joint attention, the new key and value rows are scattered into that
   layer's caches, and the queries attend over all cached rows (algorithm 1, line 2);
3. after the output projection, the kept tokens' rows are scattered into the previous noise
   prediction (algorithm 1, line 7), so that the model's own unpatchify yields the whole latent.

With all tokens kept this is the unmodified model, so a full step is a pruned step that keeps
every token. The family (`cat_pruning.exporter.families`) says where the three points are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cat_pruning.plugins.token_ops import token_gather, token_scatter
from cat_pruning.step_io import CacheRows

if TYPE_CHECKING:
    from cat_pruning.exporter.families.family import Family

Scatter = Callable[[Tensor, Tensor, Tensor], Tensor]


class TokenReuse:
    """What the three interception points share during one forward; filled before it, emptied after it.

    Args:
        scatter: `token_scatter` (functional, for export) or `token_scatter_` (caches changed in place).
        text_first: the order of the rows of joint attention.
    """

    def __init__(self, scatter: Scatter, *, text_first: bool = False) -> None:
        self.scatter = scatter
        self.text_first = text_first
        self.clear()

    def clear(self) -> None:
        """Drop every tensor of the last forward."""
        self.keep_indices: Tensor | None = None  # (B, n)
        self.row_indices: Tensor | None = None  # (B, n + T): the rows of joint attention that are computed
        self.noise_tokens: Tensor | None = None  # (B, N, p*p*C)
        self.caches: list[Tensor] = []  # key_0, value_0, key_1, ...; each (B, S, D)
        self.inputs: dict[str, Tensor] = {}  # the model's inputs, for interceptions that need one

    def begin(
        self,
        keep_indices: Tensor,
        noise_tokens: Tensor,
        text_length: int,
        caches: Sequence[Tensor],
        inputs: dict[str, Tensor],
    ) -> None:
        """Set the tensors of one forward. `noise_tokens` is (B, N, p*p*C), the last noise prediction per token."""
        num_tokens = noise_tokens.shape[1]
        text_rows = torch.arange(text_length, dtype=keep_indices.dtype, device=keep_indices.device)
        text_rows = text_rows.unsqueeze(0).expand(keep_indices.shape[0], -1)
        in_text_first = [text_rows, keep_indices + text_length]
        rows = in_text_first if self.text_first else [keep_indices, text_rows + num_tokens]
        self.keep_indices = keep_indices
        self.row_indices = torch.cat(rows, dim=1)
        self.noise_tokens = noise_tokens
        self.caches = list(caches)
        self.inputs = inputs

    def gather(self, tokens: Tensor) -> Tensor:
        """Interception 1: (B, N, D) -> (B, n, D)."""
        assert self.keep_indices is not None
        gathered: Tensor = token_gather(tokens, self.keep_indices)
        return gathered

    def update(self, layer: int, rows: CacheRows, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Interception 2: scatter new rows (B, n (+ T), D) into the layer's caches; return both whole, (B, S, D)."""
        indices = self.row_indices if rows is CacheRows.JOINT else self.keep_indices
        assert indices is not None
        for slot, new in ((2 * layer, key), (2 * layer + 1, value)):
            self.caches[slot] = self.scatter(self.caches[slot], indices, new)
        return self.caches[2 * layer], self.caches[2 * layer + 1]

    def merge(self, rows: Tensor) -> Tensor:
        """Interception 3: kept tokens' output (B, n, p*p*C) into the last noise prediction -> (B, N, p*p*C)."""
        assert self.keep_indices is not None
        assert self.noise_tokens is not None
        return self.scatter(self.noise_tokens, self.keep_indices, rows)


class StepModule(nn.Module):
    """One sampling step of an intercepted transformer.

    The given transformer is left as it is: the interception is installed on a structural copy
    that shares every parameter and buffer, whatever adapters or quantised layers it carries.

    Args:
        transformer: a diffusers transformer of the family.
        family: where the interception points are.
        scatter: `token_scatter` returns new caches (export); `token_scatter_` changes the given ones (torch engine).
    """

    def __init__(self, transformer: nn.Module, family: Family, scatter: Scatter = token_scatter) -> None:
        super().__init__()
        self.family = family
        self.transformer = share_parameters(transformer)
        self.transformer.eval()  # a flag of each module; the parameters' own, as requires_grad, are the user's
        self.reuse = TokenReuse(scatter, text_first=family.text_first)
        family.intercept(self.transformer, self.reuse)

    def forward(
        self, keep_indices: Tensor, noise: Tensor, caches: Sequence[Tensor], model_inputs: dict[str, Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute the kept tokens of one step.

        Args:
            keep_indices: (B, n) int32, distinct within a row; all N for a full step.
            noise: the previous step's output, in the transformer's layout; unread where every token is kept.
            caches: key and value of every attention, each (B, S, D).
            model_inputs: the family's inputs by name.

        Returns:
            The noise prediction, before guidance, and the updated caches: new tensors with `token_scatter`, the given
            ones changed in place with `token_scatter_`. Does not synchronise.
        """
        noise_tokens = self.family.noise_tokens(noise, self.transformer.config)
        text_length = self.family.text_length(model_inputs)
        self.reuse.begin(keep_indices, noise_tokens, text_length, caches, model_inputs)
        try:
            noise = self.transformer(**self.family.forward_kwargs(model_inputs), return_dict=False)[0]
            return noise, self.reuse.caches
        finally:
            self.reuse.clear()


def share_parameters(module: nn.Module) -> Any:
    """A structural copy of `module` that shares its parameters and buffers; `module` itself is not changed."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, dict(shared))
