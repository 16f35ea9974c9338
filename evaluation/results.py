"""An evaluation on disk: the spec of its run, and one line of results for each image.

OUT/run.json        RunSpec: all that the results depend on; a run goes on only under the same, or grows by candidates
OUT/results.jsonl   ImageResult, one a line, appended as they come
OUT/images/{candidate}/{prompt}-{seed}.png        of the first prompts
OUT/tokens/{candidate}.png                        which tokens were computed, of the first prompt
OUT/report.html
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cat_pruning.errors import OutputError, SettingsError
from cat_pruning.evaluation.candidates import Candidate
from cat_pruning.evaluation.former import current_result, current_spec
from cat_pruning.files import write_whole
from cat_pruning.versions import versions_of

RUN, RESULTS, REPORT, IMAGES, TOKENS = "run.json", "results.jsonl", "report.html", "images", "tokens"
FORMAT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """All that the results of an evaluation depend on, as JSON types.

    Attributes:
        bundle: its directory's name. bundle_sha256: `Manifest.digest`, of all but its schedules.
        engine: that computes, but for AT-EDM, which has its own.
        prompts: the texts, in order. prompts_source: where they are from.
        seeds: images of each prompt. batch: prompts at once. sheet: the first prompts, whose images are kept.
        height, width, guidance_scale: of the pipeline's call.
        metrics: names, as in `ImageResult.scores`.
        settings: of the pruning, by name; each method changes some.
        candidates: all that is compared.
        machine: processor, libraries and their versions, when the first images were made; later ones may be another's.
    """

    bundle: str
    bundle_sha256: str
    engine: str
    prompts: tuple[str, ...]
    prompts_source: str
    seeds: int
    batch: int
    sheet: int
    height: int
    width: int
    guidance_scale: float
    metrics: tuple[str, ...]
    settings: dict[str, Any]
    candidates: tuple[Candidate, ...]
    machine: dict[str, str]
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> RunSpec:
        """The inverse of `to_dict`, which reads what earlier versions wrote too.

        Raises:
            TypeError, KeyError: fields that are missing or unknown.
            ValueError: another format.
        """
        fields = current_spec(fields, FORMAT)
        if fields["format"] != FORMAT:
            raise ValueError(f"format {fields['format']}, expected {FORMAT}")
        candidates = tuple(Candidate(**candidate) for candidate in fields["candidates"])
        tuples = {name: tuple(fields[name]) for name in ("prompts", "metrics")}
        return cls(**{**fields, **tuples, "candidates": candidates})


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageResult:
    """One image: its scores by metric. A PSNR of equal images, which is infinite, is None.

    Attributes:
        candidate: `Candidate.key`. prompt: its number. seed: the image's number among those of its prompt.
        seconds: of its batch, divided by the batch's images; text encoders and autoencoder included.
        scores: by metric; metrics against the full run are missing for the full run.
    """

    candidate: str
    prompt: int
    seed: int
    seconds: float
    scores: dict[str, float | None]


class ResultStore:
    """The directory of one evaluation.

    Args:
        directory: made if it is not there.
        spec: of the run. If the directory holds an evaluation that differs only in its candidates, that one grows: its
            own candidates come first, then those that it did not have; a candidate of both is run on the greater
            number of prompts. run.json is written anew with the first new result.

    Attributes:
        spec: of the run and of what the directory held before, together.
        added: the candidates that it grows by, each with its number of prompts.

    Raises:
        SettingsError: it holds the results of other settings, or something else.
        OutputError: it cannot be written.
    """

    def __init__(self, directory: Path, spec: RunSpec) -> None:
        self.directory = directory
        self.added: tuple[str, ...] = ()
        try:
            for folder in (directory, directory / IMAGES, directory / TOKENS):
                folder.mkdir(parents=True, exist_ok=True)
            before = load_spec(directory) if (directory / RUN).exists() else None
            if before is None:
                self.spec = spec
                (directory / RESULTS).write_text("", encoding="utf-8")
                self._save_spec()
            else:
                self.spec = self._grown(before, spec)
                added = [candidate for candidate in self.spec.candidates if candidate not in before.candidates]
                self.added = tuple(f"{candidate.key} ({candidate.prompts} prompts)" for candidate in added)
        except OSError as error:
            raise OutputError(f"{directory} cannot be written ({error.strerror})", "give another --out") from error
        self.results = load_results(directory)

    def _grown(self, before: RunSpec, now: RunSpec) -> RunSpec:
        """The spec that both are parts of; SettingsError if they differ in more than which candidates they have."""
        old, new = before.to_dict(), now.to_dict()
        different = [name for name in new if name not in ("machine", "candidates") and old[name] != new[name]]
        changes = [_change(name, old[name], new[name]) for name in different]
        asked = {candidate.key: candidate for candidate in RunSpec.from_dict(new).candidates}
        candidates = []
        for candidate in before.candidates:
            again = asked.pop(candidate.key, candidate)
            prompts = max(candidate.prompts, again.prompts)
            here = dataclasses.replace(again, prompts=candidate.prompts)
            if not different and here != candidate:  # name one: where the settings differ, most candidates do
                different.append(candidate.key)
                changes.append(_change(candidate.key, dataclasses.asdict(candidate), dataclasses.asdict(here)))
            candidates.append(dataclasses.replace(candidate, prompts=prompts))
        if different:
            raise SettingsError(
                f"{self.directory} holds an evaluation with other {', '.join(different)} ({'; '.join(changes)})",
                "give another --out, or --force to begin anew",
            )
        return dataclasses.replace(before, candidates=(*candidates, *asked.values()))

    def _save_spec(self) -> None:
        write_whole(self.directory / RUN, json.dumps(self.spec.to_dict(), indent=2) + "\n")

    def done(self, candidate: Candidate, seed: int) -> set[int]:
        """The prompts that a candidate has results of."""
        return {result.prompt for result in self.results if (result.candidate, result.seed) == (candidate.key, seed)}

    def append(self, results: Iterable[ImageResult]) -> None:
        """Add results, as whole lines."""
        new = list(results)
        lines = "".join(json.dumps(dataclasses.asdict(result)) + "\n" for result in new)
        try:
            if self.added:
                self._save_spec()
                self.added = ()
            with (self.directory / RESULTS).open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            raise OutputError(f"{self.directory / RESULTS} cannot be written ({error.strerror})") from error
        self.results.extend(new)


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Keep other evaluations out of `directory` meanwhile. The directory is made if it is not there.

    Raises:
        SettingsError: another one is at work in it.
        OutputError: it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{directory} cannot be written ({error.strerror})", "give another --out") from error
    lock = FileLock(directory / ".lock")  # the system lets go of it when the process ends, however it ends
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise SettingsError(
            f"{directory}: another cat-eval is at work there", "wait for it, or give another --out"
        ) from error
    except OSError as error:
        raise OutputError(f"{directory} cannot be locked ({error.strerror})", "give another --out") from error
    try:
        yield
    finally:
        lock.release()


def machine() -> dict[str, str]:
    """The processor and the libraries that compute the results."""
    versions = versions_of(("torch", "diffusers", "onnxruntime"))
    return {
        "processors": str(os.cpu_count()),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **versions,
    }


def load_spec(directory: Path) -> RunSpec:
    """The spec of the run in a directory.

    Raises:
        SettingsError: nothing, or what another version wrote.
    """
    try:
        return RunSpec.from_dict(json.loads((directory / RUN).read_text(encoding="utf-8")))
    except OSError as error:
        raise SettingsError(f"{directory} holds no evaluation ({error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SettingsError(
            f"{directory / RUN} is not this version's ({error})", "give another --out, or --force to begin anew"
        ) from error


def load_results(directory: Path) -> list[ImageResult]:
    """The results of a directory. A last line that an interruption cut off is removed from the file.

    Raises:
        SettingsError: a line in the middle is no result.
    """
    file = directory / RESULTS
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_whole(file, whole)
    results = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            results.append(ImageResult(**current_result(json.loads(line))))
        except (ValueError, TypeError, AttributeError) as error:
            raise SettingsError(
                f"{file}, line {number} is no result ({error})", "remove it or give another --out"
            ) from error
    return results


def _change(name: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        names = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return ", ".join(_change(key, before.get(key), now.get(key)) for key in names)
    if isinstance(before, list):
        return f"{name} were {len(before)}, are {len(now)}" if len(before) != len(now) else f"{name} differ"
    return f"{name} was {before!r}, is {now!r}"
