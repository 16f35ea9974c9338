"""What a server is told: which bundles it serves, how it schedules, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from cat_pruning.errors import SettingsError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """What a server is told.

    Attributes:
        bundles: directories that `cat-export` wrote; a model's name is its directory's.
        engine: see `load_pipeline`.
        public_key: the PEM file of the key that all bundles must be signed with, or None; see `load_pipeline`.
        max_batch: most images of one call; None: 1 on a processor, where a batch saves nothing, and 4 on a GPU.
        max_wait_ms: how long an image waits for others of its batch while nothing else is computed.
        queue: most images that wait; more are refused with 429.
        timeout_s: from a request's arrival to its last image; then it is given up with 504.
        grace_s: after SIGTERM, what is in progress may take so long.
        max_pixels: of an image; None: those of the bundle's largest profile.
        max_steps: of an image.
        max_prompt_chars: of a prompt, and of a negative one.
        prompt_cache_mb: megabytes of what text encoders returned that are kept, for the same prompt again; 0 for none.
        api_key: what `Authorization: Bearer …` must say; None: anyone may ask.

    Raises:
        SettingsError: a value makes no sense, or two bundles have one name.
    """

    bundles: tuple[Path, ...]
    engine: str = "auto"
    public_key: Path | None = None
    max_batch: int | None = None
    max_wait_ms: float = 5.0
    queue: int = 64
    timeout_s: float = 300.0
    grace_s: float = 30.0
    max_pixels: int | None = None
    max_steps: int = 100
    max_prompt_chars: int = 4000
    prompt_cache_mb: int = 256
    api_key: str | None = None

    def __post_init__(self) -> None:
        counts = {"max_batch": self.max_batch, "queue": self.queue, "max_pixels": self.max_pixels}
        counts |= {"max_steps": self.max_steps, "max_prompt_chars": self.max_prompt_chars}
        for name, count in counts.items():
            if count is not None and count < 1:
                raise SettingsError(f"{name}={count}: expected a whole number from 1 on")
        if self.prompt_cache_mb < 0:
            raise SettingsError(f"prompt_cache_mb={self.prompt_cache_mb}: expected a whole number from 0 on")
        for name, seconds in {"max_wait_ms": self.max_wait_ms, "grace_s": self.grace_s}.items():
            if not 0.0 <= seconds < math.inf:
                raise SettingsError(f"{name}={seconds}: expected a number from 0 on")
        if not 0.0 < self.timeout_s < math.inf:
            raise SettingsError(f"timeout_s={self.timeout_s}: expected a number above 0")
        if not self.bundles:
            raise SettingsError("no bundle is given", "name the directory that cat-export wrote")
        if len(set(self.names)) < len(self.names):
            raise SettingsError(
                f"two bundles have one name: {', '.join(self.names)}", "a model's name is its directory's: rename one"
            )
        if self.api_key is not None and not self.api_key.strip():
            raise SettingsError("the API key is empty", "give one, or unset the variable")

    @property
    def names(self) -> tuple[str, ...]:
        """The models' names, in the bundles' order."""
        return tuple(path.absolute().name for path in self.bundles)
