from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cat_pruning.errors import OutputError, SettingsError
from cat_pruning.evaluation.candidates import FEWER_STEPS, FULL, Candidate
from cat_pruning.evaluation.charts import inline_picture, quality_curves
from cat_pruning.evaluation.place import IMAGES, TOKENS
from cat_pruning.evaluation.report import write_report
from cat_pruning.evaluation.results import ImageResult, ResultStore, RunSpec
from cat_pruning.settings import PruneSettings

PROMPTS = ("a <script>alert('x')</script> ring", "a red circle", "see https://example.org & more", "a blue star")


def candidate(method: str, keep_ratio: float, macs: float, sampled: int = 28, engine: str = "onnxruntime") -> Candidate:
    return Candidate(
        method=method,
        steps=28,
        keep_ratio=keep_ratio,
        sampled_steps=sampled,
        full_steps=8,
        macs_linear=int(macs),
        macs_all=int(macs),
        engine=engine,
        prompts=4,
    )


FULL_RUN = candidate(FULL, 1.0, 2e12)
FEWER = candidate(FEWER_STEPS, 0.3, 1.0e12, sampled=14)
CAT = candidate("cat", 0.3, 1.1e12)
OTHERS = (
    candidate("cat", 0.2, 0.9e12),
    candidate("cat", 0.5, 1.3e12),
    candidate("random", 0.3, 1.1e12),
    candidate("at-edm", 0.3, 1.2e12, engine="torch"),
)
CANDIDATES = (FULL_RUN, FEWER, CAT, *OTHERS)
SPEC = RunSpec(
    bundle="sd3-mini",
    bundle_sha256="0" * 64,
    engine="onnxruntime",
    prompts=PROMPTS,
    prompts_source="four.txt",
    seeds=1,
    batch=4,
    sheet=2,
    height=32,
    width=32,
    guidance_scale=4.0,
    metrics=("psnr_db", "coverage"),
    settings=PruneSettings().to_dict(),
    candidates=CANDIDATES,
    machine={"torch": "2.13"},
)
SCORES = {FULL_RUN.key: (0.9, 0.8, 0.7, 0.6), FEWER.key: (0.8, 0.7, 0.6, 0.55), CAT.key: (0.88, 0.79, 0.68, 0.59)}


def result(of: Candidate, prompt: int, score: float, psnr: float | None = 20.0, seconds: float = 1.0) -> ImageResult:
    scores: dict[str, float | None] = {"coverage": score} | ({} if of.method == FULL else {"psnr_db": psnr})
    return ImageResult(candidate=of.key, prompt=prompt, seed=0, seconds=seconds, scores=scores)


def store(directory: Path, spec: RunSpec = SPEC, only: tuple[Candidate, ...] = CANDIDATES) -> ResultStore:
    made = ResultStore(directory, spec)
    seconds = {FULL_RUN.key: 4.0, FEWER.key: 2.0, CAT.key: 2.5}
    for one in only:
        values = SCORES.get(one.key, (0.5, 0.6, 0.3, 0.4))
        psnrs = (None, 20.0, 22.0, 24.0) if one is CAT else (20.0, 20.5, 21.0, 22.0)
        results = [result(one, k, values[k], psnrs[k], seconds.get(one.key, 3.0)) for k in range(4)]
        for each in results:
            for name in each.scores.keys() - set(spec.metrics):
                del each.scores[name]
        made.append(results)
        folder = directory / IMAGES / one.key
        folder.mkdir()
        for prompt in range(2):
            Image.new("RGB", (32, 32), (prompt * 99, 10, 20)).save(folder / f"{prompt:05d}-0.png")
        if one.method not in (FULL, FEWER_STEPS):
            Image.new("RGB", (64, 32), "orange").save(directory / TOKENS / f"{one.key}.png")
    return made


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("evaluation")
    store(directory)
    return write_report(directory).read_text(encoding="utf-8")


def cells(page: str, method: str, keep: str = "keep 0.3") -> list[str]:
    """The text of a row, its notes in brackets."""
    table = page[page.index('<table class="numbers">') : page.index("</table>")]
    group = next(part for part in table.split("<tbody>")[1:] if (f">{keep}<" in part if keep else "keep" not in part))
    row = next(row for row in group.split("<tr")[1:] if f'"row">{method}<' in row)
    found = re.findall(r"<td[^>]*>(.*?)</td>", row, flags=re.DOTALL)
    return [re.sub(r"\s*<small>(.*?)</small>", r" [\1]", cell).strip() for cell in found]


def test_the_full_runs_row(page: str) -> None:
    # Scores 0.9 … 0.6: standard deviation 0.1291, t(3) = 3.1824, so ± 0.2054.
    assert cells(page, "full", "") == ["2.000 T", "0.250", "1.00", "–", "0.750 ± 0.205", "–", "–", "4"]


def test_a_methods_row(page: str) -> None:
    macs, throughput, speed, psnr, scene, to_full, to_fewer, images = cells(page, "cat")
    assert (macs, throughput, speed, images) == ("1.100 T [55 % of full]", "0.400", "1.60", "4")
    assert psnr == "22.00 ± 4.97 [1 left out]"  # 20, 22, 24: t(2) = 4.3027, times 2 / √3
    assert scene == "0.735 ± 0.201"
    # Differences -0.02, -0.01, -0.02, -0.01: mean -0.015 of 0.75, ± 3.1824 · 0.005774 / 2 = 0.009187, which is 1.225 %.
    assert to_full == "−2.0 [−3.2 … −0.8]"
    # 0.08, 0.09, 0.08, 0.04: mean 0.0725, standard deviation 0.02217, ± 0.0353.
    assert to_fewer in ("+0.073 [+0.037 … +0.108]", "+0.072 [+0.037 … +0.108]")  # a tie, either way


def test_the_rows_are_in_the_papers_order(page: str) -> None:
    rows = re.findall(r'<th scope="row">([^<]*)</th><td', page[: page.index("</table>")])
    assert rows == ["full", "cat", "cat", "14 full steps", "at-edm", "random", "cat"]
    assert re.findall(r">(keep [^<]*)<", page) == ["keep 0.2", "keep 0.3", "keep 0.5"]


def test_engines_are_not_compared(page: str) -> None:
    assert cells(page, "at-edm")[1:3] == ["0.333 [on torch]", "–"]


def test_the_summary_says_what_the_intervals_do(page: str) -> None:
    assert (
        "<li>cat, keep 0.3, 28 steps: coverage 0.735, full 0.750: −2.0 % (95 % CI −3.2 … −0.8), worse; "
        "against 14 full steps: +0.07"
    ) in page
    assert "(95 % CI +0.037 … +0.108), better. 4 prompts.</li>" in page
    assert page.count("<li>cat, keep") == 3


def test_quantized_rows_stand_beside_the_others(tmp_path: Path) -> None:
    """Against the full run that is not quantized, with the processors' time of those that tell it, and in no curve."""
    changes = {"quantization": "int8", "quantized_sha256": "a1b2c3d4e5f6" + "0" * 52}
    full, cat = (dataclasses.replace(each, **changes) for each in (FULL_RUN, CAT))
    spec = dataclasses.replace(SPEC, candidates=(FULL_RUN, FEWER, CAT, OTHERS[2], full, cat))
    made = store(tmp_path, spec, only=(FULL_RUN, FEWER, CAT, OTHERS[2]))
    for one, scores in ((full, (0.9, 0.8, 0.7, 0.56)), (cat, (0.88, 0.79, 0.68, 0.59))):
        images = [result(one, k, score) for k, score in enumerate(scores)]
        made.append(
            dataclasses.replace(each, scores={**each.scores, "psnr_db": 40.0}, cpu_seconds=2.5) for each in images
        )
    page = write_report(tmp_path).read_text(encoding="utf-8")
    rows = re.findall(r'<th scope="row">([^<]*)</th><td', page[: page.index("</table>")])
    assert rows == ["full", "int8 full", "cat", "int8 cat", "14 full steps", "random"]
    assert cells(page, "full", "")[3] == "–"
    assert cells(page, "int8 full", "")[:4] == ["2.000 T [100 % of full]", "1.00", "4.00", "2.5"]
    # Differences 0, 0, 0 and -0.04: mean -0.01 of 0.75, ± 3.1824 · 0.02 / 2 = 0.0318, which is 4.24 %.
    assert cells(page, "int8 full", "")[6:] == ["−1.3 [−5.6 … +2.9]", "–", "4"]
    assert cells(page, "int8 cat")[-3] == cells(page, "cat")[-3] == "−2.0 [−3.2 … −0.8]"
    assert "<li>int8 full, 28 steps: coverage 0.740, full 0.750: −1.3 % (95 % CI −5.6 … +2.9), no difference" in page
    assert "<li>int8 cat, keep 0.3, 28 steps: coverage 0.735, full 0.750: −2.0 % (" in page
    assert "<dt>Quantized</dt><dd>int8 (manifest a1b2c3d4e5f6)</dd>" in page
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 3
    assert not any("int8" in each for each in drawings)


def test_a_schedule_by_name_costs_what_it_does(tmp_path: Path) -> None:
    """So the fewer steps, which cost what the policy does, are nothing to hold it against."""
    tuned = candidate("tuned-9", 0.3, 0.6e12)
    store(tmp_path, dataclasses.replace(SPEC, candidates=(FULL_RUN, FEWER, CAT, tuned)), only=(FULL_RUN, FEWER, tuned))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert cells(page, "tuned (8 full)")[-2:] == ["–", "4"]
    assert "<li>tuned (8 full), 28 steps: coverage 0.450, full 0.750: " in page
    assert "against 14 full steps" not in page


def test_prompts_are_text(page: str) -> None:
    assert "<script" not in page
    assert "a &lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; ring" in page


def test_nothing_is_loaded_from_elsewhere(page: str) -> None:
    without_prompts = page.replace("https://example.org", "")
    assert not re.findall(r"https?:", re.sub(r'xmlns(:\w+)?="[^"]*"', "", without_prompts))
    sources = re.findall(r'\b(?:src|href)="([^"]{0,30})', page)
    assert sources
    assert all(source.startswith(("data:image/", "#")) for source in sources)
    assert not re.search(r"url\((?!#)|@import|<link", page)


def test_every_id_is_unique_and_every_reference_has_one(page: str) -> None:
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    referred = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', page)
    assert referred
    assert {a or b for a, b in referred} <= set(ids)


def test_images_and_token_maps_are_in_it(page: str) -> None:
    sheet = page[page.index('<table class="sheet">') :]
    assert sheet.count("<tr><th scope") == 2
    assert sheet.count("<img") == 2 * 5 + 5  # five candidates at keep 0.3; five policies' maps
    assert sheet.count('class="enlarged"') == 10
    assert "<summary>cat, keep 0.5, 28 steps</summary>" in page


def test_curves_are_in_it(page: str) -> None:
    assert page.count("<svg") == 3  # two metrics, and the paired differences of one
    assert "coverage, less full&#x27;s" in page or "coverage, less full's" in page


def test_it_is_the_same_each_time(tmp_path: Path, page: str) -> None:
    store(tmp_path)
    assert write_report(tmp_path).read_text(encoding="utf-8") == page


def test_an_unfinished_run(tmp_path: Path) -> None:
    made = store(tmp_path, only=(FULL_RUN, FEWER))
    made.append([result(CAT, 0, 0.5)])
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Not finished: 9 of 28 images are there" in page
    assert "None yet of cat-28-0.2, cat-28-0.5, random-28-0.3, at-edm-28-0.3." in page
    assert "one prompt, no interval" in page
    assert "no difference shown" in page
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"<svg.*?</svg>|<style>.*?</style>", "", page, flags=re.DOTALL))
    assert cells(page, "cat")[-1] == "1"
    with pytest.raises(StopIteration):
        cells(page, "random")


@pytest.mark.parametrize("only", [(FULL_RUN,), (CAT,), (FULL_RUN, CAT)])
def test_as_soon_as_there_is_a_result_there_is_a_report(tmp_path: Path, only: tuple[Candidate, ...]) -> None:
    store(tmp_path, only=only)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert ("No pruned images to compare yet." in page) == (CAT not in only)


def test_without_scores_of_the_prompt_it_compares_with_fewer_steps(tmp_path: Path) -> None:
    store(tmp_path, dataclasses.replace(SPEC, metrics=("psnr_db",)))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "cat, keep 0.3, 28 steps: PSNR (dB) 22.00; against 14 full steps: +0.83" in page
    assert "3 prompts.</li>" in page


def test_no_results(tmp_path: Path) -> None:
    ResultStore(tmp_path, SPEC)
    with pytest.raises(SettingsError, match="has no results yet"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_no_evaluation(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="holds no evaluation"):
        write_report(tmp_path)


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    store(tmp_path, only=(FULL_RUN,))
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match="cannot write the report"):
        write_report(tmp_path)
    assert not list(tmp_path.glob(".*.part"))


def test_large_images_are_reduced_and_broken_ones_left_out(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    assert inline_picture(tmp_path / "large.png", "").uri.startswith("data:image/png")
    small = inline_picture(tmp_path / "large.png", "", most=200)
    assert small.uri.startswith("data:image/jpeg")
    assert not small.enlarged
    (tmp_path / "cut.png").write_bytes((tmp_path / "large.png").read_bytes()[:5000])
    assert inline_picture(tmp_path / "cut.png", "").uri == ""
    assert inline_picture(tmp_path / "none.png", "").uri == ""


def test_curves_take_the_prompts_that_all_have() -> None:
    # The full run's second prompt is one that cat has not: its band must not move with it.
    def curve(second: float) -> str | None:
        full = [result(FULL_RUN, 0, 0.5), result(FULL_RUN, 1, second)]
        return quality_curves(CANDIDATES, {FULL_RUN.key: full, CAT.key: [result(CAT, 0, 0.4)]}, "coverage")

    assert curve(0.1) == curve(0.9)
    assert quality_curves(CANDIDATES, {FULL_RUN.key: [result(FULL_RUN, 0, 0.5)]}, "coverage") is None
