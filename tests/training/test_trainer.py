import dataclasses
import json
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import train_pixart_mini
import train_sd3_mini
from diffusers import AutoencoderKL
from mini_models import ModelSize
from mini_stages import sample_round
from miniatures import MINIATURES, miniature_in
from scene_kinds import SceneKind
from train_config import Optimizer, TrainConfig
from trainer import Rounds, train

from cat_pruning.models import miniatures
from cat_pruning.models.scenes import vocabulary

SIZES = {
    "sd3-mini": ModelSize(side=32, width=24, num_layers=1, num_heads=2, text_width=8, text_layers=(1, 2)),
    "pixart-mini": ModelSize(side=32, width=32, num_layers=1, num_heads=2, text_width=8, text_layers=(1,)),
}


def tiny_config(out: Path, miniature: str, **changes) -> TrainConfig:
    base = TrainConfig(
        out=out,
        miniature=miniature,
        steps=2,
        batch_size=2,
        warmup_steps=1,
        round_scenes=4,
        round_epochs=1,
        autoencoder_steps=2,
        threads=1,
        size=SIZES[miniature],
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module", params=list(SIZES))
def finished(request, tmp_path_factory):
    """A run of two steps, uninterrupted."""
    config = tiny_config(tmp_path_factory.mktemp("finished"), request.param)
    return config, train(config)


def pipeline_of(config, name=""):
    return MINIATURES[config.miniature].load_pipeline(config.out / (name or config.miniature))


def weights(run):
    return torch.cat([parameter.detach().flatten() for parameter in run.denoiser.parameters()])


def averaged(run):
    return torch.cat([parameter.flatten() for parameter in run.average.parameters()])


# DPMSolverMultistepScheduler of diffusers 0.42 turns a tensor into an array in a way that NumPy 2 deprecates.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_run_writes_a_pipeline_that_generates(finished):
    config, run = finished
    assert run.step == 2
    pipeline = pipeline_of(config)
    options = MINIATURES[config.miniature].call_options
    image = pipeline("a small red circle", num_inference_steps=2, output_type="np", **options).images[0]
    assert image.shape == (32, 32, 3)
    stored = pipeline.transformer.proj_out.weight
    # Stored in fp16: 11 bits of mantissa.
    torch.testing.assert_close(stored, run.average.transformer.proj_out.weight, rtol=2**-10, atol=1e-7)
    assert (config.out / f"{config.miniature}-latest" / "model_index.json").exists()


def test_saved_configs_name_no_path(finished):
    config, _ = finished
    for file in (config.out / config.miniature).rglob("*.json"):
        text = file.read_text()
        assert "_name_or_path" not in json.loads(text), file
        assert str(config.out) not in text, file


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_saved_pipeline_loads_in_one_dtype(finished, dtype):
    config, _ = finished
    miniature = MINIATURES[config.miniature]
    options = {} if dtype is None else {"dtype": dtype}
    folder = str(config.out / config.miniature)
    pipeline = miniature.pipeline_class.from_pretrained(folder, **miniature.load_options, **options)
    models = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
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
    assert not (tmp_path / config.miniature).exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_checkpoint_of_other_settings_is_refused(finished):
    config, _ = finished
    with pytest.raises(ValueError, match="use another folder"):
        train(dataclasses.replace(config, peak_lr=5e-3))


def test_continuing_starts_from_the_pipeline_and_keeps_its_autoencoder(finished, tmp_path):
    config, first = finished
    more = dataclasses.replace(config, out=tmp_path, init=config.out / config.miniature, steps=1, peak_lr=1e-6)
    run = train(more)
    torch.testing.assert_close(weights(run), averaged(first), rtol=2e-3, atol=1e-5)  # fp16, then one small step
    kept, before = (pipeline_of(each).vae.state_dict() for each in (more, config))
    assert all(torch.equal(kept[name], before[name]) for name in before)


def test_continuing_can_take_over_an_autoencoder(finished, tmp_path):
    config, first = finished
    other = AutoencoderKL.from_pretrained(str(config.out / "vae"))
    with torch.no_grad():
        other.decoder.conv_out.bias += 0.25
    other.save_pretrained(str(tmp_path / "other"))
    init = config.out / config.miniature
    more = dataclasses.replace(config, out=tmp_path / "run", init=init, vae=tmp_path / "other", steps=1, peak_lr=1e-6)
    run = train(more)
    torch.testing.assert_close(weights(run), averaged(first), rtol=2e-3, atol=1e-5)  # fp16, then one small step
    expected = other.decoder.conv_out.bias.detach().half().float()
    assert torch.equal(pipeline_of(more).vae.decoder.conv_out.bias, expected)


def test_an_autoencoder_of_other_latents_is_refused(finished, tmp_path):
    config, _ = finished
    given = AutoencoderKL.from_pretrained(str(config.out / "vae"))
    AutoencoderKL.from_config({**given.config, "latent_channels": 8}).save_pretrained(str(tmp_path / "wide"))
    with pytest.raises(ValueError, match="8 latent channels"):
        train(dataclasses.replace(config, out=tmp_path, init=config.out / config.miniature, vae=tmp_path / "wide"))


def test_muon_takes_the_matrices_of_the_layers_and_resumes(finished, tmp_path):
    config, _ = finished
    changes = {"out": tmp_path, "vae": config.out / "vae", "optimizer": Optimizer.MUON}
    run = train(dataclasses.replace(config, **changes, steps=1))
    muon, adamw = run.optimizers
    taken = [each for optimizer in run.optimizers for group in optimizer.param_groups for each in group["params"]]
    assert {each.ndim for each in muon.param_groups[0]["params"]} == {2}
    assert len(taken) == len(set(map(id, taken))) == len(list(run.denoiser.parameters()))
    assert any(each is run.denoiser.transformer.proj_out.weight for each in adamw.param_groups[0]["params"])
    assert train(dataclasses.replace(config, **changes, steps=2)).step == 2


def test_rich_rounds_have_as_many_things_as_asked():
    _, captions = sample_round(0, 0, 6, 32, SceneKind.RICH, (1, 2))
    assert {caption.count(",") for caption in captions} == {0, 1}
    assert all(caption.count(",") >= 3 for caption in sample_round(0, 0, 6, 32, SceneKind.RICH)[1])


def test_two_miniatures_of_one_class_are_told_apart():
    assert [miniature_in(miniatures()[name]).name for name in MINIATURES] == list(MINIATURES)


def test_continuing_at_another_size_is_refused(finished, tmp_path):
    config, _ = finished
    size = dataclasses.replace(config.size, side=64)
    with pytest.raises(ValueError, match="images of 32 pixels"):
        train(dataclasses.replace(config, out=tmp_path, init=config.out / config.miniature, size=size))


def test_a_new_miniature_can_take_over_an_autoencoder(finished, tmp_path):
    config, _ = finished
    other = tiny_config(tmp_path, "pixart-mini", vae=config.out / config.miniature / "vae", steps=1)
    run = train(other)
    given, taken = (pipeline_of(each).vae for each in (config, other))
    assert all(torch.equal(taken.state_dict()[name], value) for name, value in given.state_dict().items())
    assert taken.config.scaling_factor == given.config.scaling_factor
    # PixArt's pipeline divides by scaling_factor and knows no shift.
    assert not run.vae.config.shift_factor
    assert not (tmp_path / "vae").exists()


def test_a_folder_tells_its_miniature(finished, tmp_path):
    config, _ = finished
    assert miniature_in(config.out / config.miniature).name == config.miniature
    with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
        miniature_in(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="FluxPipeline"):
        miniature_in(tmp_path)


def test_rounds_are_fresh_and_reproducible():
    images, captions = sample_round(seed=0, index=0, count=8, side=32)
    again, same_captions = sample_round(seed=0, index=0, count=8, side=32)
    _, other_captions = sample_round(seed=0, index=1, count=8, side=32)
    assert (images == again).all()
    assert captions == same_captions != other_captions


@pytest.mark.parametrize("miniature", MINIATURES.values(), ids=list(MINIATURES))
def test_every_word_is_one_token(miniature):
    tokenizer = miniature.new_tokenizer(vocabulary())
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


def test_sigmas_shift_as_a_scheduler_shifts_them():
    seen = []

    def denoiser(latents, sigmas, _):
        seen.append(sigmas)
        return torch.zeros_like(latents)

    for shift in (1.0, 4.0):
        generator = torch.Generator().manual_seed(0)
        MINIATURES["sd3-mini"].loss(denoiser, torch.zeros(64, 4, 2, 2), torch.zeros(64, 1), generator, shift)
    plain, shifted = seen
    torch.testing.assert_close(shifted, 4 * plain / (1 + 3 * plain))


@pytest.mark.parametrize("changes", [{"sigma_shift": 0.0}, {"sigma_shift": 2.0, "miniature": "pixart-mini"}])
def test_a_shift_that_means_nothing_is_refused(changes):
    with pytest.raises(ValueError, match="sigma_shift"):
        TrainConfig(out=Path(), steps=1, **changes)


def test_the_command_line_is_a_config():
    arguments = ["run", "--steps", "5", "--batch-size", "24", "--peak-lr", "4e-4"]
    config = train_sd3_mini.configuration(arguments)
    assert config == TrainConfig(out=Path("run"), steps=5, batch_size=24, peak_lr=4e-4)
    config = train_pixart_mini.configuration([*arguments, "--vae", "folder"])
    assert (config.miniature, config.vae, config.batch_size) == ("pixart-mini", Path("folder"), 24)
    assert config.size == MINIATURES["pixart-mini"].size


def test_rounds_that_are_drawn_ahead_are_the_same(tmp_path, monkeypatch):
    """Threads stand for the processes, which would import torch."""
    monkeypatch.setattr("trainer.ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(workers))
    config = tiny_config(tmp_path, "sd3-mini")
    inline = Rounds(config, SceneKind.FLAT)
    ahead = Rounds(dataclasses.replace(config, workers=3), SceneKind.FLAT)
    try:
        for index in range(4):
            (images, captions), (drawn, told) = inline.drawn(index), ahead.drawn(index)
            assert (images == drawn).all()
            assert captions == told
        assert len(ahead._ahead) == 2  # of the next rounds
    finally:
        ahead.close()
