from __future__ import annotations

import pytest

from perdure.channel import FRAME_MAX, Accepted, Ack, Exit, Stop, Unpacker, pack
from perdure.schemas.errors import InfrastructureError

FRAMES = [Ack("etl/1", 1, 5), Accepted("etl/1", 1, 7), Stop("etl/ü", 2, "paused", "r" * 300), Exit()]
BYTES = b"".join(map(pack, FRAMES))


@pytest.mark.parametrize("size", [1, 3, 7, 200, len(BYTES)])
def test_frames_come_whole_however_their_bytes_are_cut(size: int) -> None:
    unpacker = Unpacker(child=True)
    pieces = [BYTES[i : i + size] for i in range(0, len(BYTES), size)]
    assert [frame for piece in pieces for frame in unpacker.feed(piece)] == FRAMES


def test_what_is_left_over_waits_for_the_rest() -> None:
    unpacker = Unpacker(child=True)
    assert unpacker.feed(BYTES + BYTES[:10]) == FRAMES
    assert unpacker.feed(BYTES[10:]) == FRAMES


@pytest.mark.parametrize(
    ("data", "message"),
    [((FRAME_MAX + 1).to_bytes(4, "big"), "at most"), (b"\x00\x00\x00\x02{}", "no frame")],
)
def test_bytes_that_are_no_frame_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(InfrastructureError, match=message):
        Unpacker(child=True).feed(data)
