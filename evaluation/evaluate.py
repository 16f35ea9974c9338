"""The run of an evaluation: every candidate makes images of the same prompts and seeds, which are scored at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cat_pruning.errors import OutputError
from cat_pruning.evaluation.candidates import Candidate
from cat_pruning.evaluation.pool import Pool
from cat_pruning.evaluation.results import ResultStore
from cat_pruning.evaluation.worker import Batch, Evaluator, Scored, make_images
from cat_pruning.files import write_whole
from cat_pruning.models.prompts import Prompt
from cat_pruning.tools.generate import GenerateConfig

Advance = Callable[[Candidate, int], None]  # called with a candidate and how many more of its images are done


def evaluate(store: ResultStore, prompts: list[Prompt], pool: Pool[Evaluator], advance: Advance) -> None:
    """Make and score the images that `store` has no results of yet, a batch of prompts and all its candidates a job.

    Raises:
        OutputError: the directory cannot be written.
        CatError: as `Pool.run`.
    """

    def keep(number: int, scored: Scored) -> None:
        _keep_pictures(store, scored.pictures)  # first: an image that has results is never made again
        store.append(scored.results)
        advance(scored.candidate, len(scored.results))

    spec = store.spec
    done = {(each.key, seed): store.done(each, seed) for each in spec.candidates for seed in range(spec.seeds)}
    for candidate in spec.candidates:
        advance(candidate, sum(len(done[candidate.key, seed]) for seed in range(spec.seeds)))
    pool.run(make_images, [*_batches(store, prompts, done)], keep)


def _batches(store: ResultStore, prompts: list[Prompt], done: dict[tuple[str, int], set[int]]) -> Iterator[Batch]:
    """The batches of which something is missing."""
    spec = store.spec
    for seed in range(spec.seeds):
        for start in range(0, len(prompts), spec.batch):
            some = tuple(prompts[start : start + spec.batch])
            numbers = range(start, start + len(some))
            due = {
                each.key: frozenset(n for n in numbers if n < each.prompts and n not in done[each.key, seed])
                for each in spec.candidates
            }
            if not any(due.values()):
                continue
            config = GenerateConfig(
                prompts=tuple(prompt.text for prompt in some),
                height=spec.height,
                width=spec.width,
                steps=0,  # each candidate has its own
                guidance_scale=spec.guidance_scale,
                seed=seed * len(prompts) + start,
            )
            yield Batch(
                config=config,
                prompts=some,
                numbers=numbers,
                seed=seed,
                candidates=_in_turn(spec.candidates, due),
                due=due,
                sheet=spec.sheet,
            )


def _in_turn(candidates: tuple[Candidate, ...], due: dict[str, frozenset[int]]) -> tuple[Candidate, ...]:
    """The candidates that are due, by schedule, after the full run that they are scored against."""
    turn: list[Candidate] = []
    for steps in dict.fromkeys(candidate.steps for candidate in candidates):
        of_schedule = sorted(
            (each for each in candidates if each.steps == steps), key=lambda each: not each.is_reference
        )
        compared = any(due[each.key] for each in of_schedule if not each.is_reference)
        turn += [each for each in of_schedule if due[each.key] or (each.is_reference and compared)]
    return tuple(turn)


def _keep_pictures(store: ResultStore, pictures: dict[str, bytes]) -> None:
    """Write pictures, where the directory's record lists them."""
    if not pictures:
        return
    try:
        store.list_added()
        for name, content in pictures.items():
            place = store.directory / name
            place.parent.mkdir(parents=True, exist_ok=True)
            write_whole(place, content)
    except OSError as error:
        raise OutputError(f"{store.directory} cannot be written ({error.strerror or error})", "make room") from error
