"""Consumer groups that a broker has lost are known by its log."""

from __future__ import annotations

from pathlib import Path

from perdure.connectors.lost_groups import LostGroups


def _line(what: str, partition: int) -> str:
    return f"2026-11-22T03:32:19.684Z INFO CoordinatorRuntime [GroupCoordinator id=1] {what}__consumer_offsets-{partition} "


def _failed(partition: int) -> str:
    return _line("Failed to load metadata from ", partition) + "with epoch 40"


def _out_of_step(partition: int) -> str:
    return _line("The state machine of the coordinator ", partition) + "is out of sync with the underlying log."


def _loaded(partition: int) -> str:
    return _line("Finished loading of metadata from ", partition) + "with epoch 42 in 3ms"


def test_a_coordinator_is_lost_until_it_is_loaded(tmp_path: Path) -> None:
    log = tmp_path / "broker.log"
    groups = LostGroups(log)
    assert groups.look() == []
    with log.open("a") as file:

        def says(*lines: str) -> list[str]:
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            return groups.look()

        assert says("all is well", _loaded(0), _loaded(1)) == []
        assert says(_failed(0)) == [_failed(0)]
        assert says(_out_of_step(1), "and more") == [_failed(0), _out_of_step(1)]
        assert says(_loaded(0)) == [_out_of_step(1)]
        assert says(_loaded(1)) == []


def test_a_line_counts_once_it_is_whole_and_a_log_may_begin_anew(tmp_path: Path) -> None:
    log = tmp_path / "broker.log"
    log.write_text("words\n" * 100 + _failed(3)[:-20])
    groups = LostGroups(log)
    assert groups.look() == []
    with log.open("a") as file:
        file.write(_failed(3)[-20:] + "\n")
    assert groups.look() == [_failed(3)]
    log.write_text(_loaded(2) + "\n")
    assert groups.look() == [_failed(3)]
    log.write_text(_loaded(2) + "\n" + _loaded(3) + "\n")
    assert groups.look() == []
