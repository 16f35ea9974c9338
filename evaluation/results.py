"""An evaluation on disk: the spec of its run, and one line of results for each image; its files are in `place`."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import Field

from cat_pruning.errors import OutputError, SettingsError
from cat_pruning.evaluation.candidates import Candidate
from cat_pruning.evaluation.former import current_result, current_spec
from cat_pruning.evaluation.measures import measure_of
from cat_pruning.evaluation.place import (
    IMAGES,
    PLACES,
    REMEDY,
    REPORT,
    RESULTS,
    RUN,
    TOKENS,
    check_listed,
    check_writable_place,
    picture_place,
    token_map_place,
)
from cat_pruning.files import parse_json, read_json, read_text, write_whole
from cat_pruning.ours import check_files, remove_ours
from cat_pruning.versions import versions_of

FORMAT = 3
_MAY_BE_NONE = "psnr_db"  # of equal images
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """All that the results of an evaluation depend on, as JSON types.

    Attributes:
        bundle: its directory's name. bundle_sha256: `Manifest.digest`, of all but its schedules and plans.
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

    def files(self) -> set[str]:
        """The files of the evaluation, relative to its directory: what may be deleted and written over."""
        keys = [candidate.key for candidate in self.candidates]
        sheet = range(min(self.sheet, len(self.prompts)))
        pictures = {picture_place(key, prompt) for key in keys for prompt in sheet}
        return {RUN, RESULTS, REPORT, *pictures, *map(token_map_place, keys)}

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
        spec = cls(**{**fields, **tuples, "candidates": candidates})
        return _checked(_SPEC, dataclasses.asdict(spec))


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageResult:
    """One image: its scores by metric. A PSNR of equal images, which is infinite, is None.

    Attributes:
        candidate: `Candidate.key`. prompt: its number. seed: the image's number among those of its prompt.
        seconds: of its batch, divided by the batch's images; text encoders and autoencoder included.
        cpu_seconds: of the process's processors meanwhile, likewise; None in what earlier versions wrote.
        scores: by metric; metrics against the full run are missing for the full run.
    """

    candidate: str
    prompt: int
    seed: int
    seconds: Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
    scores: dict[str, Annotated[float, Field(allow_inf_nan=False)] | None]
    cpu_seconds: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] | None = None


_SPEC, _RESULT = pydantic.TypeAdapter(RunSpec), pydantic.TypeAdapter(ImageResult)


class ResultStore:
    """The directory of one evaluation.

    Args:
        directory: made if it is not there.
        spec: of the run. If the directory holds an evaluation that differs only in its candidates, that one grows: its
            own candidates come first, then those that it did not have; a candidate of both is run on the greater
            number of prompts. run.json is written anew before the first new picture or result.

    Attributes:
        spec: of the run and of what the directory held before, together.
        added: the candidates that it grows by, each with its number of prompts.

    Raises:
        SettingsError: it holds the results of other settings, or a run.json of another version.
        OutputError: it cannot be written, or holds files that no evaluation lists where its own would be.
    """

    def __init__(self, directory: Path, spec: RunSpec) -> None:
        self.directory = directory
        self.added: tuple[str, ...] = ()
        before = existing_spec(directory)
        self.spec = spec if before is None else self._grown(before, spec)
        if before is not None:
            added = [candidate for candidate in self.spec.candidates if candidate not in before.candidates]
            self.added = tuple(f"{candidate.key} ({candidate.prompts} prompts)" for candidate in added)
            check_listed(directory, before.files(), among=self.spec.files())
        try:
            for folder in (directory, directory / IMAGES, directory / TOKENS):
                folder.mkdir(parents=True, exist_ok=True)
            if before is None:
                self._save_spec()
        except OSError as error:
            raise OutputError(f"{directory} cannot be written ({error.strerror})", REMEDY) from error
        self.results = load_results(directory, self.spec)

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

    def list_added(self) -> None:
        """Write down what the evaluation grows by: a file that run.json does not list would be somebody's.

        Raises:
            OSError: it cannot be written.
        """
        if self.added:
            self._save_spec()
            self.added = ()

    def append(self, results: Iterable[ImageResult]) -> None:
        """Add results, as whole lines.

        Raises:
            SettingsError: one is not of the run, or not finite; nothing is written.
            OutputError: the file cannot be written.
        """
        new = list(results)
        for result in new:
            try:
                _of_run(dataclasses.asdict(result), self.spec)
            except ValueError as error:
                raise SettingsError(
                    f"{result.candidate}, prompt {result.prompt}, seed {result.seed}: {error}"
                ) from error
        lines = "".join(json.dumps(dataclasses.asdict(result)) + "\n" for result in new)
        try:
            self.list_added()
            with (self.directory / RESULTS).open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            raise OutputError(f"{self.directory / RESULTS} cannot be written ({error.strerror})") from error
        self.results.extend(new)


def existing_spec(directory: Path, *, force: bool = False) -> RunSpec | None:
    """The spec of the evaluation in a directory, which need not exist; None where there is none.

    Args:
        directory: of the evaluation.
        force: whether what is there is to be deleted.

    Raises:
        SettingsError: there is a run.json of another version.
        OutputError: it cannot be written, or has files that no evaluation lists where an evaluation's would be.
    """
    check_writable_place(directory)
    before = load_spec(directory) if (directory / RUN).exists() else None
    if before is None or force:
        check_listed(directory, before.files() if before else set())
    check_files(directory, before.files() if before else {RUN, RESULTS, REPORT}, REMEDY)
    return before


def clear(directory: Path) -> None:
    """Delete the evaluation in a directory, and nothing else.

    Raises:
        SettingsError, OutputError: as `existing_spec`; nothing was deleted.
    """
    spec = existing_spec(directory, force=True)
    if spec is None:
        return
    try:
        remove_ours(directory, spec.files(), PLACES, RUN)
    except OSError as error:
        raise OutputError(f"{directory} cannot be cleared ({error.strerror or error})", REMEDY) from error


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
        return RunSpec.from_dict(read_json(directory / RUN))
    except OSError as error:
        raise SettingsError(f"{directory} holds no evaluation ({RUN}: {error.strerror})") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SettingsError(f"{directory / RUN} is not this version's ({error})", REMEDY) from error


def load_results(directory: Path, spec: RunSpec) -> list[ImageResult]:
    """The results of a directory. A last line that an interruption cut off is removed from the file.

    Args:
        directory: of the evaluation.
        spec: of its run. Of two lines of one image both are there; a report reads the last.

    Raises:
        SettingsError: the file is no text, or a line in the middle is no result of the run.
    """
    file = directory / RESULTS
    try:
        text = read_text(file) if file.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_whole(file, whole)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"{file} cannot be read ({reason})", f"remove it, or {REMEDY}") from error
    results = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            results.append(_of_run(dataclasses.asdict(ImageResult(**current_result(parse_json(line)))), spec))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise SettingsError(
                f"{file}, line {number} is no result ({error})", "remove it or give another --out"
            ) from error
    return results


def _of_run(fields: dict[str, Any], spec: RunSpec) -> ImageResult:
    """The result of these fields; ValueError where it is none of the run's."""
    result = _checked(_RESULT, fields)
    candidate = next((each for each in spec.candidates if each.key == result.candidate), None)
    if candidate is None:
        raise ValueError(f"candidate {result.candidate!r} is not in {RUN}")
    for name, number, count in (
        ("prompt", result.prompt, len(spec.prompts)),
        ("seed", result.seed, spec.seeds),
    ):
        if not 0 <= number < count:
            raise ValueError(f"{name} {number}: expected 0 to {count - 1}")
    if strange := sorted(result.scores.keys() - set(spec.metrics)):
        raise ValueError(f"scores of {', '.join(strange)}, which {RUN} does not have")
    needed = [name for name in spec.metrics if not candidate.is_reference or measure_of(name).of_prompt]
    if missing := [name for name in needed if name not in result.scores]:
        raise ValueError(f"no score of {', '.join(missing)}")
    if null := [name for name, score in result.scores.items() if score is None and name != _MAY_BE_NONE]:
        raise ValueError(f"the score of {', '.join(null)} is null")
    return result


def _checked(adapter: pydantic.TypeAdapter[_T], fields: dict[str, Any]) -> _T:
    """What the fields make; ValueError where one is of another type."""
    try:
        return adapter.validate_json(json.dumps(fields), strict=True)
    except pydantic.ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None


def _change(name: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        names = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return ", ".join(_change(key, before.get(key), now.get(key)) for key in names)
    if isinstance(before, list) and isinstance(now, list):
        return f"{name} were {len(before)}, are {len(now)}" if len(before) != len(now) else f"{name} differ"
    return f"{name} was {before!r}, is {now!r}"
