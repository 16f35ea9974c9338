"""Quantized bundles beside an evaluation's own: what is refused, and the whole of it as its users run it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.manifest import MANIFEST_NAME
from cat_pruning.bundle.schedules import write_schedules
from cat_pruning.errors import BundleError, EngineError, SettingsError
from cat_pruning.evaluation import cli
from cat_pruning.evaluation.place import RESULTS, RUN
from cat_pruning.evaluation.quantized import open_quantized
from cat_pruning.evaluation.worker import Recipe
from cat_pruning.names import Quantization
from cat_pruning.schedule import Schedule
from cat_pruning.settings import PruneSettings

Edit = Callable[[dict[str, Any]], object]
SHORT = ["--prompts", "scenes:2", "--batch", "2", "--steps", "3", "--full-steps", "2", "--resolution", "64x64"]
SHORT += ["--guidance-scale", "3", "--methods", "cat", "--sheet", "1"]


def edited(bundle: Path, place: Path, edit: Edit = lambda manifest: None) -> Path:
    """A bundle with another manifest."""
    shutil.copytree(bundle, place, copy_function=os.link)
    manifest = json.loads((bundle / MANIFEST_NAME).read_text())
    edit(manifest)
    (place / MANIFEST_NAME).unlink()
    (place / MANIFEST_NAME).write_text(json.dumps(manifest))
    return place


def opened(first: Path, *places: Path) -> dict[str, Bundle]:
    return open_quantized(places, Bundle.open(first), None, "auto")


@pytest.mark.parametrize("name", list(Quantization))
def test_it_has_the_name_of_its_quantization(
    mini_bundle: Path, quantized_bundle: Bundle, tmp_path: Path, name: str
) -> None:
    """Whatever it is: this one's weights are int8 whatever it says."""
    changes = {"quantization": name, "calibration": "scenes:1" if Quantization(name).is_calibrated else None}
    place = edited(quantized_bundle.path, tmp_path / "other", lambda manifest: manifest.update(changes))
    assert opened(mini_bundle, place) == {name: Bundle.open(place)}
    assert opened(mini_bundle) == {}


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda m: m.update(quantization=None), "is not quantized; export one by cat-export --quantize or --weights"),
        (lambda m: m["source"].update(location="./mine"), "is of another source (location is ./mine, not sd3-mini)"),
        (lambda m: m["transformer_config"].update(num_layers=2), "is of another model (config num_layers is 2, not "),
        (lambda m: m.update(dtype="fp16"), "is of another model (dtype is fp16, not fp32) than "),
        (lambda m: m["settings"].update(num_clusters=3), "is of another settings (num_clusters is 3, not "),
        (lambda m: m["profiles"][0].update(name="other"), "is of another shapes ("),
        (lambda m: m["files"]["timestep.onnx.data"].update(sha256="0" * 64), "has other weights than "),
    ],
)
def test_another_model_is_refused(
    mini_bundle: Path, quantized_bundle: Bundle, tmp_path: Path, edit: Edit, says: str
) -> None:
    place = edited(
        quantized_bundle.path, tmp_path / "other", lambda manifest: (edit(manifest), manifest.update(macs=[]))
    )
    with pytest.raises(BundleError, match=f"^--quantized: {place} {re.escape(says)}") as caught:
        opened(mini_bundle, place)
    if "cat-export --quantize or" not in says:
        assert " --quantize int8 " in caught.value.remedy
        assert caught.value.remedy.endswith(f" --out {place} --force")


def test_what_is_calibrated_is_exported_again_with_its_calibration(
    mini_bundle: Path, quantized_bundle: Bundle, tmp_path: Path
) -> None:
    changes = {
        "quantization": "int8-calibrated",
        "calibration": "mine.txt",
        "unquantized": ["proj_out"],
        "dtype": "bf16",
    }
    place = edited(quantized_bundle.path, tmp_path / "other", lambda manifest: manifest.update(changes))
    with pytest.raises(BundleError, match=r"another model \(dtype is bf16, not fp32\)") as caught:
        opened(mini_bundle, place)
    assert " --quantize int8 --calibrate mine.txt --unquantized proj_out " in caught.value.remedy
    assert " --dtype fp32 " in caught.value.remedy


def test_schedules_are_those_of_the_first(mini_bundle: Path, quantized_bundle: Bundle, tmp_path: Path) -> None:
    first, other = edited(mini_bundle, tmp_path / "first"), edited(quantized_bundle.path, tmp_path / "other")
    one, two = Schedule.of(28, range(9)), Schedule.of(28, range(7))
    write_schedules(first, [one, two])
    assert opened(first, other)
    write_schedules(other, [one])
    assert opened(first, other)
    write_schedules(other, [Schedule.of(28, (*range(6), 9))])
    with pytest.raises(BundleError, match=r"has a schedule 28-7 that is not one of .*, whose schedules are used for"):
        opened(first, other)


def test_bundles_that_cannot_stand_beside_each_other(
    mini_bundle: Path, quantized_bundle: Bundle, tmp_path: Path
) -> None:
    path = quantized_bundle.path
    with pytest.raises(SettingsError, match=rf"{path} is in int8, and the others .*; give .* not quantized first"):
        opened(path, path)
    again = edited(path, tmp_path / "again")
    with pytest.raises(SettingsError, match=rf"--quantized: {path} and {again} are both in int8; give one of them"):
        opened(mini_bundle, path, again)


def recipe(bundle: Path, quantized: Path) -> Recipe:
    return Recipe(
        bundle=bundle,
        public_key=None,
        engine="auto",
        settings=PruneSettings(),
        methods=("cat",),
        metrics=(),
        prompts=(),
        clip_model="",
        lpips_weights=None,
        quantized=(quantized,),
    )


def test_a_worker_that_lacks_one_says_so_before_it_loads_anything(mini_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=f"^{tmp_path}/nowhere does not exist; "):
        recipe(mini_bundle, tmp_path / "nowhere")()


def test_a_transformer_elsewhere_than_the_pipeline_s_other_parts(mini_bundle: Path, quantized_bundle: Bundle) -> None:
    """As where the first bundle has plans for a GPU, and ONNX Runtime has no provider for it."""
    engine = SimpleNamespace(name="tensorrt")
    pipe = SimpleNamespace(transformer=SimpleNamespace(device=torch.device("cuda", 0), engine=engine))
    says = "is computed on cpu by onnxruntime, and the first bundle on cuda:0 by tensorrt; .* --engine onnxruntime"
    with pytest.raises(EngineError, match=says):
        recipe(mini_bundle, quantized_bundle.path)._transformer(quantized_bundle, pipe)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--quantized", "nowhere"], "nowhere does not exist"),
        (["--quantized", "{int8}", "--engine", "torch"], "--quantized --engine torch: it computes with the checkpoint"),
        (["--quantized", "{int8}", "--quantized", "{int8}"], "are both in int8"),
    ],
)
def test_bad_input_is_one_line(
    mini_bundle: Path,
    quantized_bundle: Bundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    given = [each.format(int8=quantized_bundle.path) for each in arguments]
    assert cli.main([str(mini_bundle), "--out", str(tmp_path / "out"), *SHORT, *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("cat-eval: ")
    assert says in line
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_an_evaluation_grows_by_a_quantized_bundle(
    mini_bundle: Path, quantized_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its images err as int8 does, and are scored against the first bundle's full run, which is made once more."""
    out = tmp_path / "out"
    command = [str(mini_bundle), "--out", str(out), *SHORT]
    assert cli.main(command) == 0
    before = (out / RESULTS).read_text()
    assert cli.main([*command, "--quantized", str(quantized_bundle.path)]) == 0
    assert "grows: int8-full-3 (2 prompts), int8-cat-3-0.3 (2 prompts)" in " ".join(capsys.readouterr().err.split())
    after = (out / RESULTS).read_text()
    assert after.startswith(before)
    results = [json.loads(line) for line in after.splitlines()]
    assert [each["candidate"] for each in results[6:]] == ["int8-full-3"] * 2 + ["int8-cat-3-0.3"] * 2
    full, cat = (results[n]["scores"]["latents_error"] for n in (6, 8))
    assert 1e-4 < full < 0.05
    assert full < cat
    assert all(each["cpu_seconds"] > 0 and "coverage" in each["scores"] for each in results)
    (spec,) = {each["quantized_sha256"] for each in json.loads((out / RUN).read_text())["candidates"][3:]}
    assert spec == quantized_bundle.manifest.digest
    assert (out / "images" / "int8-full-3" / "00000-0.png").exists()
    assert ">int8 cat<" in (out / "report.html").read_text()
