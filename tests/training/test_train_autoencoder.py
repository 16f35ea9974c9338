import dataclasses
import signal
from pathlib import Path

import pytest
import torch
import train_autoencoder
from diffusers import AutoencoderKL
from mini_models import ModelSize
from mini_stages import encode_round, sample_round
from train_autoencoder import AutoencoderConfig, reconstruction_loss, trained_autoencoder


def tiny_config(out: Path, **changes) -> AutoencoderConfig:
    return dataclasses.replace(AutoencoderConfig(out=out, steps=3, threads=1, size=ModelSize(side=32)), **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three steps, uninterrupted."""
    config = tiny_config(tmp_path_factory.mktemp("finished"))
    return config, trained_autoencoder(config)


def weights(vae):
    return torch.cat([parameter.detach().flatten() for parameter in vae.parameters()])


def test_a_run_writes_an_autoencoder_whose_latents_are_standardized(finished):
    config, vae = finished
    stored = AutoencoderKL.from_pretrained(str(config.out / "vae"))
    assert torch.equal(weights(stored), weights(vae))
    images, _ = sample_round(config.seed + 1, 0, 64, 32)
    latents = encode_round(stored, images)
    # The statistics are of the round's 1,024 images, here are the first 64 of them.
    assert latents.mean().item() == pytest.approx(0.0, abs=0.1)
    assert latents.std().item() == pytest.approx(1.0, abs=0.1)


def test_a_finished_autoencoder_is_taken_as_it_is(finished):
    config, vae = finished
    again = trained_autoencoder(dataclasses.replace(config, steps=99))
    assert torch.equal(weights(again), weights(vae))


@pytest.mark.long
def test_a_terminated_run_resumes_where_it_was(finished, tmp_path, monkeypatch):
    config, whole = finished
    loss = train_autoencoder.reconstruction_loss

    def loss_and_terminate(restored, pixels):
        signal.raise_signal(signal.SIGTERM)
        return loss(restored, pixels)

    monkeypatch.setattr(train_autoencoder, "reconstruction_loss", loss_and_terminate)
    terminated = dataclasses.replace(config, out=tmp_path)
    with pytest.raises(InterruptedError, match="at step 1"):
        trained_autoencoder(terminated)
    monkeypatch.undo()
    assert not (tmp_path / "vae").exists()
    resumed = trained_autoencoder(terminated)
    # One thread and the same operations: only the order of a reduction could differ.
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=1e-5, atol=1e-7)


def test_a_checkpoint_of_other_settings_is_refused(finished, tmp_path):
    config, _ = finished
    (tmp_path / "autoencoder.pt").write_bytes((config.out / "autoencoder.pt").read_bytes())
    with pytest.raises(ValueError, match="use another folder"):
        trained_autoencoder(dataclasses.replace(config, out=tmp_path, peak_lr=1e-4))


def test_continuing_starts_from_the_given_weights(finished, tmp_path):
    config, vae = finished
    run = trained_autoencoder(dataclasses.replace(config, out=tmp_path, init=config.out / "vae", steps=1, peak_lr=1e-9))
    torch.testing.assert_close(weights(run), weights(vae), rtol=0, atol=1e-6)


def test_the_loss_holds_a_blurred_edge_against_the_autoencoder():
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1.0
    blurred = edge.clone()
    blurred[..., 3], blurred[..., 4] = 1 / 3, 2 / 3
    tinted = edge + (blurred - edge).abs().mean()  # of the same L1
    assert reconstruction_loss(edge, edge) == 0.0
    assert reconstruction_loss(blurred, edge) > 1.5 * reconstruction_loss(tinted, edge)


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="steps=0"):
        AutoencoderConfig(out=Path(), steps=0)


def test_the_command_line_is_a_config():
    config = train_autoencoder.configuration(["run", "--init", "vae", "--steps", "5"])
    assert config == AutoencoderConfig(out=Path("run"), init=Path("vae"), steps=5)
