"""An evaluation on disk: what is run, and what came out, one line for each image.

OUT/run.json        RunSpec: all that the results depend on; a run is resumed only under the same, or grows
OUT/results.jsonl   ImageResult, one a line, appended as they come
OUT/images/{variant}/{prompt}-{seed}.png        of the first prompts
OUT/tokens/{variant}.png                        which tokens were computed, of the first prompt
OUT/report.html
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cat_pruning.errors import OutputError, SettingsError
from cat_pruning.evaluation.variants import Variant
from cat_pruning.versions import versions_of

RUN, RESULTS, REPORT, IMAGES, TOKENS = "run.json", "results.jsonl", "report.html", "images", "tokens"
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """All that the results of an evaluation depend on, as JSON types.

    Attributes:
        bundle: its directory's name. bundle_sha256: of its manifest, which has every file's hash.
        engine: what computes; policies that see attention run on torch whatever it is.
        prompts: the texts, in order. prompts_source: where they are from.
        seeds: images of each prompt. batch: prompts at once. sheet: the first prompts, whose images are kept.
        height, width, guidance_scale: of the pipeline's call.
        metrics: names, as in `ImageResult.scores`.
        settings: the pruning's, by name; the policies change some.
        variants: what is compared.
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
    variants: tuple[Variant, ...]
    machine: dict[str, str]
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> RunSpec:
        """The inverse of `to_dict`.

        Raises:
            TypeError, KeyError: fields that are missing or unknown.
        """
        variants = tuple(Variant(**variant) for variant in fields["variants"])
        tuples = {name: tuple(fields[name]) for name in ("prompts", "metrics")}
        return cls(**{**fields, **tuples, "variants": variants})


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageResult:
    """One image: its scores by metric. A PSNR of equal images, which is infinite, is None.

    Attributes:
        variant: `Variant.key`. prompt: its number. seed: the image's number among those of its prompt.
        seconds: of its batch, divided by the batch's images; text encoders and autoencoder included.
        scores: by metric; metrics against the full run are missing for the full run.
    """

    variant: str
    prompt: int
    seed: int
    seconds: float
    scores: dict[str, float | None]


class ResultStore:
    """The directory of one evaluation.

    Args:
        directory: made if it is not there.
        spec: what is run. If the directory holds an evaluation that differs only in what is compared, it grows: its
            variants come first, each on as many prompts as either asks for, then those that it did not have. On disk
            it has grown with the first new result.

    Attributes:
        spec: what is run, that of before included.
        added: what it grows by: variants, each with its number of prompts.

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
                self.added = tuple(
                    f"{each.key} ({each.prompts} prompts)" for each in self.spec.variants if each not in before.variants
                )
        except OSError as error:
            raise OutputError(f"{directory} cannot be written ({error.strerror})", "give another --out") from error
        self.results = load_results(directory)

    def _grown(self, before: RunSpec, now: RunSpec) -> RunSpec:
        """What is run by both; of the same settings but for the variants, whose common ones are the same."""
        old, new = before.to_dict(), now.to_dict()
        different = [name for name in new if name not in ("machine", "variants") and old[name] != new[name]]
        changes = [_change(name, old[name], new[name]) for name in different]
        asked = {variant.key: variant for variant in RunSpec.from_dict(new).variants}
        variants = []
        for variant in before.variants:
            again = asked.pop(variant.key, variant)
            prompts = max(variant.prompts, again.prompts)
            here = dataclasses.replace(again, prompts=variant.prompts)
            if not different and here != variant:  # one is enough, and where the settings differ, most do
                different.append(variant.key)
                changes.append(_change(variant.key, dataclasses.asdict(variant), dataclasses.asdict(here)))
            variants.append(dataclasses.replace(variant, prompts=prompts))
        if different:
            raise SettingsError(
                f"{self.directory} holds an evaluation with other {', '.join(different)} ({'; '.join(changes)})",
                "give another --out, or --force to begin anew",
            )
        return dataclasses.replace(before, variants=(*variants, *asked.values()))

    def _save_spec(self) -> None:
        _replace(self.directory / RUN, json.dumps(self.spec.to_dict(), indent=2) + "\n")

    def done(self, variant: Variant, seed: int) -> set[int]:
        """The prompts that a variant has results of."""
        return {result.prompt for result in self.results if (result.variant, result.seed) == (variant.key, seed)}

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
    """No other evaluation in `directory` meanwhile, which is made if it is not there.

    Raises:
        SettingsError: another one is at work in it.
        OutputError: it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("w", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{directory} cannot be written ({error.strerror})", "give another --out") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of when the process ends, however it ends
        except BlockingIOError as error:
            raise SettingsError(
                f"{directory}: another cat-eval is at work there", "wait for it, or give another --out"
            ) from error
        except OSError as error:
            raise OutputError(f"{directory} cannot be locked ({error.strerror})", "give another --out") from error
        yield


def sha256(file: Path) -> str:
    """The hash of a file's bytes."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def machine() -> dict[str, str]:
    """What the results were computed on and with."""
    versions = versions_of(("torch", "diffusers", "onnxruntime"))
    return {
        "processors": str(os.cpu_count()),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **versions,
    }


def load_spec(directory: Path) -> RunSpec:
    """What was run in a directory.

    Raises:
        SettingsError: nothing, or what another version wrote.
    """
    try:
        return RunSpec.from_dict(json.loads((directory / RUN).read_text(encoding="utf-8")))
    except OSError as error:
        raise SettingsError(f"{directory} holds no evaluation ({error.strerror})") from error
    except (ValueError, TypeError, KeyError) as error:
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
        _replace(file, whole)
    results = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            results.append(ImageResult(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise SettingsError(
                f"{file}, line {number} is no result ({error})", "remove it or give another --out"
            ) from error
    return results


def _replace(file: Path, text: str) -> None:
    part = file.with_name(f".{file.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def _change(name: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        names = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        return ", ".join(_change(key, before.get(key), now.get(key)) for key in names)
    if isinstance(before, list):
        return f"{name} were {len(before)}, are {len(now)}" if len(before) != len(now) else f"{name} differ"
    return f"{name} was {before!r}, is {now!r}"
