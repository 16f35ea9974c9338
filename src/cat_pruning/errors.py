"""Every error that cat-pruning raises on purpose.

    CatError
    ├── SettingsError     an argument or setting outside its domain (also a ValueError)
    │   └── ScheduleError a schedule that is damaged, or that was made for another model or other timesteps
    ├── ShapeError        a resolution, batch or token count that the model cannot take (also a ValueError)
    ├── CheckpointError   a checkpoint that is missing, gated, unreachable or of no supported family
    ├── BundleError       a bundle that is missing, truncated, edited or of another format version
    ├── EngineError       a target that cannot be built here, or an engine that cannot run here
    ├── OutputError       an output path that exists, cannot be written, or a disk that is full
    ├── ServerError       a server that cannot be reached, or that does not do what it is asked
    └── InstallationError a package of an extra that is missing, or a platform that is none of ours

An error's problem says what came and what was expected, its remedy what to do. The command-line tools print both as
one line and exit with code 2.
"""

from __future__ import annotations


class CatError(Exception):
    """Base of every error that cat-pruning raises on purpose.

    Attributes:
        problem: what came, and what was expected.
        remedy: what to do: a command, or words; empty where the problem says it all.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem, remedy)
        self.problem, self.remedy = problem, remedy

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}" if self.remedy else self.problem


class SettingsError(CatError, ValueError):
    """An argument or setting is outside its domain."""


class ScheduleError(SettingsError):
    """A schedule is damaged, or was made for another model or other timesteps."""


class ShapeError(CatError, ValueError):
    """A resolution, batch or token count does not fit the model."""


class CheckpointError(CatError):
    """A checkpoint is missing, gated, unreachable or of no supported family."""


class BundleError(CatError):
    """A bundle is missing, truncated, edited or of another format version."""


class EngineError(CatError):
    """A target cannot be built here, or an engine cannot run here."""


class OutputError(CatError):
    """An output path exists, cannot be written, or its disk is full."""


class ServerError(CatError):
    """A server cannot be reached, or does not do what it is asked."""


class InstallationError(CatError):
    """A package that an extra installs is missing, or the platform is not supported."""
