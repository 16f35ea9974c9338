"""`cat-generate`, in this process: what it writes, and how it refuses."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cat_pruning.settings import PruneSettings, Reuse
from cat_pruning.tools import generate
from cat_pruning.tools import generate_cli as cli
from cat_pruning.tools.generate import GenerateConfig

PROMPT = "a large blue star on a plain black background"
SHORT = ["--steps", "5", "--full-steps", "3", "--resolution", "64x96"]  # 96 tokens

Fails = Callable[..., str]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs the tool, which must exit with 2 and one line on standard error; returns that line."""

    def run(*arguments: object) -> str:
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse's way
            code = stop.code if isinstance(stop.code, int) else -1
        error = capsys.readouterr().err
        assert code == 2, error
        assert error.startswith("cat-generate: ")
        assert error.count("\n") == 1
        assert error.endswith("\n")
        return error

    return run


def run(*arguments: object) -> None:
    assert cli.main([str(argument) for argument in arguments]) == 0


@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_an_image(mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], engine: str) -> None:
    out = tmp_path / "out.png"
    run(mini_bundle, PROMPT, "-o", out, "--engine", engine, "--timing", *SHORT)
    with Image.open(out) as image:
        assert image.size == (96, 64)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    captured = capsys.readouterr()
    assert "out.png" in captured.out.replace("\n", "")
    (whole,) = re.findall(r"  ([\d.]+) s\n", captured.out)
    (stages,) = re.findall(r"^prompts ([\d,]+) ms, 5 steps ([\d,]+) ms, decoding ([\d,]+) ms$", captured.out, re.M)
    assert sum(int(each.replace(",", "")) for each in stages) == pytest.approx(float(whole) * 1e3, abs=10)
    assert captured.err == ""


def test_a_prompt_that_is_not_read_to_its_end(
    mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(mini_bundle, PROMPT, "a star " * 20, "-o", tmp_path / "out.png", "--steps", "1", "--resolution", "64x64")
    (said, _) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"the prompt 'a star .*…' has \d\d tokens, of which the text encoder reads 24", said)


def test_the_same_seed_makes_the_same_image(mini_bundle: Path, tmp_path: Path) -> None:
    images = []
    for name, seed in (("a.png", 4), ("b.png", 4), ("c.png", 5)):
        run(mini_bundle, PROMPT, "-o", tmp_path / name, "--seed", seed, *SHORT)
        with Image.open(tmp_path / name) as image:
            images.append(image.tobytes())
    assert images[0] == images[1] != images[2]


def test_the_bundles_own_size(mini_bundle: Path, tmp_path: Path) -> None:
    run(mini_bundle, PROMPT, "-o", tmp_path / "out.png", "--steps", 2)
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (128, 128)


def test_the_pipelines_own_steps_and_guidance(
    mini_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`StableDiffusion3Pipeline`'s, which are not those of the other families."""
    configs: list[GenerateConfig] = []
    original = generate.generate

    def remember(pipe: Any, settings: PruneSettings, config: GenerateConfig) -> Any:
        configs.append(config)
        return original(pipe, settings, dataclasses.replace(config, steps=2))  # 28 take a while

    monkeypatch.setattr(generate, "generate", remember)
    size = ["--resolution", "64x96"]
    run(mini_bundle, PROMPT, "-o", tmp_path / "out.png", *size)
    run(mini_bundle, PROMPT, "-o", tmp_path / "out.png", *size, "--steps", 3, "--guidance-scale", 1.5)
    assert [(config.steps, config.guidance_scale) for config in configs] == [(28, 7.0), (3, 1.5)]


@pytest.mark.parametrize(
    ("arguments", "note"),
    [
        (["--steps", "3"], "none of 3 steps is pruned: the first 8 are full (--full-steps)"),
        (["--steps", "5", "--full-steps", "5"], "none of 5 steps is pruned: the first 5 are full (--full-steps)"),
        (["--steps", "5", "--full-steps", "4"], ""),
        (
            ["--steps", "5", "--full-steps", "4", "--keep-ratio", "0"],
            "nothing is computed after the first 4 steps (--keep-ratio 0); give --refresh-every 2 --reuse extrapolate",
        ),
        (["--steps", "5", "--full-steps", "2", "--keep-ratio", "0", "--refresh-every", "2"], ""),
        (
            ["--steps", "4", "--full-steps", "2", "--refresh-every", "1"],
            "none of 4 steps is pruned: the first 2 are full (--full-steps), then one in 1 (--refresh-every)",
        ),
    ],
)
def test_a_run_without_a_pruned_step_says_so(
    mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], note: str
) -> None:
    run(mini_bundle, PROMPT, "-o", tmp_path / "out.png", "--resolution", "64x96", *arguments)
    assert " ".join(capsys.readouterr().err.split()) == note
    assert (tmp_path / "out.png").exists()


def test_what_the_command_line_changes_of_the_settings(
    mini_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[PruneSettings] = []
    original = generate.generate

    def remember(pipe: Any, settings: PruneSettings, config: GenerateConfig) -> Any:
        used.append(settings)
        return original(pipe, settings, dataclasses.replace(config, steps=2))

    monkeypatch.setattr(generate, "generate", remember)
    size = ["--resolution", "64x96"]
    run(mini_bundle, PROMPT, "-o", tmp_path / "out.png", *size)
    changes = ["--keep-ratio", "0.1", "--full-steps", "4", "--refresh-every", "3", "--reuse", "extrapolate"]
    run(mini_bundle, PROMPT, "-o", tmp_path / "out.png", *size, *changes)
    expected = PruneSettings(keep_ratio=0.1, full_steps=4, refresh_every=3, reuse=Reuse.EXTRAPOLATE)
    run(mini_bundle, PROMPT, "-o", tmp_path / "out.png", *size, "--preset", "forecast")
    run(mini_bundle, PROMPT, "-o", tmp_path / "out.png", *size, "--preset", "refreshed", "--full-steps", "6")
    forecast, refreshed = PruneSettings.preset("forecast"), PruneSettings.preset("refreshed", full_steps=6)
    assert used == [PruneSettings(), expected, forecast, refreshed]


@pytest.mark.long
def test_everything_that_it_draws(mini_bundle: Path, tmp_path: Path) -> None:
    summary = tmp_path / "summary.json"
    run(
        *(mini_bundle, PROMPT, "-o", tmp_path / "out.png", *SHORT),
        *("--compare", "--token-map", "--summary", summary),
    )
    names = {"out.png", "out.comparison.png", "out.token_map.png", "summary.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    for name in names - {"summary.json"}:
        with Image.open(tmp_path / name) as image:
            image.load()
    numbers = json.loads(summary.read_text())
    assert numbers["engine"] == "onnxruntime"
    assert numbers["step_speedup"] == pytest.approx(numbers["full_step_ms"] / numbers["pruned_step_ms"])
    assert numbers["mac_bound"] > 1
    assert numbers["full_macs"] > numbers["pruned_macs"]
    assert 5 < numbers["image_psnr_db"] < 100
    assert numbers["versions"]["torch"]


def test_equal_images_have_no_finite_psnr(mini_bundle: Path, tmp_path: Path) -> None:
    """No step is pruned, so the summary has nulls where there is no number."""
    summary = tmp_path / "summary.json"
    run(mini_bundle, PROMPT, "-o", tmp_path / "out.png", "--compare", "--summary", summary, *SHORT, "--full-steps", 9)
    numbers = json.loads(summary.read_text())
    assert numbers["image_psnr_db"] is None
    assert numbers["pruned_step_ms"] is None
    assert numbers["step_speedup"] is None
    assert numbers["full_macs"] == numbers["pruned_macs"]


def test_steps_that_compute_nothing(mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counted like others; their MACs bound nothing, and there are no tokens to draw."""
    summary = tmp_path / "summary.json"
    forecast = [*SHORT, "--keep-ratio", 0, "--refresh-every", 2]
    run(mini_bundle, PROMPT, "-o", tmp_path / "out.png", "--compare", "--summary", summary, *forecast)
    numbers = json.loads(summary.read_text())
    assert numbers["mac_bound"] is None
    assert numbers["full_macs"] > numbers["pruned_macs"]
    assert "bound by MACs –, a pruned step computes nothing" in " ".join(capsys.readouterr().out.split())
    drawn = [mini_bundle, PROMPT, "-o", tmp_path / "drawn.png", "--token-map", *forecast]
    assert cli.main([str(argument) for argument in drawn]) == 2
    assert "--token-map: every step computes all tokens or none" in capsys.readouterr().err
    assert not (tmp_path / "drawn.png").exists()


def test_two_prompts(mini_bundle: Path, tmp_path: Path) -> None:
    """In a file each, of the format that was asked for."""
    run(mini_bundle, PROMPT, "a large red circle", "-o", tmp_path / "out.webp", *SHORT)
    assert {path.name for path in tmp_path.iterdir()} == {"out-0.webp", "out-1.webp"}
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            assert (image.format, image.size) == ("WEBP", (96, 64))
    contents = {path.read_bytes() for path in tmp_path.iterdir()}
    assert len(contents) == 2


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--resolution", "64"], ["'64'", "HEIGHTxWIDTH"]),
        (["--resolution", "64x100"], ["64x100", "multiples of 8", "try 64x96"]),
        (["--resolution", "0x64"], ["0x64", "multiples of 8"]),
        (["--resolution", "512x64"], ["512x64", "256x256 pixels at most"]),
        (["--resolution", "8x64"], ["8 tokens", "num_clusters=20", "larger resolution"]),
        (["--keep-ratio", "-0.1"], ["--keep-ratio", "'-0.1'", "a number from 0 to 1"]),
        (["--keep-ratio", "1.5"], ["--keep-ratio", "'1.5'", "a number from 0 to 1"]),
        (["--keep-ratio", "nan"], ["--keep-ratio", "'nan'", "a number from 0 to 1"]),
        (["--keep-ratio", "much"], ["--keep-ratio", "'much'", "--help"]),
        (["--full-steps", "1"], ["--full-steps", "'1'", "a whole number from 2"]),
        (["--refresh-every", "-1"], ["--refresh-every", "'-1'", "a whole number from 0"]),
        (["--reuse", "forget"], ["--reuse", "'forget'", "extrapolate"]),
        (["--preset", "fast"], ["--preset", "'fast' (choose from 'paper', 'refreshed', 'forecast')"]),
        (["--steps", "0"], ["--steps", "'0'", "a whole number from 1 to 10000"]),
        (["--steps", "-3"], ["--steps", "'-3'", "a whole number from 1"]),
        (["--seed", "-1"], ["--seed", "'-1'", "a whole number from 0 to 9223372036854775807"]),
        (["--seed", str(2**70)], ["--seed", "expected"]),
        (["--guidance-scale", "nan"], ["--guidance-scale", "'nan'", "a number from -1000 to 1000"]),
        (["--engine", "abacus"], ["abacus", "onnxruntime"]),
        (["--summary", "summary.json"], ["--summary", "--compare"]),
        (["--token-map", "--steps", "8"], ["--token-map", "8 steps", "--full-steps"]),
        (["--token-map", "--steps", "9", "--refresh-every", "1"], ["--token-map", "one in 1 (--refresh-every)"]),
        (["--out", "out.gif"], ["out.gif", "ends in .png, .jpg, .jpeg, .webp"]),
        (["--out", "nowhere/out.png"], ["nowhere", "does not exist", "make it"]),
        (["--out", "taken.png"], ["taken.png", "cannot be written", "--out"]),
        (["--offload", "text"], ["text_encoder, text_encoder_2 of this bundle run in torch", "--components"]),
        (["--compare", "--summary", "taken.png"], ["--summary", "cannot be written", "another path"]),
    ],
)
def test_bad_arguments(
    mini_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: Fails,
    arguments: list[str],
    said: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.png").mkdir()
    # Few steps where it gets as far as that, and one pruned, for the note that none is would be a line of its own.
    few = [] if "--steps" in arguments or "--full-steps" in arguments else ["--steps", "3", "--full-steps", "2"]
    line = fails(mini_bundle, PROMPT, *few, *arguments)
    for words in said:
        assert words in line
    assert [path.name for path in tmp_path.iterdir()] == ["taken.png"]


def test_nothing_is_written_into_the_bundle(mini_bundle: Path, fails: Fails) -> None:
    """Where it would not load again."""
    for place in ("pipeline/out.png", "pipeline/vae/../out.png"):
        assert "would be among the own files of the bundle" in fails(mini_bundle, PROMPT, "-o", mini_bundle / place)
    line = fails(mini_bundle, PROMPT, "--compare", "--summary", mini_bundle / "manifest.json")
    assert "--summary" in line
    assert "would be among the own files of the bundle" in line


@pytest.mark.parametrize("prompts", [[""], ["  "], [PROMPT, ""]])
def test_an_empty_prompt(mini_bundle: Path, fails: Fails, prompts: list[str]) -> None:
    assert "empty prompt; say what to draw" in fails(mini_bundle, *prompts)


def test_no_prompt(mini_bundle: Path, fails: Fails) -> None:
    assert "prompt" in fails(mini_bundle)


def test_no_bundle(tmp_path: Path, fails: Fails) -> None:
    out = ["-o", tmp_path / "out.png"]
    assert "does not exist; give the --out of cat-export" in fails(tmp_path / "nowhere", PROMPT, *out)
    line = fails(tmp_path, PROMPT, *out)  # a directory, but no bundle
    assert "manifest.json is missing" in line
    assert "or make one: cat-export" in line
    (tmp_path / "file").touch()
    assert "is a file, expected a directory" in fails(tmp_path / "file", PROMPT, *out)


def test_a_bundle_that_is_not_what_it_was(mini_bundle: Path, tmp_path: Path, fails: Fails) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(mini_bundle, bundle)
    out = ["-o", tmp_path / "out.png"]
    weights, manifest = bundle / "step.onnx.data", bundle / "manifest.json"
    content, text = weights.read_bytes(), manifest.read_text()

    weights.write_bytes(content[:-1])
    line = fails(bundle, PROMPT, *out)
    assert "step.onnx.data" in line
    assert "truncated or edited; run cat-export again: cat-export --model sd3-mini" in line
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "step.onnx.data was changed after the export" in fails(bundle, PROMPT, *out)
    weights.write_bytes(content)

    fields = json.loads(text)
    manifest.write_text(json.dumps(fields | {"format_version": 99}))
    assert "format version 99" in fails(bundle, PROMPT, *out)
    manifest.write_text(text[: len(text) // 2])
    assert "is not JSON" in fails(bundle, PROMPT, *out)
    assert not (tmp_path / "out.png").exists()


def test_help_and_interruption(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    assert "examples:" in capsys.readouterr().out

    def interrupt(arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_generate", interrupt)
    assert cli.main(["bundle", PROMPT]) == 130
    assert capsys.readouterr().err == "cat-generate: interrupted; nothing was left behind\n"
