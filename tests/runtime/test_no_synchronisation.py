"""No step of an image stops a GPU or copies to it or from it, as far as that shows without one.

The whole `CatTransformer` runs on a device that has no values (`deaf_device`), with timesteps on the host; that they
are read once per image from a GPU is for `test_timesteps`. Only the beginning of an image may copy. What is captured
into a CUDA graph may do no more than this, so the test holds captured steps as well. The real thing: `tests/gpu`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from deaf_device import DEAF, HostTraffic, deaf

from cat_pruning.engines.timestep_states import TimestepStates
from cat_pruning.families import family_of
from cat_pruning.families.interception import StepModule
from cat_pruning.runtime.selection import selection
from cat_pruning.runtime.transformer import CatTransformer
from cat_pruning.settings import Policy, Pooling, PruneSettings, Reuse
from cat_pruning.step_io import LATENTS, SYMBOLIC, TIMESTEP

GRID = (8, 6)
SETTINGS = PruneSettings(full_steps=2, num_clusters=5, refresh_every=5)
KINDS = ["sd3", "sd3.5", "pixart", "pixart-alpha", "flux-dev", "flux-schnell"]
HOST_READS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "truth": lambda x: bool((x > 0).all()),
    "list": lambda x: x.tolist(),
    "host copy": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "equal": lambda x: torch.equal(x, x),
    "device copy": lambda x: torch.ones(3).to(x),
    "written from the host": lambda x: x.copy_(torch.ones(())),
    "made from a list": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "indexed by a list": lambda x: x[[0, 0]],
    "written at a list": lambda x: x.__setitem__((slice(None), [0, 1]), 1.0),
    "indexed by the host": lambda x: x[torch.zeros(1, dtype=torch.int64)],
    "added to the host": lambda x: x + torch.ones(x.shape),
}


@pytest.fixture(autouse=True)
def _deaf_tensors_have_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for a GPU here, and whoever passes a tensor of it is refused elsewhere."""
    monkeypatch.setattr("cat_pruning.finite._VALUELESS", frozenset())


@pytest.mark.parametrize("read", HOST_READS)
def test_the_double_hears_everything(read: str) -> None:
    memory = torch.empty(2, 3, device=DEAF)
    with deaf(), pytest.raises((RuntimeError, NotImplementedError)):
        HOST_READS[read](memory)


def test_the_double_lets_a_kernel_have_numbers() -> None:
    with deaf():
        memory = torch.zeros(2, 3, device=DEAF)
        assert (memory * torch.tensor(2.0) + 1.0).fill_(3.0).device == DEAF
        assert torch.tensor([1.0]).device.type == "cpu"


class Loop:
    """The calls that a pipeline makes for one image, on the deaf device."""

    def __init__(self, transformer: Any, settings: PruneSettings) -> None:
        self.family = family_of(transformer)
        self.transformer = CatTransformer.from_model(transformer.to(DEAF), settings, cuda_graphs=False)
        dims = self.family.dims(GRID, batch=2, text_length=7, num_kept=0)
        shapes = self.family.input_shapes(dims)
        names = [name for name in self.family.argument_names() if name in shapes]
        self.arguments = {name: torch.empty(shapes[name], device=DEAF) for name in names}
        if self.family.name == "flux":  # whose grid is read on the host once per image
            places = torch.cartesian_prod(*(torch.arange(side) for side in GRID))
            self.arguments["img_ids"] = torch.cat([torch.zeros(len(places), 1), places], dim=1)
            self.arguments["txt_ids"] = torch.zeros(7, 3)
        self.latents = torch.empty(shapes["hidden_states"], device=DEAF)
        self.schedule = torch.linspace(1000, 1, 8) * self.family.max_timestep / 1000

    def step(self, index: int) -> torch.Tensor:
        own: dict[str, Any] = dict(self.arguments)
        sizes = {name: own.pop(name) for name in ("resolution", "aspect_ratio") if name in own}
        nested = {"added_cond_kwargs": sizes} if sizes else {}
        timestep = self.schedule[index].expand(2)
        noise: torch.Tensor = self.transformer(self.latents, timestep=timestep, **own, **nested, return_dict=False)[0]
        return noise

    @property
    def kind(self) -> str:
        record = self.transformer.last_step
        assert record is not None
        return record.kind.value


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "pooling"), [*((kind, Pooling.MAX) for kind in KINDS), ("sd3", Pooling.MEAN)]
)  # the selection's, whatever the family
def test_a_loop_leaves_the_host_alone(kind: str, pooling: Pooling, make_tiny: Callable[..., Any]) -> None:
    """Full steps, the clustering of the first pruned one, later ones, a full one between, and the next image's."""
    loop = Loop(make_tiny(kind), SETTINGS.replace(pooling=pooling))
    kinds = []
    for steps in (6, 4):
        loop.step(0)
        with deaf():
            for index in range(1, steps):
                noise = loop.step(index)
                kinds.append(loop.kind)
    assert kinds == ["full", "pruned", "pruned", "full", "pruned", "full", "pruned", "pruned"]
    assert noise.device == DEAF


@pytest.mark.long
@pytest.mark.parametrize("policy", Policy)
def test_no_policy_asks_the_host(policy: Policy, make_tiny: Callable[..., Any]) -> None:
    """The families' own part is in every loop of the test above."""
    loop = Loop(make_tiny("sd3", num_layers=1), SETTINGS.replace(policy=policy, reuse=Reuse.EXTRAPOLATE))
    for steps in (6, 4):
        loop.step(0)
        with deaf():
            for index in range(1, steps):
                loop.step(index)


@pytest.mark.parametrize("read", ["item", "mask", "device copy", "made from a list", "indexed by a list"])
@pytest.mark.parametrize("place", ["selection", "step"])
def test_it_can_fail(place: str, read: str, make_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(make_tiny("sd3"), SETTINGS)
    module, name = {"selection": (selection, "next_selection"), "step": (StepModule, "forward")}[place]
    original = getattr(module, name)

    def reads(*arguments: Any) -> Any:
        HOST_READS[read](loop.latents)
        return original(*arguments)

    for index in range(3):
        loop.step(index)
    monkeypatch.setattr(module, name, reads)
    with deaf(), pytest.raises((HostTraffic, RuntimeError, NotImplementedError)):
        loop.step(3)


def test_an_image_begins_with_one_copy_of_each_input(make_tiny: Callable[..., Any]) -> None:
    """So the test above leaves out what has to be left out: SD3's gates come from the host."""
    loop = Loop(make_tiny("sd3"), SETTINGS)
    with deaf(), pytest.raises(HostTraffic):
        loop.step(0)


@pytest.mark.parametrize("reads", [{"pooled": (SYMBOLIC.batch, 5)}, {}])
def test_the_timesteps_of_a_long_schedule_are_made_on_the_device(reads: dict[str, Any]) -> None:
    """What depends on them is computed 64 steps at once, so the 65th comes in the middle of the loop.

    PixArt-Σ's graph reads nothing else.
    """
    rows: list[torch.Tensor] = []

    def run(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        rows.append(inputs[TIMESTEP])
        return {"state": inputs[TIMESTEP]}

    timesteps = [float(1000 - step) for step in range(100)]
    shape = (SYMBOLIC.batch,)
    for device in (DEAF, torch.device("cpu")):
        inputs = {"pooled": torch.empty(2, 5, device=device), LATENTS: torch.empty(2, 3, device=device)}
        states = TimestepStates(run, {TIMESTEP: shape, **reads}, {"state": shape}, inputs, timesteps)
        with deaf():
            assert [states.at(timestep)["state"].device for timestep in timesteps] == [device] * 100
    assert [each.shape[0] for each in rows] == [128, 72] * 2
    assert torch.cat(rows[2:]).tolist() == [timestep for timestep in timesteps for _ in range(2)]
