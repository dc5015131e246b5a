"""What a process has read of `config`."""

from __future__ import annotations

import threading
from queue import SimpleQueue

import pytest

from perdure.schemas import codec
from perdure.schemas.errors import Unreachable
from perdure.streams import config_view
from perdure.streams.config_view import ConfigView
from perdure.streams.schema_lookup import SchemaLookup
from tests.world import World


def test_a_read_that_makes_no_progress_ends_and_goes_on_later(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    view = ConfigView(world.log)
    view.refresh()
    world.configure_type("young")
    reader = view._reader
    assert reader is not None
    monkeypatch.setattr(reader, "read", lambda *_: [])
    monkeypatch.setattr(config_view, "_STILL_S", 0.0)
    with pytest.raises(Unreachable, match="config stands still at"):
        view.refresh_to_end()
    monkeypatch.undo()
    assert view.refresh_to_end() == {"type/young"}
    assert view.read_to == reader.bounds("config", 0)[1]


def test_a_first_look_that_fails_is_begun_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    view = ConfigView(world.log)

    def away(*_: object) -> None:
        raise Unreachable("the broker is away")

    make = world.log.reader
    with monkeypatch.context() as patch:
        made = make()
        patch.setattr(made, "bounds", away)
        patch.setattr(world.log, "reader", lambda **_: made)
        with pytest.raises(Unreachable, match="away"):
            view.refresh()
    assert "type/noop" in view.refresh()


def test_a_record_of_a_schema_that_nobody_knows_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """To look for its schema would be to read `config`, where it is met again: no lock may wait for its own owner."""
    world = World()
    world.producer.append("config", 0, b"type/odd", codec.MARKER + b"8 unknown")
    world.configure_type("young")
    lookup = SchemaLookup(world.log)
    ended = codec.learn_from(lookup)
    try:
        found: SimpleQueue[set[str]] = SimpleQueue()
        threading.Thread(target=lambda: found.put(ConfigView(world.log).refresh()), daemon=True).start()
        assert found.get(timeout=30) == {"type/noop", "type/young"}
    finally:
        ended()
