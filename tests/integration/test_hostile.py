"""What must not stop the engine: ten thousand hostile records, and records that break the engine itself (G2, G7)."""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer

from perdure.schemas import codec, commands, limits, reports, topics
from perdure.schemas.common import Usage
from perdure.schemas.errors import NotFound
from perdure.schemas.signing import Keys, signed
from tests.integration.stack import FAULTY, QUEUE, Seen, Stack, stack_on, until

pytestmark = pytest.mark.kafka
COUNT = 10_000
LARGE = 36
EXTREMES = (-1, 2**63 - 1, -(2**63))
Place = tuple[int, int]


@pytest.fixture
def stack(kafka_bootstrap: str, topic_prefix: str, tmp_path: Path) -> Iterator[Stack]:
    with stack_on(kafka_bootstrap, topic_prefix, tmp_path) as made:
        yield made


@dataclass
class Attacker:
    """Writes hostile records. Each method is named by the one place where its record has to end."""

    stack: Stack
    draw: random.Random
    session: str
    """A live session, with a task that runs under it."""
    task_id: str
    epoch: int

    outputs: list[bytes | None]
    """What the engine has written to its own topics."""
    replays: list[bytes | None]
    """Authentic records of an older session of the same worker, as anybody finds them in the topic."""

    def quarantine(self) -> bytes | None:
        return self.draw.choice((
            self._nothing, self._noise, self._cut, self._tail, self._bomb, self._no_json, self._deep, self._foreign,
            self._output, self._forged,
        ))()  # fmt: skip

    def command_rejected(self) -> bytes:
        return self.draw.choice(_ILLEGAL)

    def report_rejected(self) -> bytes | None:
        return self.draw.choice(
            (self._unsigned_session, self._unsigned_reports, self._token, self._stale, self._replay)
        )()

    def _nothing(self) -> bytes | None:
        """Without a value, or with nothing in it: the header alone, a byte order mark, blanks before the brace."""
        whole = b'{"command": "PauseTask", "task_id": "etl/1"}'
        return self.draw.choice((None, b"", codec.MARKER, b"{", b"\xef\xbb\xbf" + whole, b"\n " + whole))

    def _noise(self) -> bytes:
        start = self.draw.choice((b"", b"\x00", b"\xff", codec.MARKER, codec.MARKER + bytes(8)))
        return start + self.draw.randbytes(self.draw.randrange(1, 300))

    def _cut(self) -> bytes:
        whole = codec.encode(commands.PauseTask(command_id="cut", task_id=self.task_id))
        return whole[: self.draw.randrange(codec.HEADER, len(whole))]

    def _tail(self) -> bytes:
        return codec.encode(commands.CancelTask(command_id="tail", task_id=self.task_id)) + b"\x00"

    def _bomb(self) -> bytes:
        """An array that claims 2^62 items."""
        batch = codec.encode(commands.SubmitBatch(command_id="bomb", tasks=[]))
        assert batch[-1:] == b"\x00"
        return batch[:-1] + bytes.fromhex("feffffffffffffff7f") + self.draw.randbytes(40)

    def _no_json(self) -> bytes:
        text = '{"command": "SubmitTask", "type": "t", "queue": "etl", "input": '
        return (text + self.draw.choice(("NaN}", "1e999}", '1, "input": 2}', '{"a": 1, "a": 2}}', "", "[}"))).encode()

    def _deep(self) -> bytes:
        return b'{"command": "SubmitTask", "type": "t", "queue": "etl", "input": ' + b"[" * self.draw.randrange(
            70, 50_000
        )

    def _foreign(self) -> bytes:
        """Nothing that a stranger may say, in whatever form."""
        name = self.draw.choice(
            ("ReportStep", "ReportBatch", "Tick", "ApplyConfig", "Forwarded", "WorkerStarted", "Nothing")
        )
        return self.draw.choice((
            b'{"command": "' + name.encode() + b'"}',
            codec.encode(commands.LookUp(record=b"", left=[])),
            codec.encode(reports.AttemptCompleted(seq=1, result=b"null", usage=Usage())),
        ))  # fmt: skip

    def _output(self) -> bytes | None:
        """What the engine says, said to it: grants, events, rows of its state, answers."""
        return self.draw.choice(self.outputs)

    def _replay(self) -> bytes | None:
        return self.draw.choice(self.replays)

    def _forged(self) -> bytes:
        """Host records without the engine's key: unsigned, or signed by a worker or a stranger."""
        inner = codec.encode(commands.CancelTask(command_id="forged", task_id=self.task_id))
        partitions = self.stack.log.partitions
        record = self.draw.choice((
            commands.ApplyConfig(name=f"queue/{QUEUE}", version=2**40, content=None),
            commands.Forwarded(source=self.draw.randrange(partitions), target=self.stack.home(), number=1, record=inner),
            commands.ForwardedAck(source=self.stack.home(), target=self.draw.randrange(partitions), up_to=2**40),
        ))  # fmt: skip
        return self._with_any_key(record, self.stack.keys.newest_worker(), Keys.generate().newest_engine())

    def _unsigned_session(self) -> bytes:
        record = self.draw.choice((
            commands.WorkerStarted(session=f"s-{'f' * 36}", worker_id="w", types={}, queues=[QUEUE], slots=1_000),
            commands.WorkerBeat(session=self.session, grants_seen=2**40, free=1_000),
            commands.WorkerStopping(session=self.session),
        ))  # fmt: skip
        return self._with_any_key(record, Keys.generate().newest_worker(), self.stack.keys.newest_engine())

    def _unsigned_reports(self) -> bytes:
        epoch = self.draw.choice((self.epoch, *EXTREMES))
        return self._with_any_key(self._reports(self.session, epoch), Keys.generate().newest_worker())

    def _token(self) -> bytes:
        """By a worker: a grant of another one, with a token that it has made up."""
        epoch = self.draw.choice((0, 1, 2, *EXTREMES))
        return signed(self._reports(self.session, epoch), *self.stack.keys.newest_worker())

    def _stale(self) -> bytes:
        """By a worker whose session nobody knows."""
        record = self.draw.choice(
            (self._reports("s-0", self.epoch), commands.WorkerBeat(session="s-0", grants_seen=0, free=0))
        )
        return signed(record, *self.stack.keys.newest_worker())

    def _reports(self, session: str, epoch: int) -> reports.ReportBatch:
        done = reports.AttemptCompleted(seq=self.draw.randrange(1, 9), result=b'"stolen"', usage=Usage())
        entry = reports.ReportEntry(task_id=self.task_id, epoch=epoch, token=self.draw.randbytes(32), reports=[done])
        return reports.ReportBatch(session=session, entries=[entry])

    def _with_any_key(self, record: Any, *keys: tuple[str, bytes]) -> bytes:
        key = self.draw.choice((None, *keys))
        return codec.encode(record) if key is None else signed(record, *key)


_ILLEGAL = (
    b'{"command": "PauseTask", "task_id": "etl/nobody"}',
    b'{"command": "CancelTask", "task_id": "elsewhere/nobody"}',
    b'{"command": "RetryTask", "task_id": "nobody"}',
    b'{"command": "ResumeTask"}',
    b'{"command": "SubmitTask"}',
    b'{"command": "SubmitTask", "type": "nobody has heard of it"}',
    b'{"command": "SubmitTask", "type": "t", "queue": "No Queue"}',
    b'{"command": "SubmitTask", "type": "t", "queue": "etl", "priority": 10}',
    b'{"command": "SubmitTask", "type": "t", "queue": "etl", "surprise": 1}',
    b'{"command": "SubmitTask", "type": "t", "queue": "etl", "run_timeout": "a while"}',
    b'{"command": "SubmitTask", "type": "t", "queue": "etl", "labels": {"a": "\\ud800"}}',
    b'{"command": "SubmitBatch", "tasks": 1}',
    b'{"command": "FindTasks", "prefix": "short"}',
    codec.encode(commands.DiscardDeadLetter(command_id="d", task_id="etl/nobody")),
    codec.encode(commands.SubmitTask(command_id="s", type="t", queue=QUEUE, input=b"no JSON")),
)


def large_command(number: int) -> bytes:
    """A command of nearly the greatest size that is taken and forwarded; too much for a task's side values."""
    value = b'{"x": "' + b"x" * (limits.VALUE_MAX - 10) + b'"}'
    labels = {f"label {n}": "x" * 1_000 for n in range(64)}
    made = codec.encode(
        commands.SubmitTask(
            command_id=f"large-{number}", task_id=f"{QUEUE}/large-{number}", type="t", input=value, agent_config=value,
            labels=labels,
        )
    )  # fmt: skip
    assert 447 * 1024 < len(made) <= limits.COMMAND_MAX
    return made


def longest_command() -> bytes:
    """A submit that fits into a record, but not into a forwarded one."""
    value = b'"' + b"x" * (limits.VALUE_MAX - 10) + b'"'
    sides = b'{"x": "' + b"x" * 163_797 + b'"}'
    made = codec.encode(
        commands.SubmitTask(
            command_id="longest", task_id=f"{QUEUE}/longest", type="t", input=value, agent_config=sides, resources=sides
        )
    )
    assert limits.RECORD_MAX - 20 < len(made) <= limits.RECORD_MAX
    return made


def big_records() -> list[tuple[str, bytes]]:
    """As long as a broker takes them: (where they end, record)."""
    blank = b'{"command": "SubmitTask", "type": "t", "queue": "etl"' + b" " * 511 * 1024 + b"}"
    return [
        ("command_rejected", blank),
        ("quarantine", codec.MARKER + bytes(511 * 1024)),
        ("quarantine", b"{" * 511 * 1024),
        ("quarantine", blank + b" " * 400 * 1024),
    ]


def test_of_ten_thousand_hostile_records_each_ends_in_exactly_one_place(stack: Stack) -> None:
    engine = stack.engine()
    worker = stack.worker("--slots", "2", name="w")
    assert stack.result(stack.submit("add", {"a": 1, "b": 2})) == 3
    replays = [s.record.value for s in stack.tail(topics.COMMANDS.name).whole() if _is_of_a_session(s.message)]
    worker.kill()
    stack.await_worker(worker.start())
    gate = stack.folder / "gate"
    running = stack.submit("gated", {"witness": str(stack.witness), "gate": str(gate)})
    stack.await_witness("gate", running.id, "1")
    (granted,) = stack.events(running.id, "TaskGranted")
    outputs = [
        s.record.value
        for topic in (topics.EVENTS, topics.INBOX, topics.REPLIES, topics.CHANGELOG)
        for s in stack.tail(topic.name).whole()
    ]
    attacker = Attacker(stack, random.Random(20_261_121), granted.session, running.id, 1, outputs, replays)
    good = stack.submit("files", {"witness": str(stack.witness), "count": 40})
    pid = engine.pid

    with _producers(stack) as producers:
        sent = _attack(stack, attacker, producers)
        in_between = stack.submit("add", {"a": 1, "b": 2})
        ended = until("the end of every record", lambda: _all_ended(stack, set(sent)))
    assert sum(ended.values()) == len(ended) == COUNT, "each in one place, once"
    wrong = {place: kind for place, kind in ended if sent[place] != kind}
    assert not wrong, "in the wrong place"

    assert (engine.pid, engine.runs()) == (pid, True)
    gate.touch()
    assert stack.result(running) == 1
    assert stack.result(good) == sum(range(40))
    assert stack.result(in_between) == 3
    assert len(stack.events(running.id, "TaskGranted")) == 1
    assert stack.messages("task-events", "AttemptLost") == []
    assert len(stack.messages("task-events", "TaskSubmitted")) == 4
    stack.check_store(engine)


def _is_of_a_session(message: Any) -> bool:
    return isinstance(message, commands.WorkerBeat | reports.ReportBatch)


def _attack(stack: Stack, attacker: Attacker, producers: list[Producer]) -> dict[Place, str]:
    """Write everything, in every way that Kafka knows; where each record lies, and where it has to end."""
    sent: dict[Place, str] = {}
    draw, home, partitions = attacker.draw, stack.home(), stack.log.partitions
    headers: list[list[tuple[str, str | bytes | None]] | None] = [None, [("traceparent", b"\xff"), ("n", None)]]

    def write(kind: str, value: bytes | None, partition: int) -> None:
        def placed(error: Any, message: Any) -> None:
            assert error is None, error
            sent[message.partition(), message.offset()] = kind

        producer = draw.choice(producers)
        producer.produce(
            topics.COMMANDS.on(stack.prefix), value, draw.choice((None, b"", b"etl", draw.randbytes(40))), partition,
            placed, headers=draw.choice(headers),
        )  # fmt: skip
        producer.poll(0)

    for number in range(LARGE):
        write("command_rejected", large_command(number), (home + 1 + number % (partitions - 1)) % partitions)
    for partition in range(partitions):
        write("command_rejected", longest_command(), partition)
    for kind, value in big_records():
        write(kind, value, draw.randrange(partitions))
    for _ in range(COUNT - len(big_records()) - partitions - LARGE):
        kind = draw.choice(("quarantine", "command_rejected", "report_rejected"))
        make: Callable[[], bytes | None] = getattr(attacker, kind)
        # A session lives in its queue's partition; elsewhere the same reports are refused for another reason.
        write(kind, make(), draw.randrange(partitions))
    for producer in producers:
        assert producer.flush(60) == 0
    assert len(sent) == COUNT
    return sent


@contextmanager
def _producers(stack: Stack) -> Iterator[list[Producer]]:
    """Strangers' producers: plain, with each compression, and in a transaction that hangs and in the end is aborted."""
    settings = {"bootstrap.servers": stack.bootstrap, "message.max.bytes": limits.OUTPUT_MAX, "acks": "all"}
    plain = [Producer(settings | {"compression.type": c}) for c in ("none", "gzip", "snappy", "lz4", "zstd")]
    foreign = Producer(settings | {"transactional.id": f"{stack.prefix}foreign", "transaction.timeout.ms": 600_000})
    foreign.init_transactions(30)
    foreign.begin_transaction()
    yield [*plain, foreign]
    foreign.abort_transaction(30)


def _all_ended(stack: Stack, places: set[Place]) -> Counter[tuple[Place, str]] | None:
    found = endings(stack.tail(topics.QUARANTINE.name).look(), stack.tail(topics.EVENTS.name).look(), places)
    return found if {place for place, _ in found} == places else None


def endings(quarantined: list[Seen], events: list[Seen], places: set[Place]) -> Counter[tuple[Place, str]]:
    """(record, where it has ended) -> how often, for the records in these places. Forwarded ones count at their origin."""
    journeys = _journeys(events)

    def origin(place: Place) -> Place:
        while place in journeys:
            place = journeys[place]
        return place

    ended: Counter[tuple[Place, str]] = Counter()
    for s in quarantined:
        ended[origin((s.message.partition, s.message.offset)), "quarantine"] += 1
    for s in events:
        kind = {"CommandRejected": "command_rejected", "ReportRejected": "report_rejected"}.get(
            type(s.message).__name__
        )
        if kind is not None:
            ended[origin((s.message.cause.partition, s.message.cause.offset)), kind] += 1
    return Counter({(place, kind): n for (place, kind), n in ended.items() if place in places})


def _journeys(seen: list[Seen]) -> dict[Place, Place]:
    """Place of a forwarded record -> place of the record that it was forwarded for."""
    queued = {
        (s.record.partition, s.message.target, s.message.number): (s.message.cause.partition, s.message.cause.offset)
        for s in seen
        if type(s.message).__name__ == "ForwardQueued"
    }
    taken = [
        ((s.message.source, s.record.partition, s.message.number), s.message.cause)
        for s in seen
        if type(s.message).__name__ == "ForwardTaken"
    ]
    return {(cause.partition, cause.offset): queued[number] for number, cause in taken if number in queued}


def test_authentic_records_sent_again_by_a_stranger_change_nothing(stack: Stack) -> None:
    """Whoever may read and write task-commands needs no key to repeat what others have signed, in any partition."""
    engine = stack.engine()
    worker = stack.worker("--slots", "2", name="w")
    ended = [stack.submit("files", {"witness": str(stack.witness), "count": 5}), stack.submit("broken")]
    assert stack.result(ended[0]) == 10
    stack.await_event(ended[1].id, "TaskDeadLettered")
    stack.produce({"command": "SubmitTask", "type": "add", "input": {"a": 1, "b": 2}}, partition=(stack.home() + 1) % 4)
    stack.flush()
    until("the forwarded task", lambda: len(stack.messages("task-events", "TaskCompleted")) == 2)
    worker.kill()
    stack.await_worker(worker.start())
    gate = stack.folder / "gate"
    running = stack.submit("gated", {"witness": str(stack.witness), "gate": str(gate)})
    stack.await_witness("gate", running.id, "1")
    stack.await_event(running.id, "AttemptStarted")

    captured = [s.record.value for s in stack.tail(topics.COMMANDS.name).whole() if s.message is not None]
    before = _changes(stack)
    for partition in range(stack.log.partitions):
        for value in captured:
            assert value is not None
            stack.produce(value, partition=partition)
    stack.flush()

    last = stack.submit("add", {"a": 2, "b": 2})
    assert stack.result(last) == 4
    gate.touch()
    assert stack.result(running) == 1
    after = _changes(stack)
    assert {task_id: after[task_id] for task_id in before if task_id != running.id} == {
        task_id: happened for task_id, happened in before.items() if task_id != running.id
    }
    assert set(after) - set(before) == {last.id}
    assert after[running.id] == [*before[running.id], "StepCompleted", "TaskCompleted"]
    stack.check_store(engine)


def _changes(stack: Stack) -> dict[str, list[str]]:
    """What has happened to each task, but for refusals."""
    found: dict[str, list[str]] = {}
    for event in stack.messages(topics.EVENTS.name):
        kind = type(event).__name__
        if getattr(event, "task_id", None) and kind not in ("CommandRejected", "ReportRejected"):
            found.setdefault(event.task_id, []).append(kind)
    return found


def test_a_decision_that_fails_sets_one_record_aside(stack: Stack) -> None:
    engine = stack.engine(program=(FAULTY,))
    before, bad, large, after = (stack.submit(t) for t in ("before", "raises", "oversized", "after"))
    assert before.status().state == after.status().state == "PENDING"
    for handle in (bad, large):
        assert stack.events(handle.id) == []
        with pytest.raises(NotFound):
            handle.status()
    aside = {q.cause: q for q in stack.messages("quarantine")}
    assert set(aside) == {"defect", "too_large"}
    assert "ZeroDivisionError: a defect in a decision" in aside["defect"].detail
    assert "faulty_engine.py" in aside["defect"].detail
    assert codec.decode(aside["defect"].record).task_id == bad.id
    assert "ProgressReported" in aside["too_large"].detail
    stack.check_store(engine)


def test_a_record_that_kills_the_engine_three_times_is_passed_over_unread(stack: Stack) -> None:
    engine = stack.engine(program=(FAULTY,))
    before = stack.submit("before")
    assert before.status().state == "PENDING"
    killer, after = stack.submit("kills"), stack.submit("after")
    deaths = 0
    while not stack.tail("quarantine").look():
        assert engine.ended() == -signal.SIGKILL
        deaths += 1
        assert deaths <= limits.KILLER_DEATHS
        engine.start()
        until("a death, or survival", lambda: not engine.runs() or stack.tail("quarantine").look())
    assert deaths == limits.KILLER_DEATHS
    (aside,) = stack.messages("quarantine")
    assert (aside.cause, aside.record) == ("killer", None)
    stack.await_event(after.id, "TaskQueued")
    assert stack.events(killer.id) == []
    assert engine.runs()
