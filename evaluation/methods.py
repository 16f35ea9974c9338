"""The methods by name, and what each changes of the pruning's settings.

A method is a way to make an image: a policy alone or with an ending, the forecast, AT-EDM, or fewer full steps by a
better solver (`cat_pruning.evaluation.solvers`). The full run and fewer steps, which they are compared with, are
methods too (`cat_pruning.evaluation.candidates`) and always run.
"""

from __future__ import annotations

from cat_pruning.errors import SettingsError
from cat_pruning.evaluation.candidates import TUNED, is_tuned
from cat_pruning.evaluation.solvers import SOLVERS
from cat_pruning.runtime.selection.policies import ras_dense_steps
from cat_pruning.schedule import Schedule
from cat_pruning.settings import PRESETS, Policy, Preset, PruneSettings

AT_EDM = "at-edm"  # its engine chooses the tokens: `cat_pruning.evaluation.at_edm`
FORECAST = "forecast"  # pruned steps compute no token: the preset `forecast`
REFRESHED = "+refresh"  # ending of a policy: fewer tokens, more full steps, extrapolated, as the preset `refreshed`
MAIN_METHOD = "cat"  # an evaluation's report is about this one, if it is compared
METHODS = (Policy.CAT, Policy.CAT + REFRESHED, FORECAST, *list(Policy)[1:], AT_EDM)  # the default


def policy_of(method: str) -> str:
    """A method's name without its ending: cat of cat+refresh."""
    return method.split("+")[0]


def check_method(name: str) -> None:
    """Check the name of a method.

    Raises:
        SettingsError: it is none.
    """
    without_ending = (*Policy, FORECAST, TUNED, AT_EDM, *SOLVERS)
    if name not in (*without_ending, *(policy + REFRESHED for policy in Policy)) and not is_tuned(name):
        raise SettingsError(
            f"method {name!r} is not known; known are {', '.join(without_ending)}, {TUNED}-N by its full steps, "
            f"and {', '.join(Policy)} with {REFRESHED} after it"
        )


def settings_of(method: str, keep_ratio: float, steps: int, settings: PruneSettings) -> PruneSettings:
    """The settings of a method that prunes: `settings` with policy and keep ratio; for RAS, with its dense steps too.

    AT-EDM's engine chooses the tokens, so the policy that it gets says only how many. `Sweep` sets the interval
    between full steps of a refreshed method and of the forecast, by MACs.
    """
    if method == FORECAST:
        return _preset(settings, Preset.FORECAST, keep_ratio=0.0)
    name = policy_of(method)
    policy = Policy.STALE if name == AT_EDM else Policy(name)
    if policy is Policy.RAS:
        settings = settings.replace(schedule=_ras_schedule(steps, settings.full_steps))
    settings = settings.replace(policy=policy, keep_ratio=keep_ratio)
    return _preset(settings, Preset.REFRESHED, keep_ratio / 3) if method.endswith(REFRESHED) else settings


def _ras_schedule(steps: int, full_steps: int) -> Schedule:
    """The full steps at the start and RAS's dense ones; pruned steps between."""
    full = {*range(min(steps, full_steps)), *ras_dense_steps(steps, full_steps)}
    return Schedule.of(steps, full, pruned=set(range(steps)) - full)


def _preset(settings: PruneSettings, preset: Preset, keep_ratio: float) -> PruneSettings:
    """`settings` with what the preset changes, beginning with half as many full steps as they have."""
    first = max(2, settings.full_steps // 2)
    changes = {**PRESETS[preset], "keep_ratio": keep_ratio, "full_steps": first, "schedule": None}
    return settings.replace(**changes)
