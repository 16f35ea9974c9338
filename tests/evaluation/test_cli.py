"""`cat-eval`, run on the miniature as its users run it."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from signing_keys import write_keys

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.errors import SettingsError
from cat_pruning.evaluation import cli
from cat_pruning.evaluation.arguments import parse
from cat_pruning.evaluation.methods import METHODS
from cat_pruning.evaluation.place import RESULTS, RUN
from cat_pruning.models.prompts import load_prompts

# What tells the methods apart, of few steps and scenes; `test_an_interruption_says_that_it_goes_on` has its own.
QUICK = ["--quick", "--prompts", "scenes:2", "--steps", "10", "--full-steps", "4", "--guidance-scale", "3"]
QUICK += ["--resolution", "96x96"]


def run(*arguments: Any) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def quick(mini_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole quick evaluation, every policy."""
    out = tmp_path_factory.mktemp("quick") / "out"
    assert run(mini_bundle, "--out", out, *QUICK) == 0
    return out


def results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / RESULTS).read_text().splitlines()]


@pytest.mark.long
def test_quick_has_every_image_of_every_candidate(quick: Path) -> None:
    candidates = json.loads((quick / RUN).read_text())["candidates"]
    methods = [candidate["method"] for candidate in candidates]
    assert methods == ["full", "fewer-steps", *METHODS]
    found = {(result["candidate"], result["prompt"]) for result in results(quick)}
    assert len(found) == len(results(quick)) == 11 * 2


@pytest.mark.long
def test_quick_tells_the_methods_apart(quick: Path) -> None:
    """What holds on two scenes already: CAT is near the full run, AT-EDM on a transformer is not."""

    def mean(method: str, metric: str) -> float:
        values = [r["scores"][metric] for r in results(quick) if r["candidate"].startswith(method)]
        assert len(values) == 2
        return float(sum(values) / 2)

    assert mean("cat-", "latents_error") < 0.2
    assert mean("at-edm-", "latents_error") > 0.4
    assert mean("cat-", "coverage") > 0.6
    assert mean("cat-", "latents_error") < mean("noise-", "latents_error") < mean("at-edm-", "latents_error")
    assert all(set(r["scores"]) == {"coverage"} for r in results(quick) if r["candidate"] == "full-10")


@pytest.mark.long
def test_quick_leaves_pictures_and_a_report(quick: Path) -> None:
    report = (quick / "report.html").read_text()
    for method in ("cat", "at-edm", "ras", "random"):
        assert (quick / "images" / f"{method}-10-0.3" / "00001-0.png").exists()
        assert (quick / "tokens" / f"{method}-10-0.3.png").exists()
        assert method in report


@pytest.mark.long
def test_an_interrupted_run_goes_on(quick: Path, mini_bundle: Path, tmp_path: Path) -> None:
    """What is missing is computed, the same as it was; what is there is kept."""
    out = tmp_path / "out"
    shutil.copytree(quick, out)
    lines = (out / RESULTS).read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"candidate": "cat-' not in line]
    (out / RESULTS).write_text("".join(kept) + lines[8][:30])  # and the line that was being written
    assert run(mini_bundle, "--out", out, *QUICK) == 0
    again = (out / RESULTS).read_text().splitlines(keepends=True)
    assert again[: len(kept)] == kept

    def scores(all_results: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, float]]:
        return {(r["candidate"], r["prompt"]): r["scores"] for r in all_results}

    before, after = scores(results(quick)), scores(results(out))
    assert before.keys() == after.keys()
    for key, values in before.items():
        assert after[key] == pytest.approx(values, rel=1e-3)


@pytest.mark.long
def test_a_finished_run_grows(
    quick: Path, mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a ratio, for one policy; what is there stays, the other policies too."""
    out = tmp_path / "out"
    shutil.copytree(quick, out)
    before = (out / RESULTS).read_text()
    assert run(mini_bundle, "--out", out, *QUICK, "--methods", "cat", "--keep-ratio", "0.5") == 0
    assert (out / RESULTS).read_text().startswith(before)
    grown = " ".join(capsys.readouterr().err.split())
    assert f"{out} grows: fewer-steps-10-0.5 (2 prompts), cat-10-0.5 (2 prompts)" in grown
    added = {(r["candidate"], r["prompt"]) for r in results(out)[len(results(quick)) :]}
    assert added == {(candidate, prompt) for candidate in ("fewer-steps-10-0.5", "cat-10-0.5") for prompt in range(2)}
    report = (out / "report.html").read_text()
    assert "keep 0.5" in report
    assert "random" in report


@pytest.mark.long
def test_a_finished_run_computes_nothing(
    quick: Path, mini_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(quick, out)
    monkeypatch.setattr("cat_pruning.evaluation.worker.generate", None)
    assert run(mini_bundle, "--out", out, *QUICK) == 0
    assert (out / RESULTS).read_bytes() == (quick / RESULTS).read_bytes()


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--guidance-scale", "5"], "guidance_scale was 3.0, is 5.0"),
        (["--full-steps", "5"], "full_steps was 4, is 5"),
        (["--prompts", "scenes:3"], "prompts were 2, are 3"),
    ],
)
def test_other_settings_are_refused(
    quick: Path, mini_bundle: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    before = (quick / RESULTS).read_bytes()
    assert run(mini_bundle, "--out", quick, *QUICK, *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("cat-eval: ")
    assert says in error
    assert "--force" in error
    assert (quick / RESULTS).read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--methods", "best"], "method 'best' is not known"),
        (["--methods", "cat,at-edm", "--engine", "onnxruntime"], "--engine torch"),
        (["--metrics", "fid"], "known are psnr"),
        (["--metrics", "clip", "--clip-model", "/nowhere"], "/nowhere"),
        (["--metrics", "lpips"], "alexnet-owt-7be5be79.pth"),
        (["--methods", "cat,heun"], "method 'heun' is not known"),
        (["--keep-ratio", "1.5"], "--keep-ratio: '1.5': expected a number from 0 to 1"),
        (["--keep-ratio", "much"], "--keep-ratio"),
        (["--keep-ratio", "0.3,0"], "--keep-ratio 0: "),
        (["--keep-ratio", "0.3,0.30000000001"], "--keep-ratio 0.3,0.30000000001: they differ after the sixth digit"),
        (["--steps", "0"], "--steps: '0': expected a whole number from 1"),
        (["--seeds", "0"], "--seeds: '0': expected"),
        (["--batch", "-1"], "--batch: '-1': expected"),
        (["--prompts", "scenes:0"], "scenes:0"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--resolution", "100x100"], "100"),
        (["--full-steps", "1"], "--full-steps: '1': expected a whole number from 2"),
    ],
)
def test_bad_input_is_one_line(
    mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    try:
        code = run(mini_bundle, "--out", tmp_path / "out", "--quick", *arguments)
    except SystemExit as stopped:  # argparse's own
        code = int(stopped.code or 0)
    assert code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("cat-eval: ")
    assert says in error
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_is_not_signed_is_not_evaluated(
    mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a directory and of a URL; AT-EDM loads what no signature is of."""
    write_keys(tmp_path)
    key = ["--public-key", tmp_path / "key.public.pem", "--out", tmp_path / "out", "--quick"]
    for place in (mini_bundle, f"file://{mini_bundle}"):
        assert run(place, *key) == 2
        assert f"{place} is not signed: it has no " in capsys.readouterr().err
    arguments = parse([str(mini_bundle), *map(str, key), "--methods", "cat,at-edm"])
    with pytest.raises(SettingsError, match="--methods at-edm and --public-key: it loads the checkpoint"):
        cli._recipe(arguments, Bundle.open(mini_bundle), [])
    arguments.methods = None
    assert "at-edm" not in cli._recipe(arguments, Bundle.open(mini_bundle), []).methods
    assert not (tmp_path / "out").exists()


def test_a_worker_elsewhere_can_load_what_is_asked_for(
    mini_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its working directory is another, and nothing but a pickle gets there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip").mkdir()
    bundle, prompts = Bundle.open(mini_bundle), load_prompts("scenes:1")
    given = ["--public-key", "k.pem", "--lpips-weights", "w.pth", "--clip-model", "clip", "--metrics", "clip,lpips"]
    recipe = cli._recipe(parse(["bundle", "--out", "out", *given]), bundle, prompts)
    assert (recipe.bundle, recipe.public_key) == (tmp_path / "bundle", tmp_path / "k.pem")
    assert (recipe.lpips_weights, recipe.clip_model) == (tmp_path / "w.pth", str(tmp_path / "clip"))
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    url = parse(["hf://owner/name", "--out", "out", "--clip-model", "openai/clip-vit-base-patch16"])
    recipe = cli._recipe(url, bundle, prompts)
    assert (recipe.bundle, recipe.clip_model) == ("hf://owner/name", "openai/clip-vit-base-patch16")


def test_former_names_are_taken_with_a_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["bundle", "--out", str(tmp_path), "--policies", "cat,forecast", "--metrics", "scene,psnr,coverage"]
    arguments = parse(given)
    assert (arguments.methods, arguments.metrics) == (("cat", "forecast"), ("coverage", "psnr"))
    assert capsys.readouterr().err.splitlines() == [
        "cat-eval: --policies is called --methods",
        "cat-eval: --metrics scene is called coverage",
    ]
    assert parse([*given[:3], "--methods", "cat", "--metrics", "coverage"]).methods == ("cat",)
    assert capsys.readouterr().err == ""


def test_an_empty_prompt_file(mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    assert run(mini_bundle, "--out", tmp_path / "out", "--prompts", tmp_path / "empty.txt") == 2
    assert "has no prompts" in capsys.readouterr().err


def test_scenes_cannot_be_scored_for_other_prompts(
    mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a lighthouse in a storm\n")
    arguments = ("--prompts", tmp_path / "prompts.txt", "--metrics", "coverage")
    assert run(mini_bundle, "--out", tmp_path / "out", *arguments) == 2
    assert "a lighthouse in a storm" in capsys.readouterr().err


def test_a_file_that_is_no_evaluation_is_left_alone(
    mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert run(mini_bundle, "--out", tmp_path / "notes.txt", "--quick") == 2
    assert "is no directory" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_files_of_others_are_told_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], force: list[str]
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "holiday.jpg").write_text("mine")
    assert run(tmp_path / "no-bundle", "--out", tmp_path, "--quick", *force) == 2
    assert f"{tmp_path} has images/holiday.jpg, not listed by an evaluation's run.json" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
    assert (tmp_path / "images" / "holiday.jpg").read_text() == "mine"


@pytest.mark.long
def test_an_interruption_says_that_it_goes_on(
    mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cat_pruning.evaluation.evaluate.evaluate", interrupted)
    assert run(mini_bundle, "--out", tmp_path / "out", "--quick") == 130
    assert "what is done is kept" in capsys.readouterr().err
    begun = json.loads((tmp_path / "out" / RUN).read_text())
    assert begun["prompts_source"] == "scenes:4"  # and what else --quick is where nothing is said
    assert {(candidate["steps"], candidate["keep_ratio"]) for candidate in begun["candidates"]} == {
        (28, 1.0),
        (28, 0.3),
    }
    assert {candidate["prompts"] for candidate in begun["candidates"]} == {4}
    assert begun["sheet"] == 4
