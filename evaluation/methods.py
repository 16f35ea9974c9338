"""The methods by name: what each changes of the pruning's settings."""

from __future__ import annotations

from cat_pruning.errors import SettingsError
from cat_pruning.runtime.selection.policies import ras_dense_steps
from cat_pruning.settings import PRESETS, Policy, Preset, PruneSettings, Reuse

AT_EDM = "at-edm"  # an engine of its own: `cat_pruning.evaluation.at_edm`
EXTRAPOLATED = "+extrapolate"  # after a policy's name: with `Reuse.EXTRAPOLATE`
REFRESHED = "+refresh"  # after a policy's name: fewer tokens, more full steps, extrapolated: the preset `refreshed`
FORECAST = "forecast"  # no policy: pruned steps compute nothing: the preset `forecast`
POLICIES = (*Policy, AT_EDM)
METHODS = (Policy.CAT, Policy.CAT + REFRESHED, FORECAST, *POLICIES[1:])  # what is compared where nothing is said


def policy_of(method: str) -> str:
    """A method's name without what comes after it: cat of cat+refresh."""
    return method.split("+")[0]


def check_method(name: str) -> None:
    """Check the name of a method.

    Raises:
        SettingsError: it is none.
    """
    policy = policy_of(name)
    endings = ("",) if policy in (AT_EDM, FORECAST) else ("", EXTRAPOLATED, REFRESHED)
    if policy not in (*POLICIES, FORECAST) or name.removeprefix(policy) not in endings:
        raise SettingsError(
            f"policy {name!r} is not known; known are {', '.join(POLICIES)} and {FORECAST}, "
            f"and all but {AT_EDM} and {FORECAST} with {EXTRAPOLATED} or {REFRESHED} after it"
        )


def settings_of(method: str, keep_ratio: float, steps: int, settings: PruneSettings) -> PruneSettings:
    """The settings of a method: `settings` with its policy and keep ratio; for RAS, its dense steps too.

    AT-EDM chooses in its engine; for it, the policy only says how many. The interval between full steps of
    a refreshed method and of the forecast is `evaluation.plan`'s to choose, by MACs.
    """
    if method == FORECAST:
        return _preset(settings, Preset.FORECAST, keep_ratio=0.0)
    name = policy_of(method)
    policy = Policy.STALE if name == AT_EDM else Policy(name)
    reuse = Reuse.EXTRAPOLATE if method.endswith(EXTRAPOLATED) else Reuse.REPEAT
    if policy is Policy.RAS:
        settings = settings.replace(extra_full_steps=ras_dense_steps(steps, settings.full_steps))
    settings = settings.replace(policy=policy, reuse=reuse, keep_ratio=keep_ratio)
    return _preset(settings, Preset.REFRESHED, keep_ratio / 3) if method.endswith(REFRESHED) else settings


def _preset(settings: PruneSettings, preset: Preset, keep_ratio: float) -> PruneSettings:
    """`settings` with what the preset changes; half of their own full steps come first."""
    first = max(2, settings.full_steps // 2)
    changes = {**PRESETS[preset], "keep_ratio": keep_ratio, "full_steps": first, "extra_full_steps": ()}
    return settings.replace(**changes)
