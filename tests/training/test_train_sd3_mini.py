import dataclasses
import json
import signal
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from mini_models import ModelSize, load_pipeline, new_tokenizer
from mini_stages import sample_round
from scenes import vocabulary
from train_config import TrainConfig
from train_sd3_mini import parse_arguments, train

TINY = ModelSize(side=32, width=24, num_layers=1, num_heads=2, text_width=8, text_layers=(1, 2))


def tiny_config(out: Path, **changes) -> TrainConfig:
    base = TrainConfig(
        out=out,
        steps=2,
        batch_size=2,
        warmup_steps=1,
        round_scenes=4,
        round_epochs=1,
        autoencoder_steps=2,
        threads=1,
        size=TINY,
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps, uninterrupted."""
    config = tiny_config(tmp_path_factory.mktemp("finished"))
    return config, train(config)


def weights(run):
    return torch.cat([parameter.detach().flatten() for parameter in run.denoiser.parameters()])


def averaged(run):
    return torch.cat([parameter.flatten() for parameter in run.average.parameters()])


def test_a_run_writes_a_pipeline_that_generates(finished):
    config, run = finished
    assert run.step == 2
    pipeline = load_pipeline(config.out / "sd3-mini")
    image = pipeline("a small red circle", num_inference_steps=2, max_sequence_length=24, output_type="np").images[0]
    assert image.shape == (32, 32, 3)
    stored = pipeline.transformer.proj_out.bias
    # Stored in fp16: 11 bits of mantissa.
    torch.testing.assert_close(stored, run.average.transformer.proj_out.bias, rtol=2**-10, atol=1e-7)
    assert (config.out / "sd3-mini-latest" / "model_index.json").exists()


def test_saved_configs_name_no_path(finished):
    config, _ = finished
    for file in (config.out / "sd3-mini").rglob("*.json"):
        assert "_name_or_path" not in json.loads(file.read_text()), file


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_saved_pipeline_loads_in_one_dtype(finished, dtype):
    config, _ = finished
    options = {} if dtype is None else {"dtype": dtype}
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        str(config.out / "sd3-mini"), text_encoder_3=None, tokenizer_3=None, **options
    )
    models = (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    assert {model.dtype for model in models} == {dtype or torch.float32}


def test_a_killed_run_resumes_where_it_was(finished, tmp_path, monkeypatch):
    config, whole = finished
    # The first autoencoder is shared, so that the two runs see the same latents.
    (tmp_path / "vae").symlink_to(config.out / "vae")
    killed = dataclasses.replace(config, out=tmp_path, checkpoint_every_s=0.0)
    advance = type(whole).advance

    def advance_once(run):
        if run.step == 1:
            raise KeyboardInterrupt
        return advance(run)

    monkeypatch.setattr(type(whole), "advance", advance_once)
    with pytest.raises(KeyboardInterrupt):
        train(killed)
    monkeypatch.undo()
    resumed = train(killed)
    assert resumed.step == 2
    # One thread and the same operations: only the order of a reduction could differ.
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(averaged(resumed), averaged(whole), rtol=1e-5, atol=1e-7)


def test_sigterm_leaves_a_checkpoint(finished, tmp_path, monkeypatch):
    config, whole = finished
    (tmp_path / "vae").symlink_to(config.out / "vae")
    advance = type(whole).advance

    def advance_and_terminate(run):
        signal.raise_signal(signal.SIGTERM)
        return advance(run)

    monkeypatch.setattr(type(whole), "advance", advance_and_terminate)
    assert train(dataclasses.replace(config, out=tmp_path)).step == 1
    assert (tmp_path / "checkpoint.pt").exists()
    assert not (tmp_path / "sd3-mini").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_checkpoint_of_other_settings_is_refused(finished):
    config, _ = finished
    with pytest.raises(ValueError, match="use another folder"):
        train(dataclasses.replace(config, peak_lr=5e-3))


def test_continuing_starts_from_the_pipeline_and_keeps_its_autoencoder(finished, tmp_path):
    config, first = finished
    run = train(dataclasses.replace(config, out=tmp_path, init=config.out / "sd3-mini", steps=1, peak_lr=1e-6))
    torch.testing.assert_close(weights(run), averaged(first), rtol=2e-3, atol=1e-5)  # fp16, then one small step
    kept, before = (load_pipeline(folder / "sd3-mini").vae.state_dict() for folder in (tmp_path, config.out))
    assert all(torch.equal(kept[name], before[name]) for name in before)


def test_rounds_are_fresh_and_reproducible():
    images, captions = sample_round(seed=0, index=0, count=8, side=32)
    again, same_captions = sample_round(seed=0, index=0, count=8, side=32)
    _, other_captions = sample_round(seed=0, index=1, count=8, side=32)
    assert (images == again).all()
    assert captions == same_captions != other_captions


def test_every_word_is_one_token():
    tokenizer = new_tokenizer(vocabulary())
    assert all(len(tokenizer.tokenize(word)) == 1 for word in vocabulary())


def test_the_schedule_is_one_of_progress():
    config = TrainConfig(out=Path(), steps=1000, peak_lr=1e-3, warmup_steps=100)
    rates = [config.learning_rate(step, seconds=0.0) for step in range(1000)]
    assert max(rates) == pytest.approx(1e-3, rel=0.03)  # the cosine has begun when the warmup ends
    assert rates[0] < 2e-5
    assert rates[-1] < 3e-5
    by_time = dataclasses.replace(config, steps=None, seconds=50.0)
    assert by_time.learning_rate(500, seconds=25.0) == pytest.approx(rates[500])


@pytest.mark.parametrize("budget", [{}, {"steps": 1, "seconds": 1.0}])
def test_exactly_one_budget(budget):
    with pytest.raises(ValueError, match="exactly one"):
        TrainConfig(out=Path(), **budget)


def test_the_command_line_is_a_config():
    config = parse_arguments(["run", "--steps", "5", "--batch-size", "16", "--peak-lr", "4e-4"])
    assert config == TrainConfig(out=Path("run"), steps=5, batch_size=16, peak_lr=4e-4)
