"""AT-EDM, the baseline that the CAT Pruning paper compares with: tokens ranked by the first block's attention.

Wang et al., "Attention-Driven Training-Free Efficiency Enhancement of Diffusion Models" (CVPR 2024, arXiv 2405.05252),
was published for U-Nets (SD-XL). This module adapts it to diffusion transformers as the CAT Pruning paper's MACs imply:
they are exactly those of a first block on all tokens and of the other blocks on the kept ones
(SD3: 6.01 / 24 + 2.11 · 23 / 24 = 2.27 TMACs). A pruned step computes:

1. the patch embedding and the first block, on all N tokens;
2. *generalized weighted page rank* on that block's attention over the image's tokens; the n best are gathered;
3. the other blocks on the kept tokens (and the text): attention among them only, nothing is cached;
4. *similarity-based copy*: every pruned token's output is that of the kept token that attends to it most.

The caller's schedule says which steps are pruned. AT-EDM's own schedule, which prunes fewer layers in early steps, is
left out, because the CAT Pruning paper's MACs are those of a constant number of tokens after the full steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from typing_extensions import override

from cat_pruning.engines.torch_engine import TorchSession, TorchStepEngine
from cat_pruning.errors import EngineError
from cat_pruning.families import FAMILIES, family_of_class
from cat_pruning.families.attention import split_heads
from cat_pruning.families.family import Family, PatchFamily
from cat_pruning.families.interception import share_parameters
from cat_pruning.plugins.token_ops import token_gather
from cat_pruning.runtime.selection.selector import guiding_rows
from cat_pruning.step_io import LATENTS, StepDims

# Zero-TPrune takes as many in its first layers (Wang et al. 2023, arXiv 2305.17328); AT-EDM generalizes its page rank.
RANK_ITERATIONS = 30


class AtEdmStepEngine(TorchStepEngine):
    """AT-EDM on a diffusers transformer where its weights are. The given module is not changed.

    Its steps choose their tokens themselves: of the tokens that a step is given, only their number counts. Its steps
    are never captured as CUDA graphs, because it is a baseline for quality and not for speed.

    Args:
        transformer: of a family that `supports` accepts.

    Raises:
        CheckpointError: a transformer of no supported class.
        EngineError: a transformer of another family.
    """

    name = "at-edm"

    def __init__(self, transformer: Any) -> None:
        super().__init__(transformer, cuda_graphs=False)
        self.family: PatchFamily = at_edm_family(self.family)

    @staticmethod
    def supports(transformer_class: str) -> bool:
        """Whether AT-EDM can run a family: one whose positions are in the tokens, and so in queries and keys."""
        return issubclass(family_of_class(transformer_class), PatchFamily)

    @override
    def session(self) -> AtEdmSession:
        return AtEdmSession(self)


def at_edm_family(family: Family) -> PatchFamily:
    """The family, if AT-EDM can run it.

    Raises:
        EngineError: it cannot.
    """
    if not isinstance(family, PatchFamily):
        names = " and ".join(known.name for known in FAMILIES if issubclass(known, PatchFamily))
        raise EngineError(
            f"{family.transformer_class}: at-edm needs positions that are in the tokens, as in {names}",
            "leave it out of --methods",
        )
    return family


class AtEdmSession(TorchSession):
    """One image in progress. A full step is the unmodified module; a pruned one reads nothing of the steps before.

    Two calls at one noise level (Heun) may compute different tokens, because each ranks them by its own attention.
    """

    engine: AtEdmStepEngine

    def __init__(self, engine: AtEdmStepEngine) -> None:
        super().__init__(engine)
        self._module: Any = None
        self._pruning = _Pruning(engine.family)

    def _allocate(self, dims: StepDims) -> None:
        """Nothing is cached."""

    def _begin(self, dims: StepDims, timesteps: Sequence[float]) -> None:
        """Raise EngineError for skip-layer guidance, which would need gates in the blocks; synchronises."""
        if self.engine.family.skips_layers(self._inputs):
            raise EngineError("at-edm has no skip-layer guidance: a call skips blocks", "leave skip_layers out")
        self._module = share_parameters(self.engine.transformer).eval()
        self._pruning.install(self._module)

    def _run(self, keep_indices: Tensor) -> None:
        """Compute a step; on a pruned one, `keep_indices` is overwritten by the tokens that AT-EDM chooses."""
        assert self._dims is not None
        family, latents, pruning = self.engine.family, self._inputs[LATENTS], self._pruning
        if keep_indices.shape[1] < int(self._dims.num_tokens):
            pruning.num_kept = keep_indices.shape[1]
            pruning.guiding = guiding_rows(latents) if family.batched_guidance else None
        try:
            noise = self._module(**family.forward_kwargs(self._inputs), return_dict=False)[0]
            if pruning.indices is not None:
                keep_indices.copy_(pruning.indices)
            self._noise.copy_(noise)
        finally:
            pruning.clear()


class _Pruning:
    """What the hooks share during one forward. They do nothing while `num_kept` is None."""

    def __init__(self, family: PatchFamily) -> None:
        self._family = family
        self.clear()

    def clear(self) -> None:
        """Drop every tensor of the last forward."""
        self.num_kept: int | None = None
        self.guiding: Tensor | None = None  # (B,), the row that each row's selection is taken from
        self.query: Tensor | None = None  # (B, N, D), the first block's, of the image's tokens
        self.key: Tensor | None = None
        self.indices: Tensor | None = None  # (B, n) int64, ascending
        self.sources: Tensor | None = None  # (B, N) int64, places in `indices`

    def install(self, transformer: Any) -> None:
        """Hook a module, in place."""
        block = self._family.blocks(transformer)[0]
        attention = next(part for part in block.modules() if isinstance(part, Attention))
        if attention.fused_projections:
            raise EngineError("at-edm reads queries and keys apart", "call transformer.unfuse_qkv_projections() first")

        def keep_query(module: nn.Module, args: object, rows: Tensor) -> None:
            self.query = rows

        def keep_key(module: nn.Module, args: object, rows: Tensor) -> None:
            self.key = rows

        def prune(module: nn.Module, args: object, outputs: Any) -> Any:
            if self.num_kept is None:
                return outputs
            self.choose(attention)
            return self._family.with_image_rows(outputs, lambda rows: token_gather(rows, self.indices))

        def fill(module: nn.Module, args: object, rows: Tensor) -> Tensor:
            return rows if self.num_kept is None else token_gather(rows, self.sources)  # (B, N, channels)

        attention.to_q.register_forward_hook(keep_query)
        attention.to_k.register_forward_hook(keep_key)
        block.register_forward_hook(prune)
        self._family.output_projection(transformer).register_forward_hook(fill)

    def choose(self, attention: Any) -> None:
        """The kept tokens and every token's source, from the attention's last queries and keys."""
        assert self.query is not None
        assert self.key is not None
        assert self.num_kept is not None
        query, key = (split_heads(rows, attention.heads) for rows in (self.query, self.key))
        self.query = self.key = None
        query = query if attention.norm_q is None else attention.norm_q(query)  # SD3.5
        key = key if attention.norm_k is None else attention.norm_k(key)
        importance, mean_map = rank_tokens(query, key)
        indices = most_important(importance, self.num_kept)
        sources = most_similar(mean_map, indices)
        # The rows of guidance share the choice itself: made from their own maps, two choices could differ by rounding.
        self.indices = indices if self.guiding is None else indices[self.guiding]
        self.sources = sources if self.guiding is None else sources[self.guiding]


def rank_tokens(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens' importance by their attention map: `page_rank` by head, heads combined by root mean square.

    The softmax runs over the image's keys only, so the map of a joint attention is renormalised without the text's.
    Heads come one after the other, so that the maps of one head are in memory and not those of all.

    Args:
        query: of the image's tokens, after their norm, (B, heads, N, width).
        key: likewise.

    Returns:
        The importance, (B, N) fp32, and the map averaged over heads, (B, N, N) fp32. Does not synchronise.
    """
    batch, heads, num_tokens, width = query.shape
    squares = torch.zeros(batch, num_tokens, device=query.device)
    mean_map = torch.zeros(batch, num_tokens, num_tokens, device=query.device)
    for head in range(heads):
        scores = query[:, head].float() @ key[:, head].float().mT
        attention_map = (scores * width**-0.5).softmax(dim=-1)
        squares += page_rank(attention_map).square() / heads
        mean_map += attention_map / heads
    return squares.sqrt(), mean_map


def page_rank(attention_map: Tensor, iterations: int = RANK_ITERATIONS) -> Tensor:
    """Generalized weighted page rank (AT-EDM): s_{t+1}(j) = Σ_i A(i, j) · s_t(i), from the uniform s_0.

    Args:
        attention_map: A, (B, N, N); rows are queries and add up to 1.
        iterations: a fixed number of them, so that nothing synchronises.

    Returns:
        s, (B, N), which adds up to 1.
    """
    num_tokens = attention_map.shape[-1]
    rank = attention_map.new_full((attention_map.shape[0], 1, num_tokens), 1 / num_tokens)
    for _ in range(iterations):
        rank = rank @ attention_map
    return rank.squeeze(1)


def most_important(importance: Tensor, num_kept: int) -> Tensor:
    """The n tokens of the highest importance (B, N), ascending: (B, n) int64. A tie goes to the lower index."""
    ranked = importance.sort(dim=-1, descending=True, stable=True).indices
    return ranked[:, :num_kept].sort(dim=-1).values


def most_similar(mean_map: Tensor, indices: Tensor) -> Tensor:
    """Similarity-based copy (AT-EDM): for each token j the kept token i of the largest A(i, j); for a kept one, itself.

    Args:
        mean_map: A, averaged over heads, (B, N, N).
        indices: the kept tokens, (B, n) int64, ascending.

    Returns:
        Places in `indices`, (B, N) int64. A tie goes to the lower index.
    """
    sources: Tensor = token_gather(mean_map, indices).argmax(dim=1)  # (B, n, N) -> (B, N)
    places = torch.arange(indices.shape[1], device=indices.device)
    return sources.scatter(1, indices, places.expand_as(indices))


def at_edm_step_macs(
    linear_full: int,
    linear_pruned: int,
    attention_full: int,
    num_layers: int,
    num_tokens: int,
    num_kept: int,
    text_length: int,
    joint: bool,
) -> tuple[int, int]:
    """MACs of a pruned step: one block of L on all tokens, the others on the kept ones.

    Attention of r query and s key rows costs 2 · B · r · s · D: in joint attention r = s = n + T; otherwise r = n, and
    s is n in self-attention and T in cross-attention. All blocks count as alike; of the supported models only some
    blocks of SD3.5-medium differ, by a second, image-only attention. The cost of the ranking is left out, as in the CAT
    Pruning paper: B · N² · D for the map and `RANK_ITERATIONS` · heads · B · N² for its page rank.

    Args:
        linear_full: of a full step, linear and convolution layers.
        linear_pruned: of a step that computes n tokens in every block, likewise.
        attention_full: of a full step, the attention scores of all layers.
        num_layers: L.
        num_tokens: N.
        num_kept: n.
        text_length: T.
        joint: whether image and text rows attend together, as in SD3.

    Returns:
        The MACs of linear and convolution layers, and those of everything: attention scores too.
    """

    def scores(tokens: int) -> int:
        return (tokens + text_length) ** 2 if joint else tokens * (tokens + text_length)

    linear = (linear_full + linear_pruned * (num_layers - 1)) // num_layers
    blocks = scores(num_tokens) + (num_layers - 1) * scores(num_kept)
    return linear, linear + attention_full * blocks // (num_layers * scores(num_tokens))
