"""`cat-bundle` on the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bundle_files import edit, export, export_with_plans, plan_set, small_manifest
from fsspec.implementations.memory import MemoryFileSystem
from signing_keys import write_keys

from cat_pruning.bundle.bundle import Bundle
from cat_pruning.bundle.changes import sign_bundle
from cat_pruning.bundle.manifest import MANIFEST_NAME
from cat_pruning.bundle.schedules import write_schedules
from cat_pruning.bundle.signatures import PublicKey
from cat_pruning.errors import BundleError, EngineError, SettingsError
from cat_pruning.runtime.pipeline import load_pipeline
from cat_pruning.runtime.transformer import CatTransformer
from cat_pruning.schedule import MadeFor, Schedule, config_sha256
from cat_pruning.tools import bundle_cli, generate_cli

RTX = plan_set("tensorrt_rtx", "1.7", "sm80", "sm86")
SM90 = plan_set("tensorrt", "11.4", "sm90")


class CatBundle:
    """Runs the tool: its exit code, what it printed, and its JSON."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: object, code: int = 0) -> str:
        assert bundle_cli.main([*map(str, arguments)]) == code
        printed, errors = self.capsys.readouterr()
        assert errors == "" if code < 2 else errors.startswith("cat-bundle: ") and errors.count("\n") == 1
        return printed if code < 2 else errors

    def json(self, *arguments: object, code: int = 0) -> Any:
        return json.loads(self(*arguments, "--json", code=code))


@pytest.fixture
def cat_bundle(capsys: pytest.CaptureFixture[str]) -> CatBundle:
    return CatBundle(capsys)


def schedule(steps: int, full: int) -> Schedule:
    """For the model of `small_manifest`."""
    made_for = MadeFor(
        transformer_class="SD3Transformer2DModel", config_sha256=config_sha256({"num_layers": 2}),
        scheduler="FlowMatchEulerDiscreteScheduler", guidance_scale=3.0, height=256, width=256, prompts=24,
    )  # fmt: skip
    weights = {step: {full - 1: 1.0} for step in range(full, steps)}
    return Schedule.of(steps, range(full), weights, made_for=made_for)


@pytest.fixture
def planned(tmp_path: Path) -> Bundle:
    bundle = export_with_plans(tmp_path / "[bold]sd3", RTX, SM90)  # brackets are brackets
    return write_schedules(bundle.path, [schedule(28, 7), schedule(28, 14)])


# ------------------------------------------------------------------ inspect


def test_what_is_in_a_bundle(planned: Bundle, cat_bundle: CatBundle) -> None:
    told = cat_bundle.json("inspect", planned.path)
    manifest = planned.manifest
    assert told["size"] == sum(spec.size for spec in manifest.files.values())
    assert told["size"] == sum(each["size"] for each in (*told["parts"], *told["plans"], *told["schedules"]))
    assert [each["name"] for each in told["parts"]] == [
        "pipeline/model_index.json", "pipeline/vae", "prompt.onnx", "step.onnx", "timestep.onnx",
    ]  # fmt: skip
    assert [(each["name"], each["architectures"], each["parts"]) for each in told["plans"]] == [
        ("tensorrt_rtx-1.7-sm80", ["sm80", "sm86"], ["prompt", "timestep", "step"]),
        ("tensorrt-11.4-sm90", ["sm90"], ["prompt", "timestep", "step"]),
    ]
    assert [(each["name"], each["num_steps"], each["full_steps"], each["speedup"]) for each in told["schedules"]] == [
        ("28-14", 28, 14, 2.0),
        ("28-7", 28, 7, 4.0),
    ]
    assert told["settings"] == json.loads(json.dumps(manifest.settings.to_dict()))
    assert told["source"]["location"] == "some/sd3"
    printed = cat_bundle("inspect", planned.path)
    for said in (
        str(planned.path),
        "some/sd3 at 0123",
        "keep_ratio 0.3",
        "tensorrt-11.4-sm90",
        "TensorRT-RTX 1.7",
        "4×",
    ):
        assert said in printed


def test_a_graph_is_told_with_its_weights(mini_bundle: Path, cat_bundle: CatBundle) -> None:
    told = cat_bundle.json("inspect", mini_bundle)
    files = Bundle.open(mini_bundle).manifest.files
    step = next(each for each in told["parts"] if each["name"] == "step.onnx")
    assert step["size"] == files["step.onnx"].size + files["step.onnx.data"].size
    assert step["num_files"] == 2
    assert {"pipeline/vae", "pipeline/text_encoder", "prompt.onnx"} < {each["name"] for each in told["parts"]}


def test_parts_that_are_on_the_hub(tmp_path: Path, cat_bundle: CatBundle) -> None:
    fields = json.loads(small_manifest().model_dump_json()) | {"pipeline": {"kind": "hub", "hub_id": "some/sd3"}}
    export(tmp_path / "sd3", type(small_manifest()).model_validate_json(json.dumps(fields)))
    assert "the pipeline's other parts are some/sd3's on the hub" in cat_bundle("inspect", tmp_path / "sd3")


# ------------------------------------------------------------------ verify


def statuses(told: Any) -> dict[str, str]:
    return {finding["topic"]: finding["status"] for finding in told["findings"]}


def test_an_export_holds(mini_bundle: Path, cat_bundle: CatBundle) -> None:
    told = cat_bundle.json("verify", mini_bundle)
    assert told["holds"] is True
    assert set(statuses(told).values()) == {"ok"}
    assert {"graphs", "pipeline", "files", "schedules"} < statuses(told).keys()
    assert f"{mini_bundle} is what was exported." in cat_bundle("verify", mini_bundle)


@pytest.mark.parametrize(
    ("name", "topic", "said"),
    [
        ("step.onnx", "graphs", "step.onnx was changed after the export: its SHA-256 is "),
        ("step.onnx.data", "graphs", "step.onnx.data was changed"),
        ("pipeline/vae/config.json", "pipeline", "pipeline/vae/config.json was changed"),
        ("data_loader.py", "files", "data_loader.py was changed"),
        ("plans/tensorrt_rtx*/timestep.plan", "plans tensorrt_rtx-", "timestep.plan was changed"),
    ],
)
def test_a_file_that_was_edited(
    mini_bundle: Path, tmp_path: Path, cat_bundle: CatBundle, name: str, topic: str, said: str
) -> None:
    copy = Path(shutil.copytree(mini_bundle, tmp_path / "copy", copy_function=link))
    if not (found := list(copy.glob(name))):
        pytest.skip(f"no {name}: TensorRT-RTX is not installed")
    content = found[0].read_bytes()
    found[0].unlink()
    found[0].write_bytes(content)
    edit(found[0])
    told = cat_bundle.json("verify", copy, code=1)
    assert told["holds"] is False
    (problem,) = (finding for finding in told["findings"] if finding["status"] == "problem")
    assert problem["topic"].startswith(topic)
    assert said in problem["text"]
    assert problem["remedy"].startswith("run cat-export again: cat-export --model sd3-mini ")


def link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


def test_several_files_that_were_edited_are_counted(planned: Bundle, cat_bundle: CatBundle) -> None:
    for plan in RTX:
        edit(planned.path / plan.file)
    told = cat_bundle.json("verify", planned.path, code=1)  # the graphs of this bundle are none either
    text = f"{RTX[0].file}, {RTX[1].file}, {RTX[2].file} are not what was exported"
    assert text in [finding["text"] for finding in told["findings"]]
    assert not told["holds"]


def test_files_that_are_added(planned: Bundle, cat_bundle: CatBundle) -> None:
    """Among the pipeline's a loader would take them; elsewhere nothing does."""
    (planned.path / "notes.txt").write_text("mine")
    findings = {each["topic"]: each for each in cat_bundle.json("verify", planned.path, code=1)["findings"]}
    assert findings["pipeline"]["status"] == "ok"
    assert (findings["others"]["status"], "notes.txt" in findings["others"]["text"]) == ("warning", True)
    (planned.path / "pipeline" / "vae" / "model.bin").write_text("mine")
    findings = {each["topic"]: each for each in cat_bundle.json("verify", planned.path, code=1)["findings"]}
    assert "pipeline/vae/model.bin added after the export" in findings["pipeline"]["text"]


def test_a_set_that_lacks_a_plan(tmp_path: Path, cat_bundle: CatBundle) -> None:
    bundle = export_with_plans(tmp_path / "sd3", RTX[:2])
    findings = {each["topic"]: each for each in cat_bundle.json("verify", bundle.path, code=1)["findings"]}
    finding = findings["plans tensorrt_rtx-1.7-sm80"]
    assert finding["text"] == "no plan of step.onnx"
    assert finding["remedy"] == f"cat-bundle prune {bundle.path} --plans tensorrt_rtx-1.7-sm80"


@pytest.mark.parametrize("command", ["inspect", "verify", "prune", "diff"])
def test_a_bundle_that_is_truncated_is_one_line(planned: Bundle, cat_bundle: CatBundle, command: str) -> None:
    (planned.path / "step.onnx").write_bytes(b"a")
    others = [planned.path] if command == "diff" else []
    line = cat_bundle(command, planned.path, *others, code=2)
    assert "step.onnx has 1 bytes, expected 12: truncated or edited; run cat-export again" in line


# ------------------------------------------------------------------ prune


def test_plans_and_schedules_are_dropped(planned: Bundle, cat_bundle: CatBundle) -> None:
    printed = cat_bundle("prune", planned.path, "--plans", "tensorrt", "--schedules", "28-7")
    assert printed.splitlines()[:2] == ["dropped the plans tensorrt-11.4-sm90", "dropped the schedule 28-7"]
    now = Bundle.open(planned.path).manifest
    assert now.plans == RTX
    assert [name[:16] for name in now.schedules] == ["schedules/28-14."]
    told = cat_bundle.json("prune", planned.path, "--plans", "*", "--schedules", "*")
    assert told["plans"] == ["tensorrt_rtx-1.7-sm80"]
    assert told["schedules"] == ["28-14"]
    assert told["num_bytes"] > 0
    assert sorted(path.name for path in planned.path.iterdir()) == [
        MANIFEST_NAME, "pipeline", "prompt.onnx", "step.onnx", "timestep.onnx",
    ]  # fmt: skip


def test_what_is_not_there_is_not_dropped(planned: Bundle, cat_bundle: CatBundle) -> None:
    line = cat_bundle("prune", planned.path, "--plans", "tensorrt", "--plans", "sm75", code=2)
    assert "the bundle has no plans 'sm75'; it has tensorrt_rtx-1.7-sm80, tensorrt-11.4-sm90" in line
    assert Bundle.open(planned.path) == planned


# ------------------------------------------------------------------ diff


def test_a_copy_is_the_same(planned: Bundle, tmp_path: Path, cat_bundle: CatBundle) -> None:
    copy = shutil.copytree(planned.path, tmp_path / "copy")
    assert cat_bundle("diff", planned.path, copy) == f"{planned.path} and {copy} are the same bundle\n"
    assert cat_bundle.json("diff", planned.path, copy)["same"] is True


def test_two_bundles_that_differ(planned: Bundle, tmp_path: Path, cat_bundle: CatBundle) -> None:
    manifest = small_manifest()
    changed = manifest.model_copy(
        update={
            "settings": manifest.settings.replace(full_steps=5),
            "transformer_config": {"num_layers": 2, "qk_norm": None, "new": 1},
            "versions": {"torch": "2.14.0"},
        }
    )
    other = export(tmp_path / "other", changed, step=b"other weights")
    told = cat_bundle.json("diff", planned.path, other.path, code=1)
    assert told["same"] is False
    found = {(each["section"], each["name"]): (each["first"], each["second"]) for each in told["differences"]}
    assert found.pop(("settings", "full_steps")) == (manifest.settings.full_steps, 5)
    assert found.pop(("model", "config new")) == (None, 1)
    assert found.pop(("versions", "torch")) == ("2.13.0", "2.14.0")
    first, second = found.pop(("parts", "step.onnx"))
    assert (first[:4], second[:4]) == ("12 B", "13 B")
    assert {key: second for key, (_, second) in found.items()} == dict.fromkeys(
        [
            ("plans", "tensorrt_rtx-1.7-sm80"),
            ("plans", "tensorrt-11.4-sm90"),
            ("schedules", "28-7"),
            ("schedules", "28-14"),
        ]
    )
    printed = cat_bundle("diff", planned.path, other.path, code=1)
    assert "full_steps" in printed
    assert "tensorrt-11.4-sm90" in printed


# ------------------------------------------------------------------ sign


def test_signed_it_verifies_with_the_key(mini_bundle: Path, tmp_path: Path, cat_bundle: CatBundle) -> None:
    copy = Path(shutil.copytree(mini_bundle, tmp_path / "copy", copy_function=link))
    private, public = write_keys(tmp_path)
    assert "not signed" in cat_bundle("inspect", copy)
    assert cat_bundle("sign", copy, "--key", private) == f"{copy} is signed\n"
    assert cat_bundle.json("inspect", copy)["signed"] is True
    told = cat_bundle.json("verify", copy, "--public-key", public)
    assert (told["holds"], told["signed_with"]) == (True, str(public))
    assert f"{copy} is what was exported, signed with the key of {public}." in cat_bundle(
        "verify", copy, "--public-key", public
    )
    other = write_keys(tmp_path, "other")[1]
    line = cat_bundle("verify", copy, "--public-key", other, code=2)
    assert line.startswith(f"cat-bundle: {copy} is not signed with the key of {other}, or was changed after it was")


def test_what_does_not_hold_is_not_signed(mini_bundle: Path, tmp_path: Path, cat_bundle: CatBundle) -> None:
    copy = Path(shutil.copytree(mini_bundle, tmp_path / "copy", copy_function=link))
    content = (copy / "data_loader.py").read_bytes()
    (copy / "data_loader.py").unlink()
    (copy / "data_loader.py").write_bytes(content[:-1] + b"#")
    line = cat_bundle("sign", copy, "--key", write_keys(tmp_path)[0], code=2)
    assert line.startswith(f"cat-bundle: {copy} is not signed: {copy}: data_loader.py was changed after the export")
    assert not (copy / "manifest.json.sig").exists()


@pytest.mark.parametrize("signs", [False, True])
def test_images_from_a_bundle_that_must_be_signed(
    mini_bundle: Path, tmp_path: Path, cat_bundle: CatBundle, monkeypatch: pytest.MonkeyPatch, signs: bool
) -> None:
    """Refused before anything of it is loaded, on the command line and in Python."""
    copy = Path(shutil.copytree(mini_bundle, tmp_path / "copy", copy_function=link))
    private, public = write_keys(tmp_path)
    generate = [copy, "a star", "--out", tmp_path / "a.png", "--public-key", public, "--steps", "2"]
    loaded: list[str] = []

    def load(bundle: Bundle, *_: object, **__: object) -> None:
        loaded.append(str(bundle.path))
        raise EngineError("loaded")

    monkeypatch.setattr("cat_pruning.runtime.pipeline.engine_from_bundle", load)
    monkeypatch.setattr("cat_pruning.runtime.transformer.engine_from_bundle", load)
    said = "loaded"
    if signs:
        cat_bundle("sign", copy, "--key", private)
    else:
        said = f"{copy} is not signed: it has no manifest.json.sig, and {public} was given as the key"
    assert generate_cli.main([*map(str, generate)]) == 2
    assert cat_bundle.capsys.readouterr().err.startswith(f"cat-generate: {said}")
    for load_bundle in (load_pipeline, CatTransformer.from_bundle):
        with pytest.raises(EngineError if signs else BundleError) as caught:
            load_bundle(copy, public_key=public)
        assert str(caught.value).startswith(said)
    assert loaded == [str(copy)] * (3 if signs else 0)
    with pytest.raises(SettingsError, match="it loads the checkpoint, which is not in the bundle and not signed"):
        load_pipeline(copy, "torch", public_key=public)


# ------------------------------------------------------------------ push and pull


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    files = MemoryFileSystem()
    files.store.clear()
    yield files
    files.store.clear()


@pytest.mark.usefixtures("memory")
def test_pushed_and_pulled(planned: Bundle, tmp_path: Path, cat_bundle: CatBundle) -> None:
    assert cat_bundle("push", planned.path, "memory://models/sd3") == f"memory://models/sd3 has {planned.path}\n"
    assert cat_bundle("pull", "memory://models/sd3", tmp_path / "here").startswith(f"{tmp_path}/here  ")
    assert cat_bundle.json("diff", planned.path, tmp_path / "here")["same"]
    cat_bundle("prune", planned.path, "--plans", "tensorrt")
    line = cat_bundle("push", planned.path, "memory://models/sd3", code=2)
    assert line == (
        "cat-bundle: memory://models/sd3 has another bundle; pass --force to replace it, or give another URL\n"
    )
    cat_bundle("push", planned.path, "memory://models/sd3", "--force")
    line = cat_bundle("pull", "memory://models/sd3", tmp_path / "here", code=2)
    assert "here exists; pass --force" in line
    cat_bundle("pull", "memory://models/sd3", tmp_path / "here", "--force")
    assert cat_bundle.json("diff", planned.path, tmp_path / "here")["same"]


def test_directories_are_places_too(planned: Bundle, tmp_path: Path, cat_bundle: CatBundle) -> None:
    private, public = write_keys(tmp_path)
    cat_bundle("push", planned.path, tmp_path / "there")
    assert "is not signed" in cat_bundle("pull", tmp_path / "there", tmp_path / "here", "--public-key", public, code=2)
    sign_bundle(Bundle.open(tmp_path / "there"), private)
    cat_bundle("pull", tmp_path / "there", tmp_path / "here", "--public-key", public)
    assert cat_bundle.json("diff", planned.path, tmp_path / "here")["same"]
    Bundle.open(tmp_path / "here", PublicKey.read(public))


@pytest.mark.usefixtures("memory")
def test_a_bundle_is_loaded_by_its_url(
    mini_bundle: Path, tmp_path: Path, cat_bundle: CatBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAT_PRUNING_CACHE", str(tmp_path / "cache"))
    url = "memory://models/sd3-mini"
    generate = [url, "a star", "--out", str(tmp_path / "a.png"), "--engine", "onnxruntime"]
    assert generate_cli.main(generate) == 2
    line = cat_bundle.capsys.readouterr().err
    assert line.startswith(f"cat-generate: {url} has no manifest.json: no bundle; push one")
    cat_bundle("push", mini_bundle, url)
    transformer = CatTransformer.from_bundle(url, "onnxruntime")
    assert transformer.engine.name == "onnxruntime"
    (copy,) = (tmp_path / "cache").glob("*/*/*/manifest.json")
    opened: list[Path] = []

    def load(bundle: Bundle, *_: object, **__: object) -> None:
        opened.append(bundle.path)
        raise EngineError("loaded")

    monkeypatch.setattr("cat_pruning.runtime.pipeline.engine_from_bundle", load)
    assert generate_cli.main(generate) == 2
    assert cat_bundle.capsys.readouterr().err == "cat-generate: loaded\n"
    with pytest.raises(EngineError, match="loaded"):
        load_pipeline(url)
    assert opened == [copy.parent] * 2
