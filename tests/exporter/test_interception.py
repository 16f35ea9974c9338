from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cat_pruning.exporter.families import FAMILIES
from cat_pruning.exporter.interception import StepModule
from cat_pruning.exporter.step_graph import run_step
from cat_pruning.plugins.token_ops import token_scatter_
from cat_pruning.step_io import cache_names

OWN_INPUTS = FAMILIES[0].input_names
SD35: dict[str, Any] = {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}
KINDS = pytest.mark.parametrize("changes", [{}, SD35], ids=["sd3", "sd3.5"])


def untouched(transformer: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        noise: Tensor = transformer(**{name: inputs[name] for name in OWN_INPUTS}, return_dict=False)[0]
        return noise


def kept_mask(inputs: dict[str, Tensor], num_tokens: int) -> Tensor:
    """(B, N), True where the token is kept."""
    mask = torch.zeros(inputs["keep_indices"].shape[0], num_tokens, dtype=torch.bool)
    return mask.scatter(1, inputs["keep_indices"].long(), True)


def latent_mask(mask: Tensor, height: int, width: int, patch: int = 2) -> Tensor:
    """(B, N) -> (B, 1, H, W)."""
    tokens = mask.unflatten(1, (height // patch, width // patch))
    return tokens.repeat_interleave(patch, 1).repeat_interleave(patch, 2).unsqueeze(1)


class DenseAttention:
    """Every token is computed; keys and values of unkept ones are replaced by the cached. No gather, no scatter.

    What it computes for unkept tokens is wrong and read by nobody: not by other tokens, which see the cached rows.
    """

    def __init__(self, key_cache: Tensor, value_cache: Tensor, kept: Tensor) -> None:
        self.caches = (key_cache, value_cache)
        self.kept = kept

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Any = None
    ) -> Any:
        def heads(rows: Tensor, norm: Any = None) -> Tensor:
            split = rows.view(*rows.shape[:2], attn.heads, -1).transpose(1, 2)
            return split if norm is None else norm(split)

        num_tokens = hidden_states.shape[1]
        query, key = heads(attn.to_q(hidden_states), attn.norm_q), heads(attn.to_k(hidden_states), attn.norm_k)
        value, new = heads(attn.to_v(hidden_states)), self.kept
        if encoder_hidden_states is not None:
            text = encoder_hidden_states
            query = torch.cat([query, heads(attn.add_q_proj(text), attn.norm_added_q)], dim=2)
            key = torch.cat([key, heads(attn.add_k_proj(text), attn.norm_added_k)], dim=2)
            value = torch.cat([value, heads(attn.add_v_proj(text))], dim=2)
            new = F.pad(new, (0, text.shape[1]), value=True)
        key, value = (
            torch.where(new[:, None, :, None], rows, heads(cache))
            for rows, cache in zip((key, value), self.caches, strict=True)
        )
        weights = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(-1)
        rows = (weights @ value).transpose(1, 2).flatten(2)
        image = attn.to_out[0](rows[:, :num_tokens])
        if encoder_hidden_states is None:
            return image
        text_rows = rows[:, num_tokens:]
        return image, text_rows if attn.context_pre_only else attn.to_add_out(text_rows)


def dense_reference(transformer: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The noise after a pruned step, by masking alone."""
    height, width = inputs["hidden_states"].shape[2:]
    mask = kept_mask(inputs, (height // 2) * (width // 2))
    transformer, layer = copy.deepcopy(transformer), 0
    for block in transformer.transformer_blocks:
        for attn in (block.attn, block.attn2) if block.use_dual_attention else (block.attn,):
            attn.set_processor(DenseAttention(inputs[f"key_cache_{layer}"], inputs[f"value_cache_{layer}"], mask))
            layer += 1
    return torch.where(latent_mask(mask, height, width), untouched(transformer, inputs), inputs["noise"])


@KINDS
@pytest.mark.parametrize("size", [(16, 16), (8, 20), (20, 6)])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_full_step_is_the_untouched_model(
    make_tiny_sd3: Any, step_inputs: Any, changes: dict[str, Any], size: tuple[int, int], batch: int
) -> None:
    transformer = make_tiny_sd3(**changes)
    step = StepModule(transformer, FAMILIES[0])
    inputs = step_inputs(step, batch=batch, size=size)  # with random noise and caches, which must not matter
    expected = untouched(transformer, inputs)
    assert expected.abs().max() > 0.1
    assert torch.equal(run_step(step, inputs)["noise_out"], expected)


@KINDS
@pytest.mark.parametrize("kept", [1, 13, 40])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_pruned_step_against_dense_attention_with_masks(
    make_tiny_sd3: Any, step_inputs: Any, changes: dict[str, Any], kept: int, batch: int
) -> None:
    transformer = make_tiny_sd3(**changes)
    step = StepModule(transformer, FAMILIES[0])
    inputs = step_inputs(step, batch=batch, size=(8, 20), kept=kept)
    outputs = run_step(step, inputs)
    torch.testing.assert_close(outputs["noise_out"], dense_reference(transformer, inputs), rtol=1e-4, atol=1e-5)


@KINDS
def test_what_is_not_kept_stays_as_it_was(make_tiny_sd3: Any, step_inputs: Any, changes: dict[str, Any]) -> None:
    step = StepModule(make_tiny_sd3(**changes), FAMILIES[0])
    inputs = step_inputs(step, batch=3, size=(8, 20), kept=13)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    outputs = run_step(step, inputs)
    mask = kept_mask(inputs, 40)
    changed = outputs["noise_out"] != inputs["noise"]
    assert torch.equal(changed.any(dim=1, keepdim=True), latent_mask(mask, 8, 20))
    for name in cache_names(len(step.family.caches(step.transformer.config))):
        rows = (outputs[f"{name}_out"] != inputs[name]).any(dim=-1)  # (B, S)
        assert torch.equal(rows[:, :40], mask)
        assert rows[:, 40:].all()  # the text's, recomputed on every step
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


def test_two_steps_in_a_row_reuse_what_the_first_one_computed(make_tiny_sd3: Any, step_inputs: Any) -> None:
    """With the same latents, a pruned step after a full one has nothing new to say."""
    transformer = make_tiny_sd3()
    step = StepModule(transformer, FAMILIES[0])
    inputs = step_inputs(step, batch=2, size=(8, 20))
    full = run_step(step, inputs)
    kept = step_inputs(step, batch=2, size=(8, 20), kept=13)["keep_indices"]
    fed_back = {name.removesuffix("_out"): tensor for name, tensor in full.items()}
    pruned = run_step(step, {**inputs, **fed_back, "keep_indices": kept})
    for name, tensor in full.items():
        torch.testing.assert_close(pruned[name], tensor, rtol=1e-5, atol=1e-5)


@KINDS
def test_scatter_in_place_and_functional_agree(make_tiny_sd3: Any, step_inputs: Any, changes: dict[str, Any]) -> None:
    transformer = make_tiny_sd3(**changes)
    functional = StepModule(transformer, FAMILIES[0])
    in_place = StepModule(transformer, FAMILIES[0], token_scatter_)
    inputs = step_inputs(functional, batch=2, size=(8, 20), kept=13)
    expected = run_step(functional, inputs)
    outputs = run_step(in_place, inputs)
    for name, tensor in expected.items():
        assert torch.equal(outputs[name], tensor)
    for name in cache_names(len(functional.family.caches(transformer.config))):
        assert outputs[f"{name}_out"] is inputs[name]


@KINDS
def test_the_given_transformer_is_not_changed(make_tiny_sd3: Any, step_inputs: Any, changes: dict[str, Any]) -> None:
    transformer = make_tiny_sd3(**changes).train()
    processors = transformer.attn_processors
    step = StepModule(transformer, FAMILIES[0])
    inputs = step_inputs(step, batch=1, size=(16, 16), kept=5)
    expected = untouched(make_tiny_sd3(**changes), inputs)
    run_step(step, inputs)
    after = transformer.attn_processors
    assert after.keys() == processors.keys()
    assert all(after[name] is processor for name, processor in processors.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in transformer.modules())
    assert all(module.training for module in transformer.modules())
    assert all(parameter.requires_grad for parameter in transformer.parameters())
    assert torch.equal(untouched(transformer, inputs), expected)
    for mine, theirs in ((step.transformer.parameters(), transformer.parameters()),
                         (step.transformer.buffers(), transformer.buffers())):  # fmt: skip
        assert [id(tensor) for tensor in mine] == [id(tensor) for tensor in theirs]


def test_a_weight_changed_afterwards_is_seen(make_tiny_sd3: Any, step_inputs: Any) -> None:
    """As fusing a LoRA does."""
    transformer = make_tiny_sd3()
    step = StepModule(transformer, FAMILIES[0])
    inputs = step_inputs(step, batch=1, size=(16, 16))
    before = run_step(step, inputs)["noise_out"]
    with torch.no_grad():
        weight = transformer.transformer_blocks[0].attn.to_q.weight
        weight += torch.randn(32, 1) @ torch.randn(1, 32)
    after = run_step(step, inputs)["noise_out"]
    assert not torch.equal(before, after)
    assert torch.equal(after, untouched(transformer, inputs))


def test_an_exception_leaves_no_tensors_behind(make_tiny_sd3: Any, step_inputs: Any) -> None:
    step = StepModule(make_tiny_sd3(), FAMILIES[0])
    inputs = step_inputs(step, batch=1, size=(16, 16), kept=5)
    expected = run_step(step, inputs)
    with pytest.raises(RuntimeError):
        run_step(step, {**inputs, "pooled_projections": torch.zeros(1, 3)})
    assert step.reuse.keep_indices is None
    assert step.reuse.noise_tokens is None
    assert step.reuse.caches == []
    for name, tensor in run_step(step, inputs).items():
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("size", [(8, 8), (6, 10)])
def test_patchify_undoes_the_models_own_unpatchify(make_tiny_sd3: Any, size: tuple[int, int]) -> None:
    """Whose layout: tokens row by row; in a token row, column, channel."""
    config = make_tiny_sd3().config
    noise = torch.randn(3, 4, *size)
    height, width = size[0] // 2, size[1] // 2
    tokens = FAMILIES[0].patchify(noise, config)
    unpatchified = torch.einsum("nhwpqc->nchpwq", tokens.reshape(3, height, width, 2, 2, 4)).reshape(noise.shape)
    assert torch.equal(unpatchified, noise)
