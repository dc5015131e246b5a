"""What `ctx` is to a task: its state, and what it says of itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from perdure import channel
from perdure.context import Context, State
from perdure.schemas.errors import InvalidRequest, StepError
from tests.unit.perdure.attempting import engine_for, result_of


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["list"].append(9),
        lambda s: s["list"].extend([9]),
        lambda s: s["list"].insert(0, 9),
        lambda s: s["list"].remove(1),
        lambda s: s["list"].pop(),
        lambda s: s["list"].clear(),
        lambda s: s["list"].sort(),
        lambda s: s["list"].reverse(),
        lambda s: s["list"].__setitem__(0, 9),
        lambda s: s["list"].__delitem__(0),
        lambda s: s["list"].__iadd__([9]),
        lambda s: s["list"].__imul__(2),
        lambda s: s["dict"].update(b=9),
        lambda s: s["dict"]["deep"].append(9),
        lambda s: s["list"][2]["x"].append(9),
        lambda s: s.get("list").append(9),
    ],
)
def test_what_lies_in_the_state_is_read_only_inside_a_step_too(change: Callable[[Any], Any]) -> None:
    """A step that is found recorded is not called again, so what it did to the state would be lost."""

    def job(ctx: Context) -> Any:
        ctx.state["list"] = [1, 2, {"x": [3]}]
        ctx.state["dict"] = {"deep": [4]}
        with pytest.raises(StepError, match="read-only"):
            ctx.step("s", lambda: change(ctx.state))
        return ctx.state

    assert result_of(engine_for(job).run()) == {"list": [1, 2, {"x": [3]}], "dict": {"deep": [4]}}


def test_a_step_reads_the_state_as_it_is() -> None:
    def job(ctx: Context) -> Any:
        ctx.state.update(list=[1, {"x": [2]}], dict={"a": None}, number=1)
        ctx.state["list"].append(3)
        return ctx.step(
            "s",
            lambda: [
                ctx.state["list"] == [1, {"x": [2]}, 3],
                isinstance(ctx.state["list"], list),
                ctx.state["dict"] == {"a": None},
                ctx.state.get("none", 5),
                sorted(ctx.state),
                ctx.state,
            ],
        )

    whole = {"list": [1, {"x": [2]}, 3], "dict": {"a": None}, "number": 1}
    assert result_of(engine_for(job).run()) == [True, True, True, 5, ["dict", "list", "number"], whole]


def test_a_copy_of_the_state_is_the_steps_own() -> None:
    def job(ctx: Context) -> Any:
        ctx.state["list"] = [1, {"x": [2]}]
        return ctx.step("s", change, ctx)

    def change(ctx: Context) -> Any:
        copied = copy.deepcopy(ctx.state)
        copied["list"][1]["x"].append(3)
        copied["more"] = 1
        assert copied == {"list": [1, {"x": [2, 3]}], "more": 1}
        mine = copy.deepcopy(ctx.state["list"])
        mine[1]["x"].append(4)
        return [mine, ctx.state]

    assert result_of(engine_for(job).run()) == [[1, {"x": [2, 4]}], {"list": [1, {"x": [2]}]}]


def test_outside_of_steps_the_state_is_a_plain_dict() -> None:
    mine: list[int] = []
    state = State()
    state["mine"] = mine
    mine.append(1)
    assert state["mine"] is mine
    assert state.get("mine") is mine
    with pytest.raises(KeyError):
        state["other"]


@pytest.mark.parametrize("units", [-1, 1 << 63, 10**30, float("nan"), float("inf"), "many"])
@pytest.mark.parametrize("field", ["done", "total"])
def test_units_that_no_record_holds_are_refused_by_name(field: str, units: Any) -> None:
    def job(ctx: Context) -> None:
        with pytest.raises(InvalidRequest) as caught:
            ctx.progress(**{field: units})
        assert caught.value.field == field

    assert result_of(engine_for(job).run()) is None


def test_the_name_of_any_file_can_be_shown_as_the_current_step() -> None:
    way = engine_for(lambda ctx: ctx.progress(step="file \udcff"), name="job").run()
    assert [said.current_step for said in way.of(channel.Progress)] == ["file ?"]
