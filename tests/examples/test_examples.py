"""The examples, run as their readers would test them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from examples import book_a_trip, crawl, large_dataset
from perdure.schemas.errors import TaskFailed
from perdure.testing import Kit

Make = Callable[..., Kit]


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    path = tmp_path / "large.csv"
    path.write_text("id,amount\n" + "".join(f"{n},{n % 10}\n" for n in range(4_500)))
    return str(path)


class Witness(book_a_trip.Bookings):
    """Remembers what it was asked for, by what key."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.broken = 0

    def reserve(self, what: str, city: str, key: str) -> str:
        self.asked.append((what, key))
        if self.broken:
            self.broken -= 1
            raise ConnectionError("try again")
        return super().reserve(what, city, key)

    def release(self, reservation: str) -> None:
        self.asked.append(("release", reservation))

    def charge(self, traveller: str, amount: int) -> str:
        self.asked.append(("charge", traveller))
        return super().charge(traveller, amount)


@pytest.fixture
def bookings(monkeypatch: pytest.MonkeyPatch) -> Witness:
    witness = Witness()
    monkeypatch.setattr(book_a_trip, "bookings", witness)
    return witness


def test_the_data_set_is_summed_up(perdure_kit: Make, dataset: str) -> None:
    kit = perdure_kit([large_dataset])
    handle = kit.submit("process_large_dataset", {"dataset_path": dataset})
    assert handle.result() == {"sum": sum(n % 10 for n in range(4_500)), "columns": ["id", "amount"]}
    status = handle.status()
    assert (status.units_done, status.units_total, status.milestones) == (5, 5, ("aggregated",))


def test_the_data_set_survives_the_death_of_its_worker(perdure_kit: Make, dataset: str) -> None:
    kit = perdure_kit([large_dataset])
    handle = kit.submit(large_dataset.process_large_dataset, {"dataset_path": dataset})
    kit.crash_worker(at=handle.after_report(7), down="20s")
    assert handle.result()["sum"] == sum(n % 10 for n in range(4_500))
    assert handle.status().epoch == 2
    assert [event.kind for event in handle.events()].count("StepCompleted") == 1


def test_a_missing_data_set_is_looked_for_three_times(perdure_kit: Make, tmp_path: Path) -> None:
    kit = perdure_kit([large_dataset])
    handle = kit.submit("process_large_dataset", {"dataset_path": str(tmp_path / "none.csv")})
    with pytest.raises(TaskFailed, match="FileNotFoundError"):
        handle.result()
    assert handle.status().attempt == 3


def trip(kit: Kit, **more: Any) -> Any:
    return kit.submit("book_a_trip", {"traveller": "Ada", "city": "Turin"}, **more)


def test_a_trip_is_booked_once_although_a_process_dies(perdure_kit: Make, bookings: Witness) -> None:
    kit = perdure_kit([book_a_trip])
    handle = trip(kit)
    kit.kill_task(handle, at=handle.before_report(3))  # the train is reserved, and nobody has heard of it
    assert handle.result()["receipt"] == "receipt for 400 from Ada"
    assert [what for what, _ in bookings.asked] == ["train", "train", "hotel", "charge"]
    assert bookings.asked[0] == bookings.asked[1]


def test_an_outage_is_waited_out(perdure_kit: Make, bookings: Witness) -> None:
    bookings.broken = 3
    handle = trip(perdure_kit([book_a_trip]))
    handle.result()
    assert handle.status().attempt == 4


def test_what_was_reserved_is_released(perdure_kit: Make, bookings: Witness, monkeypatch: pytest.MonkeyPatch) -> None:
    kit = perdure_kit([book_a_trip])
    handle = trip(kit)
    kit.crash_worker(at=handle.after_report(3), down="1m")  # the reservation of the train is recorded
    kit.run()
    monkeypatch.setattr(bookings, "sold_out", frozenset({"Turin"}))
    with pytest.raises(TaskFailed, match="SoldOut: no hotel in Turin"):
        handle.result()
    (_, key), *_, last = bookings.asked
    assert last == ("release", f"train-{key[:8]}")
    assert [what for what, _ in bookings.asked].count("train") == 1


def test_a_payment_whose_outcome_is_unknown_waits_for_a_person(perdure_kit: Make, bookings: Witness) -> None:
    kit = perdure_kit([book_a_trip])
    calm = trip(kit)
    calm.result()
    handle = trip(kit)
    kit.kill_task(handle, at=handle.before_report(calm.reports - 1))
    with pytest.raises(TaskFailed, match="outcome is unknown"):
        handle.result()
    assert [what for what, _ in bookings.asked].count("charge") == 2


def test_a_crawl_of_hours_goes_on_where_it_was(perdure_kit: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[int] = []

    async def counted(site: str, number: int) -> int:
        found = await real(site, number)
        fetched.append(number)
        return found

    real = crawl.fetch
    monkeypatch.setattr(crawl, "fetch", counted)
    kit = perdure_kit([crawl])
    handle = kit.submit("crawl", {"site": "example.org", "pages": 300})
    kit.advance("30s")
    assert handle.status().progress == pytest.approx(0.29, abs=0.02)
    kit.kill_task(handle)
    kit.advance("30s")
    kit.crash_worker(down="1h")
    assert handle.result() == {"site": "example.org", "words": sum(11 + n % 7 for n in range(300))}
    assert sorted(fetched) == list(range(300))
