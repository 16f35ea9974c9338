"""The intercepted module against diffusers' own, for every kind of transformer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0, PAGJointAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from cat_pruning.engines.torch_engine import TorchStepEngine
from cat_pruning.errors import SettingsError
from cat_pruning.exporter.step_graph import run_step
from cat_pruning.families import family_of
from cat_pruning.families.interception import StepModule
from cat_pruning.runtime.transformer import CatTransformer
from cat_pruning.step_io import CacheRows, cache_names

GRID = (4, 10)
NUM_TOKENS = 40
NUM_TEXT = 7


def intercepted(transformer: Any, *, in_place: bool = False) -> StepModule:
    return StepModule(transformer, family_of(transformer), in_place=in_place)


def kept_mask(inputs: dict[str, Tensor]) -> Tensor:
    """(B, N), True where the token is kept."""
    mask = torch.zeros(inputs["keep_indices"].shape[0], NUM_TOKENS, dtype=torch.bool)
    return mask.scatter(1, inputs["keep_indices"].long(), True)


def noise_mask(mask: Tensor, noise: Tensor, patch: int = 2) -> Tensor:
    """(B, N) -> what broadcasts with the noise: (B, N, 1) of packed latents, (B, 1, H, W) of pictures."""
    if noise.dim() == 3:
        return mask.unsqueeze(-1)
    tokens = mask.unflatten(1, GRID)
    return tokens.repeat_interleave(patch, 1).repeat_interleave(patch, 2).unsqueeze(1)


class DenseAttention:
    """Every token is computed; keys and values of unkept ones are replaced by the cached. No gather, no scatter.

    What it computes for unkept tokens is wrong and read by nobody: not by other tokens, which see the cached rows.
    """

    def __init__(self, key_cache: Tensor, value_cache: Tensor, kept: Tensor, *, text_first: bool) -> None:
        self.caches = (key_cache, value_cache)
        text = key_cache.shape[1] - kept.shape[1]
        self.new = F.pad(kept, (text, 0) if text_first else (0, text), value=True)  # (B, S): text rows always are
        self.text_first = text_first

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        def heads(rows: Tensor, norm: Any = None) -> Tensor:
            split = rows.view(*rows.shape[:2], attn.heads, -1).transpose(1, 2)
            return split if norm is None else norm(split)

        def joint(image: Tensor, text: Tensor) -> Tensor:
            return torch.cat([text, image] if self.text_first else [image, text], dim=2)

        query, key = heads(attn.to_q(hidden_states), attn.norm_q), heads(attn.to_k(hidden_states), attn.norm_k)
        value = heads(attn.to_v(hidden_states))
        if (text := encoder_hidden_states) is not None:
            query = joint(query, heads(attn.add_q_proj(text), attn.norm_added_q))
            key = joint(key, heads(attn.add_k_proj(text), attn.norm_added_k))
            value = joint(value, heads(attn.add_v_proj(text)))
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(rows, image_rotary_emb) for rows in (query, key))
        key, value = (
            torch.where(self.new[:, None, :, None], rows, heads(cache))
            for rows, cache in zip((key, value), self.caches, strict=True)
        )
        weights = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(-1)
        rows = (weights @ value).transpose(1, 2).flatten(2)
        if text is None:
            return rows if getattr(attn, "pre_only", False) else attn.to_out[0](rows)
        num_text = text.shape[1]
        image_rows = rows[:, num_text:] if self.text_first else rows[:, :-num_text]
        text_rows = rows[:, :num_text] if self.text_first else rows[:, -num_text:]
        return attn.to_out[0](image_rows), text_rows if attn.context_pre_only else attn.to_add_out(text_rows)


def attentions(transformer: Any) -> list[Any]:
    """The self and joint attentions in the order of their caches, by diffusers' names."""
    blocks = [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", [])]
    cached = []
    for block in blocks:
        if hasattr(block, "attn1"):  # PixArt; its attn2 looks at the text
            cached.append(block.attn1)
        else:
            cached += [block.attn, block.attn2] if getattr(block, "use_dual_attention", False) else [block.attn]
    return cached


def dense_reference(transformer: Any, call: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The noise after a pruned step, by masking alone."""
    mask, transformer = kept_mask(inputs), copy.deepcopy(transformer)
    for layer, attn in enumerate(attentions(transformer)):
        key_cache, value_cache = inputs[f"key_cache_{layer}"], inputs[f"value_cache_{layer}"]
        attn.set_processor(DenseAttention(key_cache, value_cache, mask, text_first=call.family.text_first))
    return torch.where(noise_mask(mask, inputs["noise"]), call.noise(transformer), inputs["noise"])


# The first is what the position tables are made for; the others are cropped, or computed for their size.
@pytest.mark.parametrize("grid", [(8, 8), (4, 10), (10, 3), (7, 5)])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_full_step_is_the_untouched_model(
    tiny_transformer: Any, pipeline_call: Any, step_inputs: Any, grid: tuple[int, int], batch: int
) -> None:
    step = intercepted(tiny_transformer)
    call = pipeline_call(tiny_transformer, batch=batch, grid=grid)
    inputs = step_inputs(step, batch=batch, grid=grid) | call.inputs()  # random noise and caches, which must not matter
    expected = call.noise(tiny_transformer)
    assert expected.abs().max() > 0.1
    assert torch.equal(run_step(step, inputs)["noise_out"], expected)


@pytest.mark.parametrize("kept", [1, 13, 40])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_pruned_step_against_dense_attention_with_masks(
    tiny_transformer: Any, pipeline_call: Any, step_inputs: Any, kept: int, batch: int
) -> None:
    step = intercepted(tiny_transformer)
    call = pipeline_call(tiny_transformer, batch=batch, grid=GRID)
    inputs = step_inputs(step, batch=batch, grid=GRID, kept=kept) | call.inputs()
    outputs = run_step(step, inputs)
    expected = dense_reference(tiny_transformer, call, inputs)
    torch.testing.assert_close(outputs["noise_out"], expected, rtol=1e-4, atol=1e-5)


def test_what_is_not_kept_stays_as_it_was(tiny_transformer: Any, step_inputs: Any) -> None:
    step = intercepted(tiny_transformer)
    inputs = step_inputs(step, batch=3, grid=GRID, kept=13, text=NUM_TEXT)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    outputs = run_step(step, inputs)
    mask = kept_mask(inputs)
    changed = (outputs["noise_out"] != inputs["noise"]).any(dim=1 if inputs["noise"].dim() == 4 else 2, keepdim=True)
    assert torch.equal(changed, noise_mask(mask, inputs["noise"]))
    text = torch.ones(3, NUM_TEXT, dtype=torch.bool)  # recomputed on every step
    joint = torch.cat([text, mask] if step.family.text_first else [mask, text], dim=1)
    for layer, spec in enumerate(step.family.caches()):
        for name in cache_names(layer + 1)[-2:]:
            rows = (outputs[f"{name}_out"] != inputs[name]).any(dim=-1)  # (B, S)
            assert torch.equal(rows, joint if spec.rows is CacheRows.JOINT else mask)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


def test_two_steps_in_a_row_reuse_what_the_first_one_computed(tiny_transformer: Any, step_inputs: Any) -> None:
    """With the same latents, a pruned step after a full one has nothing new to say."""
    step = intercepted(tiny_transformer)
    inputs = step_inputs(step, batch=2, grid=GRID)
    full = run_step(step, inputs)
    kept = step_inputs(step, batch=2, grid=GRID, kept=13)["keep_indices"]
    fed_back = {name.removesuffix("_out"): tensor for name, tensor in full.items()}
    pruned = run_step(step, {**inputs, **fed_back, "keep_indices": kept})
    for name, tensor in full.items():
        torch.testing.assert_close(pruned[name], tensor, rtol=1e-5, atol=1e-5)


def test_scatter_in_place_and_functional_agree(tiny_transformer: Any, step_inputs: Any) -> None:
    functional, in_place = intercepted(tiny_transformer), intercepted(tiny_transformer, in_place=True)
    inputs = step_inputs(functional, batch=2, grid=GRID, kept=13)
    expected = run_step(functional, inputs)
    outputs = run_step(in_place, inputs)
    for name, tensor in expected.items():
        assert torch.equal(outputs[name], tensor)
    for name in cache_names(len(functional.family.caches())):
        assert outputs[f"{name}_out"] is inputs[name]


def test_the_given_transformer_is_not_changed(
    kind: str, make_tiny: Any, tiny_transformer: Any, pipeline_call: Any, step_inputs: Any
) -> None:
    transformer = tiny_transformer.train()
    processors, modules = transformer.attn_processors, dict(transformer.named_modules())
    call = pipeline_call(transformer, batch=1, grid=GRID)
    step = intercepted(transformer)
    run_step(step, step_inputs(step, batch=1, grid=GRID, kept=5))
    after = transformer.attn_processors
    assert after.keys() == processors.keys()
    assert all(after[name] is processor for name, processor in processors.items())
    assert {name: id(module) for name, module in transformer.named_modules()} == {
        name: id(module) for name, module in modules.items()
    }
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules.values())
    assert all(module.training for module in modules.values())
    assert all(parameter.requires_grad for parameter in transformer.parameters())
    assert torch.equal(call.noise(transformer.eval()), call.noise(make_tiny(kind)))


def test_every_weight_is_shared(tiny_transformer: Any) -> None:
    step = intercepted(tiny_transformer)
    mine, theirs = (dict(module.named_parameters()) for module in (step.transformer, tiny_transformer))
    assert mine.keys() == theirs.keys()
    assert all(mine[name] is theirs[name] for name in mine)
    assert {id(buffer) for buffer in step.transformer.buffers()} <= {id(each) for each in tiny_transformer.buffers()}


def test_a_weight_changed_afterwards_is_seen(tiny_transformer: Any, pipeline_call: Any, step_inputs: Any) -> None:
    """As fusing a LoRA does."""
    step = intercepted(tiny_transformer)
    call = pipeline_call(tiny_transformer, batch=1, grid=GRID)
    inputs = step_inputs(step, batch=1, grid=GRID) | call.inputs()
    before = run_step(step, inputs)["noise_out"]
    with torch.no_grad():
        weight = attentions(tiny_transformer)[0].to_q.weight
        weight += torch.randn(len(weight), 1) @ torch.randn(1, len(weight))
    after = run_step(step, inputs)["noise_out"]
    assert not torch.equal(before, after)
    assert torch.equal(after, call.noise(tiny_transformer))


def test_an_exception_leaves_no_tensors_behind(tiny_transformer: Any, step_inputs: Any) -> None:
    step = intercepted(tiny_transformer)
    inputs = step_inputs(step, batch=1, grid=GRID, kept=5)
    expected = run_step(step, inputs)
    with pytest.raises(RuntimeError):
        run_step(step, {**inputs, "encoder_hidden_states": torch.zeros(1, NUM_TEXT, 3)})
    assert step.reuse.keep_indices is None
    assert step.reuse.row_indices is None
    assert step.reuse.noise_tokens is None
    assert step.reuse.caches == []
    assert step.reuse.inputs == {}
    for name, tensor in run_step(step, inputs).items():
        assert torch.equal(tensor, expected[name])


def processed(transformer: Any) -> list[Any]:
    """All attentions, those over the text too."""
    return [module for module in transformer.modules() if getattr(module, "processor", None) is not None]


def test_processors_of_diffusers_are_taken(tiny_transformer: Any) -> None:
    CatTransformer.from_model(tiny_transformer)
    tiny_transformer.fuse_qkv_projections()
    CatTransformer.from_model(tiny_transformer)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_processor_of_ones_own_is_refused_by_name(make_tiny: Any, when: str) -> None:
    """Ours would take its place and say nothing. Also one that is derived from diffusers' own."""
    transformer = make_tiny("pixart")

    class Sharper(AttnProcessor2_0):  # type: ignore[misc]
        pass

    processed(other := make_tiny("sd3"))[0].set_processor(PAGJointAttnProcessor2_0())
    with pytest.raises(SettingsError, match="PAGJointAttnProcessor2_0: perturbed-attention guidance changes"):
        CatTransformer.from_model(other)
    message = "Sharper: a processor of your own changes what attention computes"
    if when == "before":
        processed(transformer)[-1].set_processor(Sharper())
        with pytest.raises(SettingsError, match=message):
            CatTransformer.from_model(transformer)
    else:
        engine = TorchStepEngine(transformer)
        processed(transformer)[-1].set_processor(Sharper())
        with pytest.raises(SettingsError, match=message):
            StepModule(engine.transformer, engine.family)
