"""Calls to systems that know nothing of us: each made once, and undone when a later one fails for good.

A step's function may have run although its result was never recorded: the process died in between. So every call hands
over `ctx.idempotency_key`, which is the same in every attempt. `at_most_once` is for a system that takes no such key:
if a crash leaves its outcome unknown, the task fails and waits for a person instead of trying again.

    perdure dev --tasks examples/book_a_trip.py
    perdure submit book_a_trip --input '{"traveller": "Ada", "city": "Turin"}'
"""

from __future__ import annotations

from typing import Any

from perdure import Context, Retry, task


class SoldOut(Exception):
    """There is nothing left: trying again does not help."""


class Bookings:
    """The systems outside; here they agree to everything."""

    sold_out: frozenset[str] = frozenset()
    """Cities where nothing is left."""

    def reserve(self, what: str, city: str, key: str) -> str:
        """Reserve; the same key again is the same reservation. Raises `SoldOut`."""
        if city in self.sold_out:
            raise SoldOut(f"no {what} in {city}")
        return f"{what}-{key[:8]}"

    def release(self, reservation: str) -> None:
        """Give a reservation back."""

    def charge(self, traveller: str, amount: int) -> str:
        """Take money; asked twice, it is taken twice."""
        return f"receipt for {amount} from {traveller}"


bookings = Bookings()


@task(retry=Retry(max_attempts=5, delay="10s", never_on=[SoldOut]))
def book_a_trip(ctx: Context, traveller: str, city: str) -> dict[str, Any]:
    """Train, hotel, payment."""

    def reserve(what: str) -> str:
        return bookings.reserve(what, city, key=ctx.idempotency_key)

    train = ctx.step("train", reserve, "train")
    try:
        hotel = ctx.step("hotel", reserve, "hotel")
    except SoldOut:
        ctx.step("release-train", bookings.release, train)
        raise
    ctx.milestone("reserved")
    receipt = ctx.step("charge", bookings.charge, traveller, 400, at_most_once=True)
    return {"train": train, "hotel": hotel, "receipt": receipt}
