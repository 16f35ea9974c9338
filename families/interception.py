"""A diffusers transformer as a pure function of kept tokens and caches.

Three interception points on an otherwise unmodified module; its own `forward` runs:

1. after the patch embedding, the kept tokens are gathered;
2. in every self or joint attention, the new key and value rows are scattered into that
   layer's caches, and the queries attend over all cached rows (algorithm 1, line 2);
3. after the output projection, the kept tokens' rows are scattered into the previous noise
   prediction (algorithm 1, line 7), so that the model's own unpatchify yields the whole latent.

With all tokens kept this is the unmodified model, so a full step is a pruned step that keeps
every token. The family (`cat_pruning.families`) says where the three points are.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from cat_pruning.errors import CheckpointError
from cat_pruning.families.module_hooks import check_hooks
from cat_pruning.families.residuals import kept_residuals
from cat_pruning.plugins.token_ops import row_places, token_gather, token_scatter, write_rows_, write_slice_
from cat_pruning.step_io import CacheRows

if TYPE_CHECKING:
    from cat_pruning.families.family import Family


@dataclass
class LayerCache:
    """The keys and values of one attention, each (B, S, D), during one forward."""

    key: Tensor | None = None
    value: Tensor | None = None


class TokenReuse:
    """What the three interception points share during one forward; filled before it, emptied after it.

    What they change is new tensors: an export follows what becomes of each. See `TokenReuseInPlace`.

    Args:
        text_first: the order of the rows of joint attention.
        modulated_ahead: whether the shifts, scales and gates of a step are computed before it, so that no interceptor
            has to change them.
    """

    def __init__(self, *, text_first: bool = False, modulated_ahead: bool = False) -> None:
        self.text_first = text_first
        self.modulated_ahead = modulated_ahead
        self.layers: list[LayerCache] = []  # in the order in which they run
        self.clear()

    def clear(self) -> None:
        """Drop every tensor of the last forward."""
        self.keep_indices: Tensor | None = None  # (B, n)
        self.row_indices: Tensor | None = None  # (B, n + T): the rows of joint attention that are computed
        self.noise_tokens: Tensor | None = None  # (B, N, p*p*C)
        self.inputs: dict[str, Tensor] = {}  # the model's inputs, for interceptors that need one
        for layer in self.layers:
            layer.key = layer.value = None

    def new_layer(self) -> LayerCache:
        """The place of the caches of one more attention, which runs after those that have one."""
        self.layers.append(LayerCache())
        return self.layers[-1]

    @property
    def caches(self) -> list[Tensor]:
        """key_0, value_0, key_1, ...; each (B, S, D)."""
        return [cache for layer in self.layers for cache in (layer.key, layer.value) if cache is not None]

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
        self.inputs = inputs
        for layer, key, value in zip(self.layers, caches[::2], caches[1::2], strict=True):
            layer.key, layer.value = key, value

    def gather(self, tokens: Tensor) -> Tensor:
        """Interception 1: (B, N, D) -> (B, n, D)."""
        assert self.keep_indices is not None
        gathered: Tensor = token_gather(tokens, self.keep_indices)
        return gathered

    def update(
        self,
        layer: LayerCache,
        rows: CacheRows,
        key: Tensor,
        value: Tensor,
        text: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Interception 2: put new rows into the layer's caches; return both whole, (B, S, D).

        Args:
            layer: whose caches.
            rows: JOINT where image and text rows are computed.
            key: (B, n, D), or (B, n + T, D) where the text rows are among them.
            value: likewise.
            text: their own key and value rows, (B, T, D), where they come apart.
        """
        assert layer.key is not None
        assert layer.value is not None
        if text is not None:
            key, value = self.joined(key, text[0]), self.joined(value, text[1])
        indices = self.row_indices if rows is CacheRows.JOINT else self.keep_indices
        layer.key, layer.value = token_scatter(layer.key, indices, key), token_scatter(layer.value, indices, value)
        return layer.key, layer.value

    def merge(self, rows: Tensor) -> Tensor:
        """Interception 3: kept tokens' output (B, n, p*p*C) into the last noise prediction -> (B, N, p*p*C)."""
        assert self.keep_indices is not None
        assert self.noise_tokens is not None
        merged: Tensor = token_scatter(self.noise_tokens, self.keep_indices, rows)
        return merged

    def joined(self, image: Tensor, text: Tensor) -> Tensor:
        """Rows of joint attention in its order: (B, n, D) and (B, T, D) -> (B, n + T, D)."""
        return torch.cat([text, image] if self.text_first else [image, text], dim=1)


class TokenReuseInPlace(TokenReuse):
    """The same, with the given caches and the given noise changed in place: what the torch engine runs.

    Indices become places in memory once per forward, not once per cache; text rows, and on a full step all rows, are
    copied to where they belong.
    """

    @override
    def clear(self) -> None:
        super().clear()
        self._places: dict[str, Tensor] = {}  # of the computed rows, each (B * rows) int64

    @override
    def begin(
        self,
        keep_indices: Tensor,
        noise_tokens: Tensor,
        text_length: int,
        caches: Sequence[Tensor],
        inputs: dict[str, Tensor],
    ) -> None:
        super().begin(keep_indices, noise_tokens, text_length, caches, inputs)
        assert self.row_indices is not None
        num_tokens = noise_tokens.shape[1]
        self._num_tokens, self._text_length = num_tokens, text_length
        joint_rows, before = num_tokens + text_length, text_length if self.text_first else 0
        self._places = {
            "image": row_places(keep_indices, num_tokens),
            "image in joint": row_places(keep_indices + before, joint_rows),
            "joint": row_places(self.row_indices, joint_rows),
        }

    @override
    def update(
        self,
        layer: LayerCache,
        rows: CacheRows,
        key: Tensor,
        value: Tensor,
        text: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert layer.key is not None
        assert layer.value is not None
        image_start, text_start = (self._text_length, 0) if self.text_first else (0, self._num_tokens)
        places = "image" if rows is CacheRows.IMAGE else "joint" if text is None else "image in joint"
        for slot, (cache, new) in enumerate(((layer.key, key), (layer.value, value))):
            if new.shape[1] == (cache.shape[1] if text is None else self._num_tokens):  # a full step
                write_slice_(cache, 0 if text is None else image_start, new)
            else:
                write_rows_(cache, self._places[places], new)
            if text is not None:
                write_slice_(cache, text_start, text[slot])
        return layer.key, layer.value

    @override
    def merge(self, rows: Tensor) -> Tensor:
        assert self.noise_tokens is not None
        write_rows_(self.noise_tokens, self._places["image"], rows)
        return self.noise_tokens


class StepModule(nn.Module):
    """One sampling step of an intercepted transformer.

    The given transformer is left as it is: the interception is installed on a structural copy
    that shares every parameter and buffer, whatever adapters or quantised layers it carries.

    Args:
        transformer: a diffusers transformer of the family.
        family: bound to its config; where the interception points are.
        in_place: change the given caches and noise, as the torch engine does, instead of making new ones.
        modulated_ahead: see `TokenReuse`.

    Raises:
        SettingsError: the transformer has attention processors or hooks that its copy would lose.
        CheckpointError: it has more or fewer layers than its config says.
    """

    def __init__(
        self, transformer: nn.Module, family: Family, *, in_place: bool = False, modulated_ahead: bool = False
    ) -> None:
        super().__init__()
        self.family = family
        check_hooks(transformer)
        self.transformer = share_parameters(transformer)
        self.transformer.eval()  # a flag of each module; `requires_grad` of the shared parameters stays the user's
        reuse = TokenReuseInPlace if in_place else TokenReuse
        self.reuse = reuse(text_first=family.text_first, modulated_ahead=modulated_ahead)
        family.intercept(self.transformer, self.reuse)
        if len(self.reuse.layers) != (expected := len(family.caches())):
            raise CheckpointError(
                f"the {type(transformer).__name__} has {len(self.reuse.layers)} attention layers, its config makes "
                f"{expected}",
                "give it the config of what it is: transformer.register_to_config(num_layers=…)",
            )

    def forward(
        self, keep_indices: Tensor, noise: Tensor, caches: Sequence[Tensor], model_inputs: dict[str, Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute the kept tokens of one step.

        Args:
            keep_indices: (B, n) int32, distinct within a row; all N in ascending order for a full step.
            noise: the previous step's output, in the transformer's layout; unread where every token is kept.
            caches: key and value of every attention, each (B, S, D).
            model_inputs: the family's inputs by name, and a ControlNet's residuals, of all tokens, where there are any.

        Returns:
            The noise prediction, before guidance, and the updated caches: new tensors, or the given ones where
            `in_place`. Does not synchronise.
        """
        noise_tokens = self.family.noise_tokens(noise)
        text_length = self.family.text_length(model_inputs)
        self.reuse.begin(keep_indices, noise_tokens, text_length, caches, model_inputs)
        try:
            kept = kept_residuals(model_inputs, self.reuse.gather)
            noise = self.transformer(**self.family.forward_kwargs(kept), return_dict=False)[0]
            return noise, self.reuse.caches
        finally:
            self.reuse.clear()


def share_parameters(module: nn.Module) -> Any:
    """A structural copy of `module` that shares its parameters and buffers; `module` itself is not changed."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, dict(shared))
