"""What a report says in words and signs: numbers with their sign, intervals, and a sentence for each comparison."""

from __future__ import annotations

from cat_pruning.evaluation.candidates import FEWER_STEPS, FULL, Candidate, is_tuned
from cat_pruning.evaluation.intervals import Interval
from cat_pruning.evaluation.measures import measure_of
from cat_pruning.evaluation.methods import FORECAST, MAIN_METHOD, policy_of
from cat_pruning.evaluation.outcome import Outcome
from cat_pruning.evaluation.paired import paired_scores, score_interval


def summary(found: Outcome) -> list[str]:
    """A sentence for each main candidate and headline metric that has results."""
    sentences = [_sentence(found, metric, each) for metric in found.headline for each in _main_candidates(found)]
    return [sentence for sentence in sentences if sentence]


def _main_candidates(found: Outcome) -> list[Candidate]:
    """By schedule: quantized full runs, then the main methods by ratio, each followed by itself, quantized."""
    methods, main = _main_methods(found), []
    for steps in found.steps:
        main += [candidate for candidate in found.full_runs(steps) if not candidate.is_reference]
        for ratio in found.ratios(steps):
            main += [candidate for candidate in found.at(steps, ratio) if candidate.method in methods]
    return main


def _sentence(found: Outcome, metric: str, candidate: Candidate) -> str:
    """A candidate against the full run and fewer steps; empty where there is nothing to say."""
    own = score_interval(found.of(candidate), metric)
    if own is None:
        return ""
    measure, steps = measure_of(metric), candidate.steps
    against_full = paired_scores(found.of(candidate), found.of(found.find(FULL, steps)), metric)
    fewer = found.fewer_steps(candidate)
    against_fewer = paired_scores(found.of(candidate), found.of(fewer), metric)
    said = candidate.title if candidate.method == FULL else f"{candidate.title}, {steps} steps"
    said += f": {measure.title} "
    if against_full is None:
        said += f"{own.mean:.{measure.digits}f}"
    else:
        means = [f"{mean:.{measure.digits}f}" for mean in (against_full.mean_a, against_full.mean_b)]
        percent = against_full.percent
        change = f"{signed(percent.mean, 1)} %" if percent else signed(against_full.difference.mean, measure.digits)
        extent = limits(percent, 1) if percent else limits(against_full.difference, measure.digits)
        said += f"{means[0]}, full {means[1]}: {change} ({extent}), {measure.verdict(against_full.difference)}"
    if fewer is not None and against_fewer is not None:
        difference = against_fewer.difference
        said += f"; against {fewer.title}: {signed(difference.mean, measure.digits)}"
        said += f" ({limits(difference, measure.digits)}), {measure.verdict(difference)}"
    compared = next((one.difference.prompts for one in (against_full, against_fewer) if one), own.prompts)
    return f"{said}. {compared} prompt{'s' * (compared != 1)}."


def _main_methods(found: Outcome) -> list[str]:
    """The methods of the policy that the evaluation is about, the forecast, and tuned schedules."""
    methods = [candidate.method for candidate in found.candidates]
    compared = [method for method in dict.fromkeys(methods) if method not in (FULL, FEWER_STEPS)]
    main = MAIN_METHOD if MAIN_METHOD in compared else next(iter(compared), "")
    return [each for each in compared if policy_of(each) in (policy_of(main), FORECAST) or is_tuned(each)]


def signed(value: float, digits: int) -> str:
    """A number with its sign, a true minus; zero has none."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def limits(interval: Interval, digits: int, word: str = "95 % CI ") -> str:
    """An interval's ends, after `word`; of one prompt, that it has none."""
    if interval.prompts < 2:
        return "one prompt, no interval"
    return f"{word}{signed(interval.low, digits)} … {signed(interval.high, digits)}"
