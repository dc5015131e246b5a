"""The answers to one client: a thread that reads `command-replies` and hands each answer to whoever waits for it."""

from __future__ import annotations

import queue
import threading
import weakref

from perdure.schemas import codec, topics
from perdure.schemas.errors import CommandRefused, DecodeError, InfrastructureError, NotFound
from perdure.schemas.inbox import CommandReply
from perdure.streams.log import Log, Reader, Record

_POLL_S = 0.05  # also what `close` may have to wait for


class Expected:
    """The answers to one command; nothing is kept for it once nobody holds this object."""

    def __init__(self) -> None:
        self._arrived: queue.SimpleQueue[CommandReply | InfrastructureError] = queue.SimpleQueue()

    def next(self, timeout_s: float) -> CommandReply | None:
        """The next answer; None if none came in time. Raises the error that ended the reading of answers."""
        try:
            arrived = self._arrived.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            return None
        if isinstance(arrived, InfrastructureError):
            raise arrived
        return arrived

    def put(self, arrived: CommandReply | InfrastructureError) -> None:
        """An answer, or the reason why there will be none."""
        self._arrived.put(arrived)


class Replies:
    """Reads answers from the first expectation on, until `close`; thread-safe."""

    def __init__(self, log: Log, client_id: str) -> None:
        self._log = log
        self._key = client_id.encode()
        self._waiting: weakref.WeakValueDictionary[str, Expected] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def expect(self, command_id: str) -> Expected:
        """Wait for the answers to a command from here on: to be called before the command is sent.

        The first call blocks until the ends of the topic's partitions are known (≤ 10 s, then `Unreachable`).
        """
        expected = Expected()
        with self._lock:
            if self._thread is None:
                reader = self._reader()
                self._thread = threading.Thread(target=self._run, args=(reader,), name="perdure-replies", daemon=True)
                self._thread.start()
            self._waiting[command_id] = expected
        return expected

    def close(self) -> None:
        """Stop reading; returns when the thread has ended."""
        self._stop.set()
        thread = self._thread
        if thread is not None:
            thread.join()

    def _reader(self) -> Reader:
        """A reader whose start is fixed now: END alone would be looked up later, after the answer maybe."""
        reader = self._log.reader()
        name = topics.REPLIES.name
        reader.assign({(name, p): reader.bounds(name, p)[1] for p in range(self._log.partitions)})
        return reader

    def _run(self, reader: Reader) -> None:
        try:
            while not self._stop.is_set():
                for record in reader.read(500, _POLL_S):
                    self._deliver(record)
        except InfrastructureError as error:
            self._fail(error)
        finally:
            reader.close()

    def _deliver(self, record: Record) -> None:
        if record.key != self._key or record.value is None:
            return
        try:
            reply = codec.decode_as(CommandReply, record.value)
        except DecodeError:
            return  # of a newer engine, in a schema that this client cannot read: as good as no answer
        with self._lock:
            expected = self._waiting.get(reply.command_id)
        if expected is not None:
            expected.put(reply)

    def _fail(self, error: InfrastructureError) -> None:
        """Tell all who wait; the next expectation starts anew."""
        with self._lock:
            self._thread = None
            for expected in list(self._waiting.values()):
                expected.put(error)


def raise_refusal(reply: CommandReply, task_id: str) -> None:
    """Raise what a negative answer means; do nothing for a positive one."""
    if reply.accepted:
        return
    if reply.reason.startswith("not_found"):
        raise NotFound(f"no task has the id {task_id!r}, as far as the engine knows")
    raise CommandRefused(reply.reason, field=reply.field)
