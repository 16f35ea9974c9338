"""The stand-in for a transformer that no family knows: what it refuses, and what else of diffusers works on it."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import FirstBlockCacheConfig
from peft import LoraConfig, get_peft_model_state_dict
from tiny_pipelines import PIPELINES, randn
from torch import Tensor, nn

from cat_pruning import CatTransformer, PruneSettings, Schedule
from cat_pruning.errors import CheckpointError, ScheduleError, SettingsError
from cat_pruning.runtime.whole import WholeTransformer
from cat_pruning.schedule import MadeFor, config_sha256

WAN = PIPELINES["wan"]
FORECAST = PruneSettings.preset("forecast", full_steps=2)
SCHEDULE = Schedule.of(3, [0, 1], {2: {0: -1.0, 1: 2.0}})
LORA = LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)


def arguments(step: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        "hidden_states": randn(1, 4, 1, 4, 4, seed=step).to(dtype),
        "timestep": torch.tensor([900.0 - 100 * step]),
        "encoder_hidden_states": randn(1, 6, 16, seed=7).to(dtype),
    }


def outputs_of(transformer: nn.Module, steps: int = 3) -> list[Tensor]:
    text = arguments()["encoder_hidden_states"].to(transformer.dtype)
    with torch.no_grad():
        return [
            transformer(**arguments(step, text.dtype) | {"encoder_hidden_states": text}).sample for step in range(steps)
        ]


def whole(module: nn.Module, settings: PruneSettings | None = FORECAST, **options: Any) -> WholeTransformer:
    stand_in = CatTransformer.from_model(module, settings, **options)
    assert isinstance(stand_in, WholeTransformer)
    return stand_in


def made_for(transformer: Any, **changes: Any) -> MadeFor:
    fields = {
        "transformer_class": type(transformer).__name__,
        "config_sha256": config_sha256(transformer.config),
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "guidance_scale": 3.0,
        "height": 32,
        "width": 32,
        "prompts": 8,
    }
    return MadeFor(**fields | changes)


class TestRefusals:
    @pytest.mark.parametrize(
        "settings",
        [
            None,
            PruneSettings.preset("refreshed"),
            PruneSettings.tuned(Schedule.of(3, [0, 1], pruned=[2])),
        ],
        ids=["default", "refreshed", "table"],
    )
    def test_settings_that_prune(self, settings: PruneSettings | None) -> None:
        with pytest.raises(SettingsError, match="WanTransformer3DModel cannot compute some tokens only") as error:
            whole(WAN.original, settings)
        for able in ("SD3Transformer2DModel", "PixArtTransformer2DModel", "FluxTransformer2DModel"):
            assert able in error.value.problem
        assert 'PruneSettings.preset("forecast")' in error.value.remedy
        stand_in = whole(WAN.original)
        with pytest.raises(SettingsError, match="cannot compute some tokens only"):
            stand_in.settings = settings or PruneSettings()
        assert stand_in.settings == FORECAST

    def test_modules_that_are_no_transformers(self) -> None:
        with pytest.raises(
            CheckpointError,
            match="class Linear is not supported: its forward takes none of timestep, timesteps, t; write",
        ):
            CatTransformer.from_model(nn.Linear(2, 2), FORECAST)

    def test_a_cat_transformer(self, make_tiny_sd3: Callable[..., nn.Module]) -> None:
        wrapped = CatTransformer.from_model(make_tiny_sd3())
        with pytest.raises(CheckpointError, match="is a CatTransformer already; set its"):
            CatTransformer.from_model(wrapped, FORECAST)

    def test_compilation(self) -> None:
        with pytest.raises(SettingsError, match="compiled=True: no family knows WanTransformer3DModel"):
            whole(WAN.original, compiled=True)


class TestSchedules:
    """Of the stand-in, and of a class that a family knows."""

    @pytest.fixture(params=["wan", "sd3"])
    def module(self, request: pytest.FixtureRequest, make_tiny_sd3: Callable[..., nn.Module]) -> nn.Module:
        return WAN.original if request.param == "wan" else make_tiny_sd3()

    def test_a_schedule_alone(self, module: nn.Module) -> None:
        wrapped = CatTransformer.from_model(module, schedule=SCHEDULE)
        assert wrapped.settings == PruneSettings.tuned(SCHEDULE)
        settings = FORECAST.replace(num_clusters=3)
        wrapped = CatTransformer.from_model(module, settings, schedule=SCHEDULE)
        assert wrapped.settings == settings.replace(schedule=SCHEDULE)
        again = Schedule.from_dict(SCHEDULE.model_dump(mode="json"))
        CatTransformer.from_model(module, PruneSettings.tuned(SCHEDULE), schedule=again)

    def test_two_schedules(self, module: nn.Module) -> None:
        other = Schedule.of(4, [0, 1, 2])
        with pytest.raises(SettingsError, match="settings have a schedule, and another one was given"):
            CatTransformer.from_model(module, PruneSettings.tuned(SCHEDULE), schedule=other)

    def test_a_schedule_of_this_model(self, module: Any) -> None:
        schedule = SCHEDULE.model_copy(update={"made_for": made_for(module)})
        assert CatTransformer.from_model(module, schedule=schedule).settings.schedule == schedule

    def test_a_schedule_of_another_class(self, module: Any) -> None:
        schedule = SCHEDULE.model_copy(update={"made_for": made_for(module, transformer_class="ATransformer")})
        with pytest.raises(ScheduleError, match=f"is for a ATransformer, this is a {type(module).__name__}"):
            CatTransformer.from_model(module, schedule=schedule)

    def test_a_schedule_of_another_config(self, module: Any) -> None:
        schedule = SCHEDULE.model_copy(update={"made_for": made_for(module, config_sha256="0" * 64)})
        found = config_sha256(module.config)[:12]
        with pytest.raises(ScheduleError, match=f"config has the hash 0{{12}}, this one's has {found}"):
            CatTransformer.from_model(module, schedule=schedule)

    def test_settings_that_are_given_later(self, make_tiny_sd3: Callable[..., nn.Module]) -> None:
        schedule = SCHEDULE.model_copy(update={"made_for": made_for(WAN.original, transformer_class="ATransformer")})
        stand_in = whole(WAN.original)
        with pytest.raises(ScheduleError, match="ATransformer"):
            stand_in.settings = PruneSettings.tuned(schedule)
        known = CatTransformer.from_model(make_tiny_sd3())
        with pytest.raises(ScheduleError, match="ATransformer"):
            known.settings = PruneSettings.tuned(schedule)
        assert known.settings == PruneSettings()


class HandingOn(WanTransformer3DModel):
    """Whose signature says nothing."""

    def forward(self, hidden_states: Tensor, *arguments: Any, **others: Any) -> Any:
        return super().forward(hidden_states.clamp(-3, 3), *arguments, **others)


class TestStandIn:
    def test_a_subclass_that_hands_its_arguments_on(self) -> None:
        module = HandingOn(**WAN.config).eval()
        made = outputs_of(whole(module), 4)
        assert torch.equal(made[1], outputs_of(module)[1])
        torch.testing.assert_close(made[3], 2 * made[2] - made[1])

    def test_it_is_of_the_original_s_class_and_has_what_that_has(self) -> None:
        original: Any = WAN.original
        stand_in: Any = whole(original)
        assert isinstance(stand_in, WanTransformer3DModel)
        assert type(stand_in).__name__ == "WanTransformer3DModel"
        assert stand_in.config == original.config
        assert stand_in.dtype == original.dtype
        assert stand_in.device == original.device
        assert inspect.signature(stand_in.forward) == inspect.signature(original.forward)
        assert dict(stand_in.state_dict()).keys() == dict(original.state_dict()).keys()
        assert all(one is other for one, other in zip(stand_in.parameters(), original.parameters(), strict=True))
        assert "keep_ratio=0.0" in repr(stand_in)

    def test_the_original_is_not_changed_and_may_be_called_beside(self) -> None:
        before = dict(vars(WAN.original))
        stand_in = whole(WAN.original)
        expected = outputs_of(WAN.original)
        made = outputs_of(stand_in, 6)
        assert torch.equal(made[0], expected[0])
        assert not torch.equal(made[3], outputs_of(WAN.original, 6)[3])
        assert vars(WAN.original).keys() == before.keys()

    def test_a_stand_in_of_a_stand_in_is_one(self) -> None:
        stand_in = whole(whole(WAN.original, PruneSettings(keep_ratio=1)))
        assert stand_in._cat_original is WAN.original

    def test_a_copy_has_an_image_of_its_own_and_the_same_weights(self) -> None:
        stand_in = whole(WAN.original)
        outputs_of(stand_in)
        copied = copy.deepcopy(stand_in)
        assert copied.last_step is None
        assert stand_in.last_step is not None
        assert next(copied.parameters()) is next(stand_in.parameters())
        stand_in.reset()
        assert stand_in.last_step is None

    def test_every_thread_has_an_image_of_its_own(self) -> None:
        stand_in = whole(WAN.original)
        expected = outputs_of(stand_in, 6)
        stand_in.reset()
        at_once = threading.Barrier(2)
        results: dict[int, list[Tensor]] = {}

        def run(number: int) -> None:
            text = arguments()["encoder_hidden_states"]
            results[number] = []
            for step in range(6):
                at_once.wait()
                with torch.no_grad():
                    output = stand_in(**arguments(step) | {"encoder_hidden_states": text})
                results[number].append(output.sample)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for outputs in results.values():
            assert all(torch.equal(one, other) for one, other in zip(outputs, expected, strict=True))

    def test_it_moves_and_casts_as_the_original(self) -> None:
        module = WAN.module()
        stand_in: Any = whole(module, PruneSettings(keep_ratio=1))
        stand_in.to(torch.float64)
        assert stand_in.dtype == torch.float64
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float64}
        reference = WAN.module().to(torch.float64)
        assert torch.equal(outputs_of(stand_in)[2], outputs_of(reference)[2])

    def test_it_saves_the_original(self, tmp_path: Path) -> None:
        stand_in: Any = whole(WAN.original)
        stand_in.save_pretrained(tmp_path)
        loaded = WanTransformer3DModel.from_pretrained(tmp_path)
        assert type(loaded) is WanTransformer3DModel
        for name, tensor in WAN.original.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name

    @pytest.mark.parametrize("compiled", ["before", "before, in place", "after"])
    def test_a_compiled_transformer(self, compiled: str) -> None:
        module = WAN.module()
        expected = outputs_of(module)
        seen: list[int] = []

        def backend(graph: Any, inputs: Any) -> Any:
            seen.append(len(inputs))
            return graph.forward

        if compiled == "before":
            stand_in = whole(torch.compile(module, backend=backend))  # type: ignore[arg-type]
        elif compiled == "after":
            stand_in = whole(module)
            stand_in.compile(backend=backend)
        else:
            module.compile(backend=backend)
            stand_in = whole(module)
        made = outputs_of(stand_in, 4)
        assert seen
        torch.testing.assert_close(made[0], expected[0])
        torch.testing.assert_close(made[3], made[1] + 2 * (made[2] - made[1]))


class TestAdapters:
    def lora(self, module: Any) -> dict[str, Tensor]:
        """Of a transformer like this one."""
        other: Any = WAN.module()
        other.add_adapter(LORA)
        return {f"transformer.{name}": tensor for name, tensor in get_peft_model_state_dict(other).items()}

    def test_a_lora_by_the_pipeline(self) -> None:
        module = WAN.module()
        state = self.lora(module)
        reference = WAN.around(WAN.module())
        reference.load_lora_weights(dict(state), adapter_name="style")
        pipe = WAN.around(whole(module, PruneSettings(keep_ratio=1)))
        without = WAN.run(pipe, steps=2)
        pipe.load_lora_weights(dict(state), adapter_name="style")
        assert pipe.get_active_adapters() == ["style"]
        with_lora = WAN.run(pipe, steps=2)
        assert torch.equal(with_lora, WAN.run(reference, steps=2))
        assert not torch.equal(with_lora, without)
        for each in (pipe, reference):
            each.set_adapters("style", 0.5)
        assert torch.equal(WAN.run(pipe, steps=2), WAN.run(reference, steps=2))
        pipe.unload_lora_weights()
        assert torch.equal(WAN.run(pipe, steps=2), without)


class TestHooks:
    def test_offloading(self) -> None:
        """The pipeline's own, before and after the transformer is wrapped; on this device, so that no GPU is needed."""
        expected = WAN.run(WAN.around(WAN.original), steps=4)
        first = WAN.around(WAN.module())
        first.enable_model_cpu_offload(device="cpu")
        stand_in = whole(first.transformer)
        first.transformer = stand_in
        second = WAN.around(whole(WAN.module()))
        second.enable_model_cpu_offload(device="cpu")
        images = []
        for pipe in (first, second):
            for _ in range(2):  # hooks are made anew after an image
                images.append(WAN.run(pipe, steps=4))
                assert pipe.transformer.last_step.kind == "forecast"
                assert torch.equal(images[-1], images[0])
        assert not torch.equal(images[0], expected)

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_diffusers_own_cache_within_full_steps(self, when: str) -> None:
        """It sees the pipeline's cache contexts; every block but the first is left out after the first step."""
        tiny = PIPELINES["qwen"]
        config = FirstBlockCacheConfig(threshold=1e9)

        def cached() -> Any:
            module: Any = tiny.module()
            module.enable_cache(config)
            return module

        expected = tiny.run(tiny.around(cached()), steps=3)
        if when == "before":
            stand_in: Any = whole(cached(), PruneSettings(keep_ratio=1))
        else:
            stand_in = whole(tiny.module(), PruneSettings(keep_ratio=1))
            stand_in.enable_cache(config)
        assert torch.equal(tiny.run(tiny.around(stand_in), steps=3), expected)

    def test_hooks_of_the_original_run_once_a_full_step(self) -> None:
        module = WAN.module()
        calls = []
        module.register_forward_hook(lambda *_: calls.append(1))
        outputs_of(whole(module), 6)
        assert len(calls) == 4
