from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cat_pruning.errors import OutputError, SettingsError
from cat_pruning.evaluation.candidates import Candidate
from cat_pruning.evaluation.place import RESULTS, RUN, alone
from cat_pruning.evaluation.results import ImageResult, ResultStore, RunSpec, clear, load_results, load_spec
from cat_pruning.settings import PruneSettings

CANDIDATE = Candidate(
    method="cat", steps=28, keep_ratio=0.3, sampled_steps=28, full_steps=8, macs_linear=3, macs_all=4, prompts=2
)
SPEC = RunSpec(
    bundle="sd3-mini",
    bundle_sha256="0" * 64,
    engine="onnxruntime",
    prompts=("a", "b"),
    prompts_source="two.txt",
    seeds=1,
    batch=2,
    sheet=1,
    height=128,
    width=128,
    guidance_scale=4.0,
    metrics=("psnr_db",),
    settings=PruneSettings().to_dict(),
    candidates=(CANDIDATE,),
    machine={"torch": "2"},
)
RESULT = ImageResult(candidate=CANDIDATE.key, prompt=0, seed=0, seconds=1.5, scores={"psnr_db": None})


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "out", SPEC)
    store.append([RESULT])
    again = ResultStore(tmp_path / "out", SPEC)
    assert again.results == [RESULT]
    assert load_spec(tmp_path / "out") == load_spec(tmp_path / "out")
    assert load_spec(tmp_path / "out").to_dict() == SPEC.to_dict()
    assert again.done(CANDIDATE, 0) == {0}
    assert again.done(CANDIDATE, 1) == set()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"guidance_scale": 7.0}, "guidance_scale was 4.0, is 7.0"),
        ({"settings": PruneSettings(full_steps=4).to_dict()}, "full_steps was 8, is 4"),
        ({"prompts": ("a", "c")}, "prompts differ"),
        ({"prompts": ("a",)}, "prompts were 2, are 1"),
        ({"bundle_sha256": "1" * 64}, "bundle_sha256"),
        ({"candidates": (dataclasses.replace(CANDIDATE, full_steps=9),)}, "cat-28-0.3 (full_steps was 8, is 9)"),
        (
            {"guidance_scale": 7.0, "candidates": (dataclasses.replace(CANDIDATE, steps=2),)},
            "other guidance_scale (guid",
        ),
        (
            {"candidates": (dataclasses.replace(CANDIDATE, settings={"policy": "ras"}),)},
            "other cat-28-0.3 (policy was None, is 'ras')",
        ),
    ],
)
def test_other_settings_are_not_resumed(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    ResultStore(tmp_path, SPEC).append([RESULT])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    with pytest.raises(SettingsError, match=r"give another --out, or --force") as caught:
        ResultStore(tmp_path, dataclasses.replace(SPEC, **change))
    assert says in str(caught.value)
    assert len(str(caught.value)) < 500
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}


def test_another_quantized_bundle_is_not_resumed(tmp_path: Path) -> None:
    int8 = dataclasses.replace(CANDIDATE, quantization="int8", quantized_sha256="1" * 64)
    spec = dataclasses.replace(SPEC, candidates=(CANDIDATE, int8))
    ResultStore(tmp_path, spec).append([dataclasses.replace(RESULT, candidate=int8.key, cpu_seconds=0.5)])
    assert ResultStore(tmp_path, spec).done(int8, 0) == {0}
    other = dataclasses.replace(spec, candidates=(CANDIDATE, dataclasses.replace(int8, quantized_sha256="2" * 64)))
    with pytest.raises(SettingsError, match=r"other int8-cat-28-0\.3 \(quantized_sha256 was '1{64}', is '2{64}'\)"):
        ResultStore(tmp_path, other)


def test_it_grows_by_prompts_and_by_candidates(tmp_path: Path) -> None:
    """What was asked for before stays, results too; fewer prompts than before take nothing away."""
    half = dataclasses.replace(CANDIDATE, keep_ratio=0.5, prompts=1)
    more = dataclasses.replace(CANDIDATE, prompts=3)
    spec = dataclasses.replace(SPEC, prompts=("a", "b", "c", "d"))
    ResultStore(tmp_path, spec).append([RESULT])
    for asked, together in (((half,), (CANDIDATE, half)), ((more,), (more, half)), ((CANDIDATE,), (more, half))):
        before = load_spec(tmp_path)
        store = ResultStore(tmp_path, dataclasses.replace(spec, candidates=asked))
        assert store.spec.candidates == together
        assert store.results[0] == RESULT
        assert load_spec(tmp_path) == before  # until there is something new
        assert bool(store.added) == (together != before.candidates)
        store.append([dataclasses.replace(RESULT, prompt=len(store.results))])
        assert load_spec(tmp_path).candidates == together


def files_in(directory: Path) -> dict[str, str]:
    return {path.relative_to(directory).as_posix(): path.read_text() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", [RESULTS, "report.html", "images/holiday.jpg", "tokens/secret.txt", ".lock"])
@pytest.mark.parametrize("record", ["none", "damaged"])
def test_files_of_others_are_named_and_kept(tmp_path: Path, name: str, record: str) -> None:
    """Where run.json is lost too: nothing says that the results are an evaluation's."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    if record == "damaged":
        (tmp_path / RUN).write_text("{}")
    before = files_in(tmp_path)
    for begun in (lambda: ResultStore(tmp_path, SPEC), lambda: clear(tmp_path)):
        with pytest.raises((OutputError, SettingsError), match=rf"{name}|{RUN} is not this version's") as error:
            begun()
        assert "--force" not in str(error.value)
        assert files_in(tmp_path) == before


def test_an_evaluation_is_cleared_of_what_it_lists(tmp_path: Path) -> None:
    """Pictures of the sheet, of its candidates; and a file beside them that is none of its places."""
    store = ResultStore(tmp_path, SPEC)
    store.append([RESULT])
    (tmp_path / "images" / CANDIDATE.key).mkdir()
    for name in ("report.html", "notes.txt", f"images/{CANDIDATE.key}/00000-0.png", f"tokens/{CANDIDATE.key}.png"):
        (tmp_path / name).write_text("")
    foreign = tmp_path / "images" / CANDIDATE.key / "00001-0.png"  # the sheet has one prompt
    foreign.write_text("mine")
    before = files_in(tmp_path)
    with pytest.raises(OutputError, match=f"has images/{CANDIDATE.key}/00001-0.png, not listed"):
        clear(tmp_path)
    assert files_in(tmp_path) == before
    foreign.unlink()
    clear(tmp_path)
    assert [*files_in(tmp_path)] == ["notes.txt"]
    assert ResultStore(tmp_path, SPEC).results == []


def test_it_does_not_grow_over_files_of_others(tmp_path: Path) -> None:
    ResultStore(tmp_path, SPEC).append([RESULT])
    half = dataclasses.replace(CANDIDATE, keep_ratio=0.5)
    picture = tmp_path / "tokens" / f"{half.key}.png"
    picture.write_text("mine")
    before = files_in(tmp_path)
    assert ResultStore(tmp_path, SPEC).results == [RESULT]  # in its way only when that candidate comes
    with pytest.raises(OutputError, match=f"has tokens/{half.key}.png, not listed by an evaluation's run.json"):
        ResultStore(tmp_path, dataclasses.replace(SPEC, candidates=(half,)))
    assert files_in(tmp_path) == before


def test_pictures_are_listed_before_they_are_written(tmp_path: Path) -> None:
    ResultStore(tmp_path, SPEC)
    half = dataclasses.replace(CANDIDATE, keep_ratio=0.5)
    store = ResultStore(tmp_path, dataclasses.replace(SPEC, candidates=(half,)))
    store.list_added()
    assert load_spec(tmp_path).candidates == (CANDIDATE, half)


@pytest.mark.parametrize("change", [{"height": "128"}, {"guidance_scale": None}, {"prompts": [1]}, {"seeds": 1.5}])
def test_fields_of_other_types_are_named(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / RUN).write_text(json.dumps(SPEC.to_dict() | change))
    with pytest.raises(SettingsError, match=rf"is not this version's \({next(iter(change))}.*: Input should be"):
        load_spec(tmp_path)


def test_another_machine_may_go_on(tmp_path: Path) -> None:
    ResultStore(tmp_path, SPEC).append([RESULT])
    assert ResultStore(tmp_path, dataclasses.replace(SPEC, machine={"torch": "3"})).results == [RESULT]


def test_two_evaluations_in_one_directory(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with alone(out), pytest.raises(SettingsError, match="another cat-eval is at work there"), alone(out):
        pass
    with alone(out):
        pass


def test_a_line_cut_off_is_removed(tmp_path: Path) -> None:
    store = ResultStore(tmp_path, SPEC)
    store.append([RESULT])
    with (tmp_path / RESULTS).open("a") as file:
        file.write('{"candidate": "cat-28-0.3", "pro')
    again = ResultStore(tmp_path, SPEC)
    assert again.results == [RESULT]
    again.append([dataclasses.replace(RESULT, prompt=1)])
    assert [result.prompt for result in load_results(tmp_path, SPEC)] == [0, 1]


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    ResultStore(tmp_path, SPEC).append([RESULT])
    fields = dataclasses.asdict(RESULT)
    for line in ('{"candidate": 1}', "[" * 9999, json.dumps(fields | {"prompt": "0"}), json.dumps({**fields, "x": 1})):
        (tmp_path / RESULTS).write_text(line + "\n")
        with pytest.raises(SettingsError, match="line 1 is no result"):
            load_results(tmp_path, SPEC)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"candidate": "cat-28-0.4"}, "candidate 'cat-28-0.4' is not in run.json"),
        ({"prompt": 2}, "prompt 2: expected 0 to 1"),
        ({"prompt": -1}, "prompt -1: expected 0 to 1"),
        ({"seed": 1}, "seed 1: expected 0 to 0"),
        ({"seconds": 0.0}, "seconds: Input should be greater than 0"),
        ({"seconds": math.inf}, "seconds: Input should be a finite number"),
        ({"scores": {}}, "no score of psnr_db, coverage"),
        ({"scores": {"psnr_db": math.nan, "coverage": 0.5}}, "scores.psnr_db: Input should be a finite number"),
        ({"scores": {"psnr_db": None, "coverage": None}}, "the score of coverage is null"),
        (
            {"scores": {"psnr_db": 9.0, "coverage": 0.5, "beauty": 1.0}},
            "scores of beauty, which run.json does not have",
        ),
        ({"candidate": "full-28", "scores": {}}, "no score of coverage"),
    ],
)
def test_a_result_that_is_not_of_the_run_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    """Neither read nor written. The full run alone has no score against itself."""
    full = dataclasses.replace(CANDIDATE, method="full")
    spec = dataclasses.replace(SPEC, metrics=("psnr_db", "coverage"), candidates=(CANDIDATE, full))
    good = dataclasses.replace(RESULT, scores={"psnr_db": None, "coverage": 0.5})
    store = ResultStore(tmp_path, spec)
    store.append([good, dataclasses.replace(good, candidate=full.key, scores={"coverage": 0.5})])
    bad = dataclasses.replace(good, **change)
    with pytest.raises(
        SettingsError, match=f"{bad.candidate}, prompt {bad.prompt}, seed {bad.seed}: {re.escape(says)}"
    ):
        store.append([good, bad])
    assert len(load_results(tmp_path, spec)) == 2
    with (tmp_path / RESULTS).open("a") as file:
        file.write(json.dumps(dataclasses.asdict(bad)) + "\n")
    with pytest.raises(SettingsError, match=rf"results.jsonl, line 3 is no result \({re.escape(says)}"):
        load_results(tmp_path, spec)


def test_results_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / RESULTS).write_bytes(b"\xff\xfe\n")
    with pytest.raises(SettingsError, match=r"results.jsonl cannot be read .*remove it, or give another --out"):
        load_results(tmp_path, SPEC)


def former(directory: Path, spec: RunSpec, results: list[ImageResult]) -> None:
    """A directory as versions before the renaming left it."""
    fields = spec.to_dict() | {"format": 1}
    fields["variants"] = fields.pop("candidates")
    fields["metrics"] = ["scene_score" if name == "coverage" else name for name in fields["metrics"]]
    (directory / RUN).write_text(json.dumps(fields))
    lines = []
    for result in results:
        line = dataclasses.asdict(result)
        line["variant"] = line.pop("candidate")
        line["scores"] = {
            "scene_score" if name == "coverage" else name: value for name, value in line["scores"].items()
        }
        lines.append(json.dumps(line) + "\n")
    (directory / RESULTS).write_text("".join(lines))


def test_a_directory_of_an_earlier_version_is_read_and_grows(tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, metrics=("psnr_db", "coverage"))
    result = dataclasses.replace(RESULT, scores={"psnr_db": 20.0, "coverage": 0.8})
    former(tmp_path, spec, [result])
    assert "scene_score" in (tmp_path / RUN).read_text()
    assert load_spec(tmp_path).to_dict() == spec.to_dict()
    assert load_results(tmp_path, spec) == [result]
    store = ResultStore(tmp_path, spec)
    assert store.done(CANDIDATE, 0) == {0}
    assert not store.added
    more = dataclasses.replace(CANDIDATE, keep_ratio=0.5)
    store = ResultStore(tmp_path, dataclasses.replace(spec, candidates=(more,)))
    new = dataclasses.replace(result, candidate=more.key)
    store.append([new])
    assert load_spec(tmp_path).candidates == (CANDIDATE, more)
    assert "scene_score" not in (tmp_path / RUN).read_text()
    assert load_results(tmp_path, store.spec) == [result, new]


def test_a_lock_that_cannot_be_taken(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(OutputError, match="cannot be locked"), alone(tmp_path):
        pass


def test_another_process_has_the_directory_until_it_ends(tmp_path: Path) -> None:
    """Killed, too: the lock is the system's and not the file."""
    script = (
        "import sys, time; from pathlib import Path; from cat_pruning.evaluation.place import alone\n"
        "with alone(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(SettingsError, match="another cat-eval is at work there"), alone(tmp_path):
            pass
        process.kill()
    with alone(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "{}", '{"format": 9}', "[1]", "[" * 9999])
def test_what_another_version_wrote_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / RUN).write_text(text)
    with pytest.raises(SettingsError, match=r"not this version's"):
        load_spec(tmp_path)


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        ResultStore(tmp_path / "file" / "out", SPEC)


def test_the_spec_is_json(tmp_path: Path) -> None:
    assert json.loads(json.dumps(SPEC.to_dict())) == SPEC.to_dict()
