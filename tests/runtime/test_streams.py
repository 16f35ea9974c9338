"""Which calls go on from each other, by a module that says of every call what it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cat_pruning import CatTransformer, PruneSettings, Schedule
from cat_pruning.errors import ScheduleError, SettingsError
from cat_pruning.moved_schedule import move
from cat_pruning.runtime.image import Memory
from cat_pruning.runtime.whole import WholeTransformer

LEVELS = torch.linspace(1000, 500, 6)
SCHEDULE = Schedule.of(6, [0, 1, 3], {2: {0: -1.0, 1: 2.0}, 4: {1: -0.5, 3: 1.5}, 5: {3: 1.0}})
KINDS = "FFfFff"
PROMPT, OTHER = torch.full((1, 3, 2), 2.0), torch.full((1, 3, 2), -1.0)


class Toy(nn.Module):
    """Its output depends on all that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.calls = 0
        self.fails = False

    def forward(
        self,
        hidden_states: Any,
        timestep: Any,
        encoder_hidden_states: Tensor | None = None,
        ids: Tensor | None = None,
        mode: str = "",
        shape: str = "tuple",
    ) -> Any:
        self.calls += 1
        if self.fails:
            raise RuntimeError("broken")
        first = hidden_states[0] if isinstance(hidden_states, list) else hidden_states
        text = 0.0 if encoder_hidden_states is None else encoder_hidden_states.sum()
        level = timestep.max() if isinstance(timestep, Tensor) else timestep
        out = torch.sin(first * self.scale + text + len(mode)) * level
        return {"tuple": (out,), "list": [[out, -out], None], "dict": {"sample": out}, "tensor": out}[shape]


class Pipeline:
    """A sampling loop around a stand-in, one level after another, that remembers kinds and outputs."""

    def __init__(self, schedule: Schedule = SCHEDULE) -> None:
        self.module = Toy()
        stand_in = CatTransformer.from_model(self.module, schedule=schedule)
        assert isinstance(stand_in, WholeTransformer)
        self.transformer = stand_in
        self.kinds: list[str] = []
        self.outputs: list[Tensor] = []

    def call(self, latents: Any, timestep: Any, *arguments: Any, **named: Any) -> Any:
        with torch.no_grad():
            output = self.transformer(latents, timestep, *arguments, **named)
        assert self.transformer.last_step is not None
        self.kinds.append("f" if self.transformer.last_step.kind == "forecast" else "F")
        (out,) = output if isinstance(output, tuple) else (torch.zeros(1),)
        self.outputs.append(out.clone())
        return output

    def clear(self) -> None:
        self.kinds, self.outputs = [], []

    def image(self, prompts: Sequence[Tensor | None], levels: Tensor = LEVELS, *, remade: bool = False) -> str:
        """Every prompt at every level, one by one; returns the kinds of the last prompt's calls."""
        self.clear()
        for number in range(len(levels)):
            latents = latents_of(number)
            for prompt in prompts:
                given = prompt.clone() if remade and prompt is not None else prompt
                self.call(latents, levels[number] * 1.0, given)  # no view of the levels, as in FLUX
        return self.kinds_of(len(prompts) - 1, len(prompts))

    def kinds_of(self, call: int, calls: int) -> str:
        return "".join(self.kinds[call::calls])


def latents_of(number: int) -> Tensor:
    return torch.randn(1, 4, generator=torch.Generator().manual_seed(number))


def outputs_of(prompt: Tensor | None, levels: Tensor = LEVELS) -> list[Tensor]:
    """Of an image of this prompt alone."""
    alone = Pipeline()
    assert alone.image([prompt], levels) == KINDS
    return alone.outputs


def assert_equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one, other)


def test_forecasts_are_the_schedule_s_combinations() -> None:
    pipeline = Pipeline()
    assert pipeline.image([PROMPT]) == KINDS
    out = pipeline.outputs
    torch.testing.assert_close(out[2], 2 * out[1] - out[0])
    torch.testing.assert_close(out[4], 1.5 * out[3] - 0.5 * out[1])
    assert torch.equal(out[5], out[3])
    assert pipeline.module.calls == 3


@pytest.mark.parametrize("remade", [False, True], ids=["the same memory", "new memory"])
def test_two_prompts_have_a_stream_each(remade: bool) -> None:
    """Known by their memory, or, where that changes from call to call, by their values."""
    pipeline = Pipeline()
    pipeline.image([PROMPT, OTHER], remade=remade)
    assert_equal(pipeline.outputs[::2], outputs_of(PROMPT))
    assert_equal(pipeline.outputs[1::2], outputs_of(OTHER))


@pytest.mark.parametrize("remade", [False, True], ids=["the same memory", "new memory"])
def test_prompts_in_another_order_are_known(remade: bool) -> None:
    """Beside position ids that they share, and that tell nothing."""
    pipeline, ids = Pipeline(), torch.zeros(3)
    for number, level in enumerate(LEVELS):
        for prompt in (PROMPT, OTHER) if number % 2 else (OTHER, PROMPT):
            pipeline.call(latents_of(number), level * 1.0, prompt.clone() if remade else prompt, ids)
    assert pipeline.module.calls == 6
    for number, expected in enumerate(outputs_of(PROMPT)):
        assert torch.equal(pipeline.outputs[2 * number + (0 if number % 2 else 1)], expected)


def test_what_is_shared_by_two_prompts_does_not_make_them_one() -> None:
    """Position ids, say."""
    pipeline, ids = Pipeline(), torch.zeros(3)
    for number, level in enumerate(LEVELS):
        for prompt in (PROMPT, OTHER):
            pipeline.call(latents_of(number), level * 1.0, prompt, ids)
    assert_equal(pipeline.outputs[::2], outputs_of(PROMPT))
    assert_equal(pipeline.outputs[1::2], outputs_of(OTHER))


def test_what_changes_on_every_step_does_not_hide_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control net's output, say. Values are read at one level, where it is not yet known what changes."""
    pipeline, read = Pipeline(), []
    equal = torch.equal
    monkeypatch.setattr(
        "cat_pruning.runtime.image.torch.equal", lambda *tensors: read.append(number) or equal(*tensors)
    )
    for number, level in enumerate(LEVELS):
        for prompt in (OTHER, PROMPT) if number == 3 else (PROMPT, OTHER):
            pipeline.call(latents_of(number), level * 1.0, prompt, torch.full((3,), float(number)))
    monkeypatch.undo()
    assert set(read) == {0, 1}
    assert "".join(pipeline.kinds) == "FFFFffFFffff"
    assert torch.equal(pipeline.outputs[10], outputs_of(PROMPT)[5])


def test_other_arguments_make_another_stream() -> None:
    """As guidance without some layers has, with the prompt's own tensors."""
    pipeline = Pipeline()
    for number, level in enumerate(LEVELS):
        for mode in ("", "skip"):
            pipeline.call(latents_of(number), level * 1.0, PROMPT, mode=mode)
    assert pipeline.kinds_of(0, 2) == pipeline.kinds_of(1, 2) == KINDS
    assert_equal(pipeline.outputs[::2], outputs_of(PROMPT))


def test_cache_contexts_name_streams() -> None:
    """Even where all that is known of the calls is remade."""
    pipeline = Pipeline()
    for number, level in enumerate(LEVELS):
        for context, prompt in (("cond", PROMPT), ("uncond", OTHER)):
            with pipeline.transformer.cache_context(context):
                pipeline.call(latents_of(number), level * 1.0, prompt.clone())
    assert_equal(pipeline.outputs[::2], outputs_of(PROMPT))
    assert_equal(pipeline.outputs[1::2], outputs_of(OTHER))


def test_cache_contexts_tell_calls_with_the_same_prompt_apart() -> None:
    """Guidance by a perturbed model, say: an image's outputs are its own, whatever is called beside it."""
    pipeline = Pipeline()
    for number, level in enumerate(LEVELS):
        for context, latents in (("cond", latents_of(number)), ("perturbed", latents_of(number + 50))):
            with pipeline.transformer.cache_context(context):
                pipeline.call(latents, level * 1.0, PROMPT)
    assert_equal(pipeline.outputs[::2], outputs_of(PROMPT))


def test_the_direction_is_known_from_the_images_before() -> None:
    """An image that began late was broken off after a level; the next one begins higher, with the same prompt."""
    pipeline = Pipeline()
    pipeline.image([PROMPT])
    pipeline.call(latents_of(9), LEVELS[-1] * 1.0 + 1, PROMPT)
    pipeline.image([PROMPT])
    assert_equal(pipeline.outputs, outputs_of(PROMPT))


def test_a_schedule_tells_the_direction_of_the_first_image() -> None:
    """Seen whole by a call that begins late; the next image's timesteps come one by one."""
    pipeline = Pipeline()
    pipeline.call(latents_of(9), LEVELS.clone()[4].expand(1), PROMPT)
    pipeline.image([PROMPT])
    assert_equal(pipeline.outputs, outputs_of(PROMPT))


def test_values_of_a_tensor_that_was_written_to_are_unknown() -> None:
    tensor = PROMPT.clone()
    memory = Memory(tensor)
    assert memory.equals(tensor)
    assert memory.equals(PROMPT)
    assert not memory.equals(OTHER)
    assert not memory.equals(PROMPT.double())
    tensor.copy_(OTHER)
    assert not memory.equals(OTHER)
    assert not memory.equals(tensor)


def test_calls_that_cannot_be_told_apart_are_never_forecast() -> None:
    """Two at a level, and nothing of them is like anything at the level before."""
    pipeline, reference = Pipeline(), Toy()
    for number, level in enumerate(LEVELS):
        for half in range(2):
            conditioning = torch.full((1, 3), float(2 * number + half))
            out = pipeline.call(latents_of(number), level * 1.0, conditioning)[0]
            assert torch.equal(out, reference(latents_of(number), level, conditioning)[0])


def test_one_call_a_level_goes_on_whatever_its_conditioning() -> None:
    pipeline = Pipeline()
    for number, level in enumerate(LEVELS):
        pipeline.call(latents_of(number), level * 1.0, torch.full((1, 3), float(number)))
    assert "".join(pipeline.kinds) == KINDS


def test_a_prompt_that_is_written_over_is_another_prompt() -> None:
    pipeline, prompt = Pipeline(), PROMPT.clone()
    for number in range(2):
        pipeline.call(latents_of(number), LEVELS[number] * 1.0, prompt)
    prompt.copy_(OTHER)
    pipeline.clear()
    pipeline.image([prompt], LEVELS - 400)
    assert_equal(pipeline.outputs, outputs_of(OTHER, LEVELS - 400))


@pytest.mark.parametrize("remade", [False, True], ids=["the same memory", "new memory"])
@pytest.mark.parametrize("prompts", [[PROMPT], [PROMPT, OTHER], [PROMPT, PROMPT]])
def test_second_order_schedulers_call_twice_at_a_level(prompts: list[Tensor], remade: bool) -> None:
    """With other latents: the same stream, the same step. What the level computed last is what later levels read."""
    pipeline = Pipeline()
    for number, level in enumerate(LEVELS):
        for half in range(1 if number == 0 else 2):
            for prompt in prompts:
                given = prompt.clone() if remade else prompt
                pipeline.call(latents_of(number + 100 * half), level * 1.0, given)
    count = len(prompts)
    assert pipeline.kinds_of(0, count) == "F" + "FF" + "ff" + "FF" + "ff" + "ff"
    first, second, third = (pipeline.outputs[call * count] for call in (0, 2, 6))
    assert torch.equal(pipeline.outputs[3 * count], pipeline.outputs[4 * count])
    torch.testing.assert_close(pipeline.outputs[3 * count], 2 * second - first)
    torch.testing.assert_close(pipeline.outputs[8 * count], 1.5 * third - 0.5 * second)


def test_guidance_may_begin_late_and_end_early() -> None:
    """The stream that begins late computes until it has what its rows read; the other goes on."""
    pipeline = Pipeline()
    guided: list[Tensor] = []
    for number, level in enumerate(LEVELS):
        pipeline.call(latents_of(number), level * 1.0, PROMPT)
        if 2 <= number <= 4:
            guided.append(pipeline.call(latents_of(number), level * 1.0, OTHER)[0])
    assert "".join(pipeline.kinds) == "FF" + "fF" + "FF" + "fF" + "f"
    unguided = [out for number, out in enumerate(pipeline.outputs) if number not in (3, 5, 7)]
    assert_equal(unguided, outputs_of(PROMPT))


@pytest.mark.parametrize("levels", [LEVELS, 1 - LEVELS / 1000], ids=["falling", "rising"])
@pytest.mark.parametrize("broken_after", [1, 2, 3, 5])
@pytest.mark.parametrize("prompts", [[PROMPT], [PROMPT, OTHER]])
def test_a_broken_off_image_leaves_no_trace(levels: Tensor, broken_after: int, prompts: list[Tensor]) -> None:
    """With the same prompts in the same memory, and timesteps that come one by one."""
    pipeline = Pipeline()
    pipeline.image(prompts, levels)
    for number in range(broken_after):
        pipeline.call(latents_of(50 + number), levels[number] * 1.0, prompts[0])
    pipeline.image(prompts, levels)
    assert_equal(pipeline.outputs[:: len(prompts)], outputs_of(prompts[0], levels))


@pytest.mark.parametrize("change", ["prompt", "encoded again", "shape", "schedule", "argument"])
def test_a_new_image_is_known_though_the_timesteps_go_on(change: str) -> None:
    pipeline = Pipeline()
    high, low = LEVELS.clone(), LEVELS - 400
    prompt, latents = PROMPT.clone(), latents_of(0)
    pipeline.call(latents, high[0].expand(1), prompt)
    pipeline.call(latents, high[1].expand(1), prompt)
    if change == "prompt":
        prompt = OTHER
    elif change == "encoded again":
        prompt = prompt.clone()
    elif change == "shape":
        latents = torch.cat([latents, latents])
    named = {"mode": "without a control net"} if change == "argument" else {}
    pipeline.clear()
    for number in range(6):
        # Views of a schedule, which is seen to be new; or single timesteps, which are not.
        level = low[number].expand(1) if change == "schedule" else low[number] * 1.0
        pipeline.call(latents, level, prompt, **named)
    assert "".join(pipeline.kinds) == KINDS


def test_an_image_begun_anew_at_its_first_level() -> None:
    """The first call's prompt was another one; its stream is dead."""
    pipeline = Pipeline()
    pipeline.call(latents_of(9), LEVELS[0] * 1.0, OTHER)
    pipeline.image([PROMPT])
    assert_equal(pipeline.outputs, outputs_of(PROMPT))


def test_a_failure_forgets_the_image() -> None:
    pipeline = Pipeline()
    for number in range(3):
        pipeline.call(latents_of(number), LEVELS[number] * 1.0, PROMPT)
    pipeline.module.fails = True
    with pytest.raises(RuntimeError, match="broken"):
        pipeline.call(latents_of(3), LEVELS[3] * 1.0, PROMPT)
    assert pipeline.transformer.last_step is None
    pipeline.module.fails = False
    pipeline.clear()
    pipeline.call(latents_of(3), LEVELS[3] * 1.0, PROMPT)
    assert pipeline.transformer.last_step is not None
    assert pipeline.transformer.last_step.step == 0


def test_new_settings_begin_a_new_image() -> None:
    pipeline = Pipeline()
    for number in range(3):
        pipeline.call(latents_of(number), LEVELS[number] * 1.0, PROMPT)
    pipeline.transformer.settings = PruneSettings.preset("forecast", full_steps=3)
    pipeline.call(latents_of(3), LEVELS[3] * 1.0, PROMPT)
    assert pipeline.transformer.last_step is not None
    assert pipeline.transformer.last_step.step == 0


@pytest.mark.parametrize("shape", ["tuple", "list", "dict", "tensor"])
def test_outputs_of_any_structure(shape: str) -> None:
    pipeline = Pipeline()

    def tensors(output: Any) -> list[Tensor]:
        if isinstance(output, Tensor):
            return [output]
        parts = output.values() if isinstance(output, dict) else output
        return [tensor for part in parts if part is not None for tensor in tensors(part)]

    outputs = []
    with torch.no_grad():
        for number, level in enumerate(LEVELS):
            outputs.append(pipeline.transformer(latents_of(number), level * 1.0, PROMPT, shape=shape))
    for forecast in (2, 4, 5):
        assert type(outputs[forecast]) is type(outputs[0])
    one, two, three = (tensors(output) for output in outputs[:3])
    assert len(three) == (2 if shape == "list" else 1)
    for before, after, made in zip(one, two, three, strict=True):
        torch.testing.assert_close(made, 2 * after - before)


def test_an_output_that_the_pipeline_changes_is_not_read_again() -> None:
    changed, expected = Pipeline(), Pipeline()
    expected.image([PROMPT])
    for number, level in enumerate(LEVELS):
        (out,) = changed.call(latents_of(number), level * 1.0, PROMPT)
        out.zero_()
    assert_equal(changed.outputs, expected.outputs)
    repeats = Pipeline(Schedule.of(3, [0]))
    for number in range(3):
        repeats.call(latents_of(number), LEVELS[number] * 1.0, PROMPT)[0].zero_()
    assert_equal(repeats.outputs[1:], repeats.outputs[:1] * 2)


def test_sums_are_in_fp32_and_outputs_in_their_dtype() -> None:
    pipeline = Pipeline(Schedule.of(3, [0, 1], {2: {0: -7.3, 1: 8.3}}))
    pipeline.module.to(torch.bfloat16)
    outputs = [
        pipeline.call(latents_of(number).bfloat16(), LEVELS[number].bfloat16(), PROMPT.bfloat16())[0]
        for number in range(3)
    ]
    expected = (8.3 * outputs[1].double() - 7.3 * outputs[0].double()).bfloat16()
    assert outputs[2].dtype == torch.bfloat16
    torch.testing.assert_close(outputs[2], expected)  # one rounding; products in bfloat16 would be off by several


def test_timesteps_may_be_numbers() -> None:
    for timesteps in (LEVELS.tolist(), LEVELS.int().tolist()):
        pipeline = Pipeline()
        for number, timestep in enumerate(timesteps):
            pipeline.call(latents_of(number), timestep, PROMPT)
        assert "".join(pipeline.kinds) == KINDS


def test_timesteps_may_differ_from_token_to_token() -> None:
    """Some tokens may be at none, as a given picture's are; or fall one after the other: every call is a level."""
    given_picture = [torch.tensor([[0.0, 0.0, level, level]]) for level in LEVELS.tolist()]
    one_by_one = [torch.tensor([[900.0] * (6 - number) + [800.0] * number]) for number in range(6)]
    for timesteps in (given_picture, one_by_one):
        pipeline = Pipeline()
        for number, timestep in enumerate(timesteps):
            pipeline.call(latents_of(number), timestep, PROMPT)
        assert "".join(pipeline.kinds) == KINDS


def test_timesteps_for_every_token_find_the_rows_of_a_table() -> None:
    """Wan 2.2's small model has them; the mean of equal numbers is that number, whatever the rows or the dtype."""
    levels = (LEVELS / 3).bfloat16()
    table = Schedule.of(6, [0, 1, 3], {2: {0: -1.0, 1: 2.0}}, timesteps=tuple(levels.tolist()))
    pipeline = Pipeline(table)
    for number in range(6):
        pipeline.call(latents_of(number), levels[number].repeat(2, 997), PROMPT)
    assert "".join(pipeline.kinds) == KINDS


def test_calls_without_conditioning_and_with_lists_of_latents() -> None:
    pipeline = Pipeline()
    for number, level in enumerate(LEVELS):
        pipeline.call([latents_of(number), latents_of(number)], level * 1.0)
    assert "".join(pipeline.kinds) == KINDS


def test_a_call_without_a_timestep_or_latents() -> None:
    pipeline = Pipeline()
    with pytest.raises(SettingsError, match="timestep: expected a tensor or a number, got NoneType"):
        pipeline.transformer(latents_of(0), None, PROMPT)
    with pytest.raises(SettingsError, match="hidden_states: expected a tensor"):
        pipeline.transformer(None, LEVELS[0], PROMPT)


def test_a_run_with_other_timesteps_or_more_steps_than_rows() -> None:
    pipeline = Pipeline(Schedule.of(6, [0, 1, 3], timesteps=tuple(LEVELS.tolist())))
    levels = LEVELS * 0.9
    with pytest.raises(ScheduleError, match="timestep"):
        pipeline.call(latents_of(0), levels[0].expand(1), PROMPT)
    pipeline = Pipeline()
    with pytest.raises(ScheduleError, match="this run has more"):
        pipeline.image([PROMPT], torch.linspace(1000, 100, 7))


@pytest.mark.parametrize("seen", [True, False])
def test_other_timesteps_move_the_schedule(seen: bool) -> None:
    """Where the pipeline shows them all; where it hands over copies, the schedule can be moved beforehand."""
    table = SCHEDULE.model_copy(update={"timesteps": tuple(LEVELS.tolist())})
    levels = torch.tensor([1000.0, 960.0, 920.0, 850.0, 700.0, 500.0])
    moved = move(table, tuple(levels.tolist()))
    pipe = Pipeline(table if seen else moved)
    for number in range(len(levels)):
        pipe.call(
            latents_of(number), levels[number : number + 1].clone() if not seen else levels[number : number + 1], PROMPT
        )
    assert "".join(pipe.kinds) == "FfFfFf"
    row = moved.steps[3].weights
    torch.testing.assert_close(pipe.outputs[3], sum(weight * pipe.outputs[read] for read, weight in row.items()))


def test_a_step_of_no_row_is_refused_with_what_to_do() -> None:
    pipe = Pipeline(SCHEDULE.model_copy(update={"timesteps": tuple(LEVELS.tolist())}))
    with pytest.raises(ScheduleError, match="this run has a step at timestep 960") as caught:
        pipe.image([PROMPT], torch.tensor([1000.0, 960.0, 920.0, 850.0, 700.0, 500.0]))
    assert "moved_schedule.move" in caught.value.remedy


@pytest.mark.parametrize(
    ("amid", "hidden"),
    [(OTHER, True), (OTHER, False), (PROMPT, False)],
    ids=["another prompt, timesteps by themselves", "another prompt", "the same prompt"],
)
def test_an_image_amid_another_leaves_it_as_it_is(amid: Tensor, hidden: bool) -> None:
    """A preview in a callback: the outer image began anew after it."""
    pipeline, outer, inner = Pipeline(), LEVELS.clone(), LEVELS.clone()
    kinds: list[str] = []
    for number in range(len(outer)):
        pipeline.call(latents_of(number), outer[number] * 1.0 if hidden else outer[number], PROMPT)
        kinds.append(pipeline.kinds[-1])
        if number in (1, 3):
            pipeline.clear()
            for each in range(4):
                pipeline.call(latents_of(each), inner[each] * 1.0 if hidden else inner[each], amid)
            assert "".join(pipeline.kinds) == KINDS[:4]
            assert_equal(pipeline.outputs, outputs_of(amid)[:4])
            inner = LEVELS.clone()
    assert "".join(kinds) == KINDS
