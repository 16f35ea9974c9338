import pytest
import torch
from diffusers import DDPMScheduler
from mini_models import TEXT_LENGTH, ModelSize, new_autoencoder
from mini_pixart import PixArtMini

from cat_pruning.models.scenes import vocabulary

SIZE = ModelSize(side=32, width=64, num_layers=2, num_heads=2, text_width=16, text_layers=(1,))
CAPTION = "a large red circle left of a small blue star on a plain black background"


@pytest.fixture(scope="module")
def miniature():
    return PixArtMini()


@pytest.fixture(scope="module")
def tokenizer(miniature):
    return miniature.new_tokenizer(vocabulary())


@pytest.fixture
def denoiser(miniature, tokenizer):
    torch.manual_seed(0)
    return miniature.new_denoiser(SIZE, tokenizer).eval()


def token_ids(tokenizer, captions):
    return tokenizer(captions, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").input_ids


def test_captions_end_and_are_padded(tokenizer):
    (row,) = token_ids(tokenizer, [CAPTION]).tolist()
    assert row[:16] == tokenizer.convert_tokens_to_ids([*(f"▁{word}" for word in CAPTION.split()), "</s>"])
    assert set(row[16:]) == {tokenizer.pad_token_id}
    assert tokenizer([""]).input_ids == [[tokenizer.eos_token_id]]


def test_an_unknown_word_falls_apart_into_letters(tokenizer):
    assert tokenizer.tokenize("zebra") == ["▁", *"zebra"]


@torch.no_grad()
def test_a_new_denoiser_predicts_zero(denoiser, tokenizer):
    latents = torch.randn(8, 4, 8, 8)
    output = denoiser(latents, torch.randint(0, 1000, (8,)), token_ids(tokenizer, [CAPTION] * 8))
    assert torch.equal(output, torch.zeros_like(latents))


@torch.no_grad()
def test_padding_does_not_reach_the_image(denoiser, tokenizer):
    torch.nn.init.normal_(denoiser.transformer.proj_out.weight)  # a new denoiser says and hears nothing
    for block in denoiser.transformer.transformer_blocks:
        torch.nn.init.normal_(block.attn2.to_out[0].weight)
    latents, timesteps = torch.randn(1, 4, 8, 8), torch.tensor([500])
    padded = token_ids(tokenizer, [CAPTION])
    bare = padded[:, : (padded != tokenizer.pad_token_id).sum()]
    other = token_ids(tokenizer, ["a small green ring"])
    output = denoiser(latents, timesteps, padded)
    # A masked token's score is -10000 below the others': its weight is 0 in fp32.
    torch.testing.assert_close(output, denoiser(latents, timesteps, bare), rtol=1e-4, atol=1e-5)
    assert (output - denoiser(latents, timesteps, other)).abs().max() > 1e-2


def test_it_learns_from_what_the_scheduler_would_noise(miniature, tokenizer):
    latents = torch.randn(4, 4, 8, 8)
    ids = token_ids(tokenizer, [CAPTION] * 4)
    seen = []

    def spy(noisy, timesteps, input_ids):
        seen.append((noisy, timesteps, input_ids))
        return noisy

    loss = miniature.loss(spy, latents, ids, torch.Generator().manual_seed(3))
    ((noisy, timesteps, input_ids),) = seen
    generator = torch.Generator().manual_seed(3)
    torch.randint(1000, (4,), generator=generator)  # the timesteps
    noise = torch.randn(latents.shape, generator=generator)
    scheduler = DDPMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, timesteps))
    alpha = scheduler.alphas_cumprod[timesteps].sqrt()[:, None, None, None]
    velocity = alpha * noise - (1 - alpha**2).sqrt() * latents
    torch.testing.assert_close(loss, (noisy - velocity).square().mean())
    assert torch.equal(input_ids, ids)


def test_timesteps_cover_the_schedule(miniature, tokenizer):
    seen = []

    def spy(noisy, timesteps, input_ids):
        seen.append(timesteps)
        return noisy

    latents, ids = torch.zeros(4096, 4, 2, 2), token_ids(tokenizer, [""] * 4096)
    miniature.loss(spy, latents, ids, torch.Generator().manual_seed(0))
    (timesteps,) = seen
    assert timesteps.min() < 10
    assert 990 <= timesteps.max() < 1000
    assert timesteps.float().mean() == pytest.approx(499.5, abs=16)  # the standard error of 4096 draws is 4.5


# diffusers' scheduler, of the pair of torch and numpy.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@torch.no_grad()
def test_the_scheduler_takes_the_velocity_for_what_it_was_trained_as(miniature, denoiser, tokenizer):
    """A perfect prediction leads from any noise to the latents themselves."""
    latents, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    vae = new_autoencoder(SIZE)
    vae.register_to_config(shift_factor=None)
    scheduler = miniature.new_pipeline(denoiser, vae, tokenizer).scheduler
    scheduler.set_timesteps(20)
    sample = noise
    for timestep in scheduler.timesteps:
        alpha = scheduler.alphas_cumprod[timestep].sqrt()
        sigma = (1 - alpha**2).sqrt()
        velocity = (alpha * sample - latents) / sigma  # of the sample, if the latents are what is under its noise
        sample = scheduler.step(velocity, timestep, sample).prev_sample
    torch.testing.assert_close(sample, latents, rtol=1e-3, atol=1e-3)


def test_the_pipeline_is_pixarts_and_needs_no_arguments(miniature, denoiser, tokenizer, tmp_path):
    vae = new_autoencoder(SIZE)
    vae.register_to_config(shift_factor=None)
    miniature.save_pipeline(tmp_path / "pixart", denoiser, vae, tokenizer)
    pipeline = miniature.pipeline_class.from_pretrained(str(tmp_path / "pixart"))
    config = pipeline.transformer.config
    assert (config.in_channels, config.out_channels, config.patch_size) == (4, 8, 2)
    assert config.norm_type == "ada_norm_single"
    assert config.caption_channels == pipeline.text_encoder.config.d_model
    assert pipeline.scheduler.config.algorithm_type == "dpmsolver++"
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert token_ids(pipeline.tokenizer, [CAPTION]).equal(token_ids(tokenizer, [CAPTION]))
    latents = torch.randn(1, 4, 8, 8)
    ids = token_ids(tokenizer, [CAPTION])
    embeds, mask, *_ = pipeline.encode_prompt(CAPTION, False, max_sequence_length=TEXT_LENGTH, clean_caption=False)
    with torch.no_grad():
        from_disk = pipeline.transformer(
            latents,
            encoder_hidden_states=embeds,
            encoder_attention_mask=mask,
            timestep=torch.tensor([500]),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample[:, :4]
        torch.testing.assert_close(from_disk, denoiser(latents, torch.tensor([500]), ids), rtol=1e-2, atol=1e-2)
