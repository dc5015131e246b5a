"""The audit: proves from the topics alone what the engine guarantees (G1 to G6), sharing nothing with its decisions.

    audit = Audit()
    audit.feed(records)      # of any of the audited topics; of one partition of a topic in order
    audit.check()            # everything up to the changelog's position was fed
    audit.violations

Feeding and checking may go on for ever: what is kept is one entry for each task, step and row that the engine has not
forgotten, never the records. `audit_rules.RULES` says what is held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from perdure.projections.audit_partition import READ, Partition
from perdure.projections.audit_records import Decoder, LogRecord
from perdure.projections.audit_rules import RULES, Violation
from perdure.schemas import topics

TOPICS = (topics.CONFIG.name, *READ)
KEPT = 10_000
"""Violations that are kept; all are counted."""


class Audit:
    """An audit of a namespace's log.

    starts: (topic, partition) -> first offset that the log still has; where it is above 0, older records were deleted,
    and what hangs on them is counted as partial and not held against the log.
    """

    def __init__(self, starts: Mapping[tuple[str, int], int] | None = None) -> None:
        self._starts = dict(starts or {})
        self._decoder = Decoder()
        self._partitions: dict[int, Partition] = {}
        self.violations: list[Violation] = []
        """The first `KEPT`, in the order in which they were found."""
        self.counts: Counter[str] = Counter()
        """Rule -> how often it was broken."""
        self._records: Counter[str] = Counter()
        self._taken: dict[tuple[int, int], tuple[int, int]] = {}
        """(source, target) -> (last number taken, offset of its event) at the last check."""

    def feed(self, records: Iterable[LogRecord]) -> None:
        """Take in records of the audited topics; others are passed over. Never raises for what a record holds."""
        for record in records:
            if record.topic in TOPICS:
                self._records[record.topic] += 1
            if record.topic in READ:
                self.partition(record.partition).feed(record)
            elif record.topic == topics.CONFIG.name and (record.key or b"").startswith(b"schema/"):
                self._learn(record)

    def partition(self, number: int) -> Partition:
        """What is known of a partition."""
        if number not in self._partitions:
            starts = {topic: self._starts.get((topic, number), 0) for topic in READ}
            self._partitions[number] = Partition(number, self._decoder, starts, self._violated)
        return self._partitions[number]

    def check(self) -> None:
        """Hold everything up to the position of each partition's changelog to the rules.

        Of each partition the changelog has to have been fed up to the end of a transaction, and after that the other
        topics at least up to the same transaction's end. What is beyond waits for the next check, and so does the
        question whether what a partition has taken was sent by another one.
        """
        for partition in self._partitions.values():
            partition.check()
        self._check_forwarded()

    def _check_forwarded(self) -> None:
        """What was taken had been sent. Partitions are read one after another: the source is asked a check later."""
        for (source, target), (number, offset) in self._taken.items():
            sender = self._partitions.get(source)
            if sender is not None and sender.fold.whole and sender.inputs.sent.get(target, 0) < number:
                text = f"number {number} of partition {source} was taken, which it has not sent"
                self._violated(Violation("forward-order", topics.EVENTS.name, target, offset, text))
        self._taken = {
            (source, target): (number, p.inputs.taken_at[source])
            for target, p in self._partitions.items()
            for source, number in p.inputs.taken.items()
        }

    @property
    def records(self) -> int:
        """How many records were read."""
        return self._records.total()

    def summary(self) -> dict[str, Any]:
        """What was read and what was found, as `perdure audit --json` says it."""
        partitions = self._partitions.values()
        unknown = sum(len(p.unknown_tasks) for p in partitions)
        return {
            "clean": not self.counts,
            "violations_total": self.counts.total(),
            "rules": {rule.name: self.counts[rule.name] for rule in RULES},
            "read": {
                "records": self.records,
                "topics": dict(sorted(self._records.items())),
                "commands": sum(p.inputs.commands for p in partitions),
                "tasks": sum(p.seen for p in partitions),
                "partial": unknown,
                "partitions": len(self._partitions),
            },
        }

    def _learn(self, record: LogRecord) -> None:
        """Schemas of other builds: they are published before they are used."""
        try:
            if record.value is not None:
                self._decoder.learn(self._decoder.read(record.value).fields["content"].decode())
        except Exception as error:  # noqa: BLE001 - anything may be published, and the audit goes on
            self._violated(Violation("readable", record.topic, record.partition, record.offset, str(error)))

    def _violated(self, violation: Violation) -> None:
        self.counts[violation.rule] += 1
        if len(self.violations) < KEPT:
            self.violations.append(violation)
