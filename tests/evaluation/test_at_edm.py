"""AT-EDM on real tiny transformers, against references written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from cat_pruning.errors import EngineError
from cat_pruning.evaluation.at_edm import (
    RANK_ITERATIONS,
    AtEdmSession,
    AtEdmStepEngine,
    at_edm_step_macs,
    most_important,
    most_similar,
    page_rank,
    rank_tokens,
)
from cat_pruning.families import FAMILIES
from cat_pruning.runtime.transformer import CatTransformer
from cat_pruning.schedule import StepKind
from cat_pruning.settings import Policy, PruneSettings

GRID = (6, 4)
TOKENS, KEPT, TEXT = 24, 7, 5

MakeTiny = Callable[..., Any]


@pytest.fixture(params=["sd3", "sd3.5", "pixart", "pixart-alpha"])
def engine(request: pytest.FixtureRequest, make_tiny: MakeTiny) -> AtEdmStepEngine:
    return AtEdmStepEngine(make_tiny(request.param, num_layers=3))


def arguments_of(engine: AtEdmStepEngine, batch: int = 2) -> dict[str, Tensor]:
    """What a pipeline passes; other text in every row."""
    generator = torch.Generator().manual_seed(1)
    dims = engine.family.dims(GRID, batch=batch, text_length=TEXT, num_kept=0)
    shapes = engine.family.input_shapes(dims)
    return {
        name: engine.family.example_input(name, [int(dim) for dim in shapes[name]], generator)
        for name in engine.family.argument_names()
    }


def latents_of(engine: AtEdmStepEngine, batch: int = 2, *, guidance: bool = False, seed: int = 0) -> Tensor:
    rows = batch // 2 if guidance else batch
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(rows, engine.family.config["in_channels"], 2 * GRID[0], 2 * GRID[1], generator=generator)
    return torch.cat([latents, latents]) if guidance else latents


def begun(engine: AtEdmStepEngine, batch: int = 2) -> AtEdmSession:
    session = engine.session()
    dims = engine.family.dims(GRID, batch=batch, text_length=TEXT, num_kept=KEPT)
    session.begin(dims, engine.family.conditioning(arguments_of(engine, batch), GRID))
    return session


def first(num_tokens: int, batch: int = 2) -> Tensor:
    return torch.arange(num_tokens, dtype=torch.int32).repeat(batch, 1)


def pruned_step(engine: AtEdmStepEngine, latents: Tensor) -> tuple[AtEdmSession, Tensor]:
    """A full step, then a pruned one at timestep 400; its output by token."""
    batch = latents.shape[0]
    session = begun(engine, batch)
    session.step(torch.zeros_like(latents), 500.0, first(TOKENS, batch))
    noise = session.step(latents, 400.0, first(KEPT, batch))
    return session, engine.family.noise_tokens(noise)


@torch.no_grad()
def untouched(engine: AtEdmStepEngine, latents: Tensor, timestep: float) -> Tensor:
    inputs = arguments_of(engine, latents.shape[0])
    sizes = {name: inputs.pop(name, None) for name in ("resolution", "aspect_ratio")}
    if engine.family.name == "pixart":
        inputs["added_cond_kwargs"] = sizes  # type: ignore[assignment]
    steps = torch.full((latents.shape[0],), timestep)
    output: Tensor = engine.transformer(latents, timestep=steps, **inputs, return_dict=False)[0]
    return output


def attention_maps(queries: Tensor, keys: Tensor, heads: int) -> Tensor:
    """(B, heads, N, N) of rows (B, N, D), in double precision."""
    by_head = [rows.double().unflatten(-1, (heads, -1)).transpose(1, 2) for rows in (queries, keys)]
    return (by_head[0] @ by_head[1].mT / by_head[0].shape[-1] ** 0.5).softmax(dim=-1)


def choice_by_hand(maps: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """The kept tokens, ascending, and the token that each token's output comes from, of one image's maps."""
    ranks = []
    for attention_map in maps.numpy():
        ranks.append(np.linalg.matrix_power(attention_map, RANK_ITERATIONS).mean(axis=0))  # from the uniform start
    importance = np.sqrt(np.mean(np.square(ranks), axis=0))
    kept = sorted(sorted(range(len(importance)), key=lambda token: -importance[token])[:num_kept])
    mean_map = maps.mean(dim=0).numpy()
    sources = [
        token if token in kept else max(kept, key=lambda row: mean_map[row, token]) for token in range(len(importance))
    ]
    return torch.tensor(kept), torch.tensor(sources)


def test_every_token_is_the_untouched_module(engine: AtEdmStepEngine) -> None:
    latents = latents_of(engine)
    session = begun(engine)
    assert torch.equal(session.step(latents, 400.0, first(TOKENS)), untouched(engine, latents, 400.0))
    assert torch.equal(session.computed, first(TOKENS))
    session.step(latents, 300.0, first(KEPT))
    assert torch.equal(session.step(latents, 400.0, first(TOKENS)), untouched(engine, latents, 400.0))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sd3", "sd3.5"])
def test_a_pruned_step_of_sd3_by_hand(make_tiny: MakeTiny, kind: str) -> None:
    engine = AtEdmStepEngine(make_tiny(kind, num_layers=3))
    latents, inputs, model = latents_of(engine), arguments_of(engine), engine.transformer
    session, tokens = pruned_step(engine, latents)

    temb = model.time_text_embed(torch.full((2,), 400.0), inputs["pooled_projections"])
    text, image = model.context_embedder(inputs["encoder_hidden_states"]), model.pos_embed(latents)
    block = model.transformer_blocks[0]
    normed, attention = block.norm1(image, emb=temb)[0], block.attn
    query, key = attention.to_q(normed), attention.to_k(normed)
    if kind == "sd3.5":
        query, key = (
            norm(rows.unflatten(-1, (attention.heads, -1))).flatten(2)
            for norm, rows in ((attention.norm_q, query), (attention.norm_k, key))
        )
    maps = attention_maps(query, key, attention.heads)
    text, image = block(hidden_states=image, encoder_hidden_states=text, temb=temb)
    choices = [choice_by_hand(maps[row], KEPT) for row in range(2)]
    image = torch.stack([image[row, kept] for row, (kept, _) in enumerate(choices)])
    for block in model.transformer_blocks[1:]:
        text, image = block(hidden_states=image, encoder_hidden_states=text, temb=temb)
    rows = model.proj_out(model.norm_out(image, temb))

    for row, (kept, sources) in enumerate(choices):
        assert session.computed[row].tolist() == kept.tolist()
        torch.testing.assert_close(tokens[row, kept], rows[row], rtol=0, atol=1e-5)
        assert torch.equal(tokens[row], tokens[row, sources])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["pixart", "pixart-alpha"])
def test_a_pruned_step_of_pixart_by_hand(make_tiny: MakeTiny, kind: str) -> None:
    """With one block, nothing but the choice is left of the pruning: kept tokens are the full model's."""
    engine = AtEdmStepEngine(make_tiny(kind, num_layers=1))
    latents, attention = latents_of(engine), engine.transformer.transformer_blocks[0].attn1
    session, tokens = pruned_step(engine, latents)

    seen: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    full = engine.family.noise_tokens(untouched(engine, latents, 400.0))
    hook.remove()
    maps = attention_maps(attention.to_q(seen[0]), attention.to_k(seen[0]), attention.heads)
    for row in range(2):
        kept, sources = choice_by_hand(maps[row], KEPT)
        assert session.computed[row].tolist() == kept.tolist()
        torch.testing.assert_close(tokens[row], full[row, sources], rtol=0, atol=1e-5)


def test_later_blocks_see_the_kept_tokens_only(engine: AtEdmStepEngine) -> None:
    session, tokens = pruned_step(engine, latents_of(engine))
    full = engine.family.noise_tokens(untouched(engine, latents_of(engine), 400.0))
    assert session.computed.dtype == torch.int32
    kept = session.computed[0].long()
    assert len(set(kept.tolist())) == KEPT
    assert torch.equal(kept, kept.sort().values)
    assert not torch.allclose(tokens[0, kept], full[0, kept], atol=1e-4)
    assert len(tokens[0].unique(dim=0)) == KEPT  # every other one is a copy


def test_rows_of_guidance_share_the_positive_rows_choice(engine: AtEdmStepEngine) -> None:
    latents = latents_of(engine, batch=4, guidance=True)
    session, tokens = pruned_step(engine, latents)
    assert torch.equal(session.computed[:2], session.computed[2:])
    assert not torch.equal(session.computed[0], session.computed[1])  # two prompts, two choices
    for row in range(2):
        copies = (tokens[row].unsqueeze(0) == tokens[row].unsqueeze(1)).all(dim=-1)
        assert torch.equal(copies, (tokens[row + 2].unsqueeze(0) == tokens[row + 2].unsqueeze(1)).all(dim=-1))
    apart = latents.clone()
    apart[0] += 1e-3  # no guidance: every row follows itself, and the positive ones as before
    assert torch.equal(pruned_step(engine, apart)[0].computed[2:], session.computed[2:])


def test_the_same_inputs_give_the_same_tokens(engine: AtEdmStepEngine) -> None:
    latents = latents_of(engine)
    session, tokens = pruned_step(engine, latents)
    chosen = session.computed
    other, again = pruned_step(engine, latents)
    assert torch.equal(other.computed, chosen)
    assert torch.equal(again, tokens)
    session.step(latents_of(engine, seed=1), 300.0, first(KEPT))
    noise = session.step(latents, 400.0, first(TOKENS).flip(1)[:, :KEPT])  # only how many counts, and no step before
    assert torch.equal(engine.family.noise_tokens(noise), tokens)


def test_the_users_module_is_not_changed(engine: AtEdmStepEngine) -> None:
    module = engine.transformer.train()
    before = untouched(engine, latents_of(engine), 400.0)
    session, _ = pruned_step(engine, latents_of(engine))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert all(part.training for part in module.modules())
    assert torch.equal(untouched(engine, latents_of(engine), 400.0), before)
    copies = dict(session._module.named_parameters())
    assert all(copies[name] is parameter for name, parameter in module.named_parameters())


def test_a_failed_step_leaves_no_pruning_behind(engine: AtEdmStepEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    session, _ = pruned_step(engine, latents_of(engine))
    monkeypatch.setattr(session._pruning, "choose", lambda attention: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        session.step(latents_of(engine), 300.0, first(KEPT))
    kept = {name: value for name, value in vars(session._pruning).items() if name not in ("_family", "choose")}
    assert len(kept) == 6
    assert set(kept.values()) == {None}


def test_other_families_are_refused(make_tiny: MakeTiny) -> None:
    assert [family.name for family in FAMILIES if AtEdmStepEngine.supports(family.transformer_class)] == [
        "sd3",
        "pixart",
    ]
    with pytest.raises(EngineError, match=r"FluxTransformer2DModel: .*as in sd3 and pixart; leave it out"):
        AtEdmStepEngine(make_tiny("flux-dev"))


def test_what_it_cannot_run(make_tiny: MakeTiny) -> None:
    engine = AtEdmStepEngine(make_tiny("sd3"))
    conditioning = engine.family.conditioning(arguments_of(engine), GRID)
    skipping = engine.family.without_layers(conditioning, (1,))
    dims = engine.family.dims(GRID, batch=2, text_length=TEXT, num_kept=KEPT)
    with pytest.raises(EngineError, match="no skip-layer guidance"):
        engine.session().begin(dims, skipping)
    engine.transformer.transformer_blocks[0].attn.fused_projections = True
    with pytest.raises(EngineError, match="unfuse_qkv_projections"):
        engine.session().begin(dims, conditioning)


def test_page_rank_is_the_power_iteration() -> None:
    attention_map = torch.randn(2, 30, 30, generator=torch.Generator().manual_seed(0)).mul(3).softmax(dim=-1)
    for row in range(2):
        dense = attention_map[row].double().numpy()
        rank = np.full(30, 1 / 30)
        for _ in range(RANK_ITERATIONS):
            rank = np.array([sum(dense[i, j] * rank[i] for i in range(30)) for j in range(30)])
        torch.testing.assert_close(page_rank(attention_map)[row].double(), torch.tensor(rank), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(page_rank(attention_map).sum(dim=1), torch.ones(2))
    # From the uniform start, one iteration is the mean attention that a token gets.
    torch.testing.assert_close(page_rank(attention_map, 1), attention_map.mean(dim=1))


def test_heads_are_combined_by_root_mean_square() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (3 * torch.randn(1, 3, 10, 4, generator=generator) for _ in range(2))
    importance, mean_map = rank_tokens(query, key)
    heads = [rank_tokens(query[:, [head]], key[:, [head]]) for head in range(3)]
    torch.testing.assert_close(importance, torch.stack([rank for rank, _ in heads]).square().mean(dim=0).sqrt())
    torch.testing.assert_close(mean_map, torch.stack([head_map for _, head_map in heads]).mean(dim=0))


def test_ties_go_to_the_lower_index() -> None:
    importance = torch.zeros(1, 3000)
    importance[0, [2000, 50]] = 1.0
    assert most_important(importance, 5).tolist() == [[0, 1, 2, 50, 2000]]
    sources = most_similar(torch.full((1, 6, 6), 0.5), torch.tensor([[1, 4]]))
    assert sources.tolist() == [[0, 0, 0, 0, 1, 0]]


def test_macs_are_the_papers() -> None:
    """It gives 6.01, 2.11 and 2.27 with two decimals, so both sides may be off by 0.005."""
    sd3, _ = at_edm_step_macs(6_010 * 10**9, 2_110 * 10**9, 0, 24, 4096, 1228, 333, True)
    pixart, _ = at_edm_step_macs(4_310 * 10**9, 1_280 * 10**9, 0, 28, 4096, 1228, 300, False)
    assert sd3 / 1e12 == pytest.approx(2.270, rel=0.005)
    assert pixart / 1e12 == pytest.approx(1.380, abs=0.01)


@pytest.mark.parametrize("joint", [True, False])
def test_macs_of_attention_block_by_block(joint: bool) -> None:
    layers, num_tokens, num_kept, text, batch, width = 24, 4096, 1228, 333, 2, 1536

    def block(tokens: int) -> int:
        pairs = [(tokens + text, tokens + text)] if joint else [(tokens, tokens), (tokens, text)]
        return sum(2 * batch * queries * keys * width for queries, keys in pairs)

    full = layers * block(num_tokens)
    linear, everything = at_edm_step_macs(600, 240, full, layers, num_tokens, num_kept, text, joint)
    assert linear == 255
    assert everything - linear == block(num_tokens) + (layers - 1) * block(num_kept)
    assert at_edm_step_macs(600, 600, full, layers, num_tokens, num_tokens, text, joint) == (600, 600 + full)


@torch.no_grad()
def test_in_a_sampling_loop(engine: AtEdmStepEngine) -> None:
    """Records show the tokens that were computed, on the first pruned step and on later ones."""
    settings = PruneSettings(policy=Policy.STALE, full_steps=2, keep_ratio=0.3, num_clusters=4)
    transformer = CatTransformer(engine, settings)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    latents, inputs = latents_of(engine, guidance=True), arguments_of(engine)
    sizes = {name: inputs.pop(name, None) for name in ("resolution", "aspect_ratio")}
    nested: dict[str, Any] = {"added_cond_kwargs": sizes} if engine.family.name == "pixart" else {}
    for index, timestep in enumerate(scheduler.timesteps):
        noise = transformer(latents, timestep=timestep.expand(2), **inputs, **nested, return_dict=False)[0]
        record = transformer.last_step
        assert record is not None
        assert record.kind is (StepKind.FULL if index < 2 else StepKind.PRUNED)
        if index >= 2:
            tokens = engine.family.noise_tokens(noise)
            kept = record.keep_indices
            assert torch.equal(kept[0], kept[1])
            assert len(tokens[0].unique(dim=0)) == KEPT
            assert len(tokens[0, kept[0].long()].unique(dim=0)) == KEPT
        latents = latents - 0.1 * noise[1:, : latents.shape[1]]  # alike in both rows, as guidance makes it
