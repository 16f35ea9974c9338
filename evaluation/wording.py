"""What a report says in words and signs: numbers with their sign, intervals, and a sentence for each comparison."""

from __future__ import annotations

from cat_pruning.evaluation.candidates import FEWER_STEPS, FULL
from cat_pruning.evaluation.intervals import Interval
from cat_pruning.evaluation.measures import measure_of
from cat_pruning.evaluation.methods import FORECAST, MAIN_METHOD, policy_of
from cat_pruning.evaluation.outcome import Outcome
from cat_pruning.evaluation.paired import paired_scores, score_interval


def summary(found: Outcome) -> list[str]:
    """A sentence for each main method, ratio, schedule and headline metric that has results."""
    sentences = [
        _sentence(found, metric, method, steps, ratio)
        for metric in found.headline
        for steps in found.steps
        for ratio in found.ratios(steps)
        for method in _main_methods(found)
    ]
    return [sentence for sentence in sentences if sentence]


def _sentence(found: Outcome, metric: str, method: str, steps: int, ratio: float) -> str:
    """A method against the full run and fewer steps; empty where there is nothing to say."""
    candidate = found.find(method, steps, ratio)
    own = score_interval(found.of(candidate), metric)
    if candidate is None or own is None:
        return ""
    measure = measure_of(metric)
    against_full = paired_scores(found.of(candidate), found.of(found.find(FULL, steps)), metric)
    fewer = found.find(FEWER_STEPS, steps, ratio)
    against_fewer = paired_scores(found.of(candidate), found.of(fewer), metric)
    said = f"{candidate.title}, {steps} steps: {measure.title} "
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
    """The methods of the policy that the evaluation is about, and the forecast."""
    methods = [candidate.method for candidate in found.candidates]
    compared = [method for method in dict.fromkeys(methods) if method not in (FULL, FEWER_STEPS)]
    main = MAIN_METHOD if MAIN_METHOD in compared else next(iter(compared), "")
    return [method for method in compared if policy_of(method) in (policy_of(main), FORECAST)]


def signed(value: float, digits: int) -> str:
    """A number with its sign, a true minus; zero has none."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def limits(interval: Interval, digits: int, word: str = "95 % CI ") -> str:
    """An interval's ends, after `word`; of one prompt, that it has none."""
    if interval.prompts < 2:
        return "one prompt, no interval"
    return f"{word}{signed(interval.low, digits)} … {signed(interval.high, digits)}"
