"""The methods by name: what each changes of the pruning's settings."""

from __future__ import annotations

from cat_pruning.errors import SettingsError
from cat_pruning.runtime.policies import ras_dense_steps
from cat_pruning.settings import Policy, PruneSettings, Reuse

AT_EDM = "at-edm"  # an engine of its own: `cat_pruning.evaluation.at_edm`
EXTRAPOLATED = "+extrapolate"  # after a policy's name: with `Reuse.EXTRAPOLATE`
METHODS = (*Policy, AT_EDM)


def check_method(name: str) -> None:
    """Check the name of a method.

    Raises:
        SettingsError: it is none.
    """
    if name.removesuffix(EXTRAPOLATED) not in METHODS or name == AT_EDM + EXTRAPOLATED:
        raise SettingsError(
            f"policy {name!r} is not known; known are {', '.join(METHODS)}, "
            f"and all but {AT_EDM} with {EXTRAPOLATED} after it"
        )


def settings_of(method: str, keep_ratio: float, steps: int, settings: PruneSettings) -> PruneSettings:
    """The settings of a method: `settings` with its policy and keep ratio; for RAS, its dense steps too.

    AT-EDM chooses in its engine; for it, the policy only says how many.
    """
    name = method.removesuffix(EXTRAPOLATED)
    policy = Policy.STALE if name == AT_EDM else Policy(name)
    reuse = Reuse.EXTRAPOLATE if method.endswith(EXTRAPOLATED) else Reuse.REPEAT
    if policy is Policy.RAS:
        settings = settings.replace(extra_full_steps=ras_dense_steps(steps, settings.full_steps))
    return settings.replace(policy=policy, reuse=reuse, keep_ratio=keep_ratio)
