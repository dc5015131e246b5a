"""The durable rows that the events of a partition make, told once more and independently of the engine's own fold.

Rows are kept as digests, but for what later events build on: a task's own row and its specification. Due times are
those of partition time, as ClockAdjusted tells it.
"""

from __future__ import annotations

import json
import uuid
from typing import Any

from perdure.projections import audit_records as keys
from perdure.projections.audit_records import digest
from perdure.projections.audit_task import Event, Task
from perdure.schemas import limits

_NEW_ROW: dict[str, Any] = {
    "state": "PENDING", "reason": "", "stopping": "none", "seq": 0, "epoch": 0, "attempt": 0, "charged": False,
    "order": 0, "ready": False, "due": None, "session": "", "worker_id": "", "grant": 0, "started": False,
    "clock_since": 0, "queue_used": 0, "run_used": 0, "ran": 0, "timers": {}, "steps_kept": 0, "steps_completed": 0,
    "milestones": [], "checkpoint": None, "checkpoint_at": None, "crashes": 0, "sessions_lost": 0, "error": None,
    "usage": None, "stop_detail": "", "dead_letter": False, "started_at": None, "finished_at": None, "updated_at": 0,
}  # fmt: skip
TIMES = frozenset({"due", "timers", "clock_since", "queue_used", "run_used", "ran", "checkpoint_at"})
"""Fields in partition time: not to be told while the partition's clock is unknown."""
_SPEC = (
    "task_id", "type", "queue", "input", "content_hash", "input_hash", "policy", "policy_version", "priority", "key",
    "user", "concurrency_key", "after", "resources", "estimated_duration", "agent_config", "callback_url", "labels",
    "notify", "overrides", "submitted_by",
)  # fmt: skip
_LOST = frozenset({"session_ended", "superseded", "unseen", "not_started"})
_LONG = 64


class Fold:
    """The durable rows of one partition by their keys."""

    def __init__(self, *, whole: bool) -> None:
        self.rows: dict[bytes, bytes] = {}
        """Key -> digest of the row; a task's own row is `Task.row`."""
        self.touched: set[bytes] = set()
        """Keys that have changed since they were last compared."""
        self.whole = whole
        """Whether the partition's events are there from the first on."""
        self.lost = False
        """Whether the partition's own events have broken a rule."""
        self.clock_known = whole
        self.set_back = False
        """Whether the log's clock was ever set back: then due times may have been moved back with it."""
        self.unacknowledged: dict[int, int] = {}
        """Target -> the first number in its outbox, or the next to come."""
        self._offset = self._ahead = 0
        self._unbound: dict[str, int] = {}
        self._shared: dict[bytes, Any] = {}
        """Policies: many tasks have the same one."""

    def give_up(self) -> None:
        """A rule is broken by the partition's own events: its own rows, and its time, are not followed any more."""
        self.lost, self.clock_known = True, False

    def put(self, key: bytes, row: dict[str, Any]) -> None:
        """Set a row."""
        self.rows[key] = digest(row)
        self.touched.add(key)

    def drop(self, key: bytes) -> None:
        """Delete a row."""
        self.rows.pop(key, None)
        self.touched.add(key)

    # Events of the partition -----------------------------------------------------------------------------------------

    def partition_event(self, name: str, e: Event) -> None:
        """Take in an event of the partition."""
        self._count("events", e["seq"])
        match name:
            case "ConfigApplied":
                self.put(keys.CONFIG + e["name"].encode(), slim({"version": e["version"], "content": e["content"]}))
            case "ForwardQueued":
                self._count(f"sent/{e['target']}", e["number"])
                self.unacknowledged.setdefault(e["target"], e["number"])
                self.put(outbox_key(e["target"], e["number"]), slim({"record": e["record"]}))
            case "ForwardTaken":
                self._count(f"taken/{e['source']}", e["number"])
            case "ForwardAcknowledged":
                target, last = e["target"], int(e["up_to"])
                for number in range(self.unacknowledged.get(target, last), last + 1):
                    self.drop(outbox_key(target, number))
                self.unacknowledged[target] = last + 1
            case "ClockAdjusted":
                self.put(keys.CLOCK, {f: e[f] for f in ("offset", "unconfirmed", "shift")})
                self._offset, self._ahead = e["offset"], max(0, e["unconfirmed"])
                self.set_back |= e["shift"] > 0
                self.clock_known = True

    def _count(self, name: str, value: int) -> None:
        self.put(keys.COUNTER + name.encode(), {"value": value})

    # Events of tasks -------------------------------------------------------------------------------------------------

    def task_event(self, task: Task, name: str, e: Event) -> None:
        """Take in an event of a task. One that is not whole, or is not followed any more, has no rows here."""
        if name == "TaskSubmitted":
            task.row = _NEW_ROW | {"order": e["order"]}
            task.spec = slim({f: e[f] for f in _SPEC} | {"submitted_at": e["at"]})
            task.spec["policy"] = self._shared.setdefault(digest(e["policy"]), e["policy"])
        if task.row is None:
            return
        _TaskFold(self, task, e).apply(name)
        self._answer(task, name, e)

    def _answer(self, task: Task, name: str, e: Event) -> None:
        command_id = e["cause"]["command_id"]
        if command_id is None or task.row is None:
            return
        key = answer_key(task.id, command_id)
        if key not in self.rows:
            refused = name == "CommandRejected"
            self.put(key, {"accepted": not refused, "reason": e["reason"] if refused else "",
                           "field": e["field"] if refused else None, "at": e["at"]})  # fmt: skip

    def now(self, e: Event) -> int:
        """Partition time of an event."""
        return int(e["at"]) + self._offset

    def due(self, e: Event, delay: int = 0) -> int:
        """Partition time a delay after an event; while the log may be ahead, counted from its later reading."""
        return self.now(e) + self._ahead + delay

    def wait_for_policy(self, task: Task, e: Event) -> None:
        """The task's policy is unknown: since when its total clock runs is kept."""
        assert task.spec is not None
        self._unbound[task.id] = self.due(e)
        self.put(_unbound_key(task), {"value": self.due(e), "text": task.id})

    def policy_known(self, task: Task) -> int | None:
        """It does not wait for its policy any more; since when it did."""
        self.drop(_unbound_key(task))
        return self._unbound.pop(task.id, None)


class _TaskFold:
    """What one event makes of a task's rows."""

    def __init__(self, fold: Fold, task: Task, e: Event) -> None:
        assert task.row is not None
        assert task.spec is not None
        self.fold, self.task, self.e = fold, task, e
        self.scope = keys.scope_of(task.id)
        self.row, self.spec = task.row, task.spec
        self.row["seq"], self.row["updated_at"] = e["seq"], e["at"]
        fold.touched.add(self.scope + keys.STATE)

    def apply(self, name: str) -> None:
        e, row = self.e, self.row
        match name:
            case "TaskSubmitted":
                self._submitted()
            case "TaskPolicyBound":
                self._policy_bound()
            case "TaskQueued":
                self._queued()
            case "TaskGranted":
                self._granted()
            case "AttemptStarted":
                self._started()
            case "StepStarted" | "StepCompleted" | "StepFailed" | "StepsRetired":
                self._step(name)
            case "MilestoneReached":
                row["milestones"] = [*row["milestones"], e["name"]]
            case "CheckpointRecorded":
                ref = {f: e[f] for f in ("version", "uri", "sha256", "size", "positions")}
                row |= {"checkpoint": ref, "checkpoint_at": self.fold.now(e), "crashes": 0, "sessions_lost": 0}
            case "PauseRequested":
                row["stopping"] = "pausing"
            case "CancelRequested":
                row |= {"stopping": "cancelling", "stop_detail": e["reason"]}
            case "DrainRequested":
                row["stopping"] = "draining"
            case "TimeoutReached":
                self._disarm(e["which"])
                weaker = row["stopping"] not in ("cancelling", "timing_out")
                if weaker or (row["stopping"] == "timing_out" and e["which"] == "total"):
                    row |= {"stopping": "timing_out", "stop_detail": e["which"]}
            case "TaskResumed":
                if row["state"] == "RUNNING":
                    row["stopping"] = "none"
            case "TaskDeadLettered":
                row["dead_letter"] = True
            case "DeadLetterDiscarded":
                row["dead_letter"] = False
                self._arm("retain", self.fold.due(e, limits.RETAIN_MS))
            case "AnswersForgotten":
                for command_id in self.task.first_answers(e["count"]):
                    self.fold.drop(answer_key(self.task.id, command_id))
            case "TaskRedriven":
                self._redriven()
            case "TaskRetired":
                self._retired()
            case _:
                self._ended(name)

    # Submit to start -------------------------------------------------------------------------------------------------

    def _submitted(self) -> None:
        e = self.e
        self.fold.put(self.scope + keys.SPEC, self.spec)
        derived = local_id_of(e["queue"], e["type"], e["key"]) if e["key"] is not None else None
        if derived is not None and e["task_id"].partition("/")[2] != derived:
            self.fold.put(self._idempotency_key(), {"value": 0, "text": self.task.id})
        if e["policy"] is None:
            self.fold.wait_for_policy(self.task, e)
        self._arm_total()

    def _policy_bound(self) -> None:
        e, row = self.e, self.row
        self.spec |= {"policy": e["policy"], "policy_version": e["policy_version"]}
        self.fold.put(self.scope + keys.SPEC, self.spec)
        since = self.fold.policy_known(self.task)
        total, queue = e["policy"]["total_timeout"], e["policy"]["queue_timeout"]
        if total is not None and "total" not in row["timers"]:
            self._arm("total", (self.fold.due(e) if since is None else min(since, self.fold.due(e))) + total)
        if row["ready"] and queue is not None:
            self._arm("queue", row["clock_since"] - row["queue_used"] + queue)

    def _queued(self) -> None:
        e, row = self.e, self.row
        resumed = row["state"] == "PAUSED"
        if resumed:
            self._move("PENDING")
        row["reason"] = e["reason"]
        if e["due"] is not None:
            self._arm(keys.NOT_BEFORE if e["reason"] == "delayed" else "due", e["due"])
            row["due"] = e["due"]
            return
        self._disarm("due", keys.NOT_BEFORE)
        used = row["queue_used"] if resumed else 0
        timeout = self._policy("queue_timeout")
        if timeout is not None:
            self._arm("queue", self.fold.due(e, timeout - used))
        row |= {"due": None, "ready": True, "clock_since": self.fold.due(e), "queue_used": used}

    def _granted(self) -> None:
        e, row = self.e, self.row
        self._leave_queue()
        self._move("RUNNING")
        self._arm("start", self.fold.due(e, limits.START_DEADLINE_MS))
        row |= {f: e[f] for f in ("epoch", "attempt", "session", "worker_id", "grant")}
        row |= {"started": False, "queue_used": 0, "due": None, "run_used": row["run_used"] if row["charged"] else 0}
        row["charged"] = True

    def _started(self) -> None:
        e, row = self.e, self.row
        self._disarm("start")
        limit = self._policy("run_timeout")
        if limit is not None:
            self._arm("run", self.fold.due(e, max(1, limit - row["run_used"])))
        row |= {"started": True, "clock_since": self.fold.due(e)}
        row["started_at"] = e["at"] if row["started_at"] is None else row["started_at"]

    # Steps -----------------------------------------------------------------------------------------------------------

    def _step(self, name: str) -> None:
        e, row, fold = self.e, self.row, self.fold
        if name == "StepsRetired":
            for step_id in [s for s in self.task.steps if e["from_step"] <= s <= e["up_to_step"]]:
                fold.drop(self.scope + keys.STEP + step_id.encode())
            row["steps_kept"] -= e["count"]
            return
        kept, begun = (self.scope + kind + e["step_id"].encode() for kind in (keys.STEP, keys.BEGUN))
        if name == "StepStarted":
            row["steps_kept"] -= kept in fold.rows
            fold.drop(kept)
            fold.put(
                begun, {"function": e["function"], "code_version": "", "args_hash": e["args_hash"], "result": None}
            )
            return
        fold.drop(begun)
        if name == "StepCompleted":
            row["steps_kept"] += kept not in fold.rows
            row |= {"steps_completed": row["steps_completed"] + 1, "crashes": 0, "sessions_lost": 0}
            fold.put(kept, slim({f: e[f] for f in ("function", "code_version", "args_hash", "result")}))

    # Ends ------------------------------------------------------------------------------------------------------------

    def _ended(self, name: str) -> None:
        """An end of a grant, or of the task."""
        e, row = self.e, self.row
        match name:
            case "TaskPaused":
                self._leave_queue()
                self._end_grant()
                self._disarm("due", keys.NOT_BEFORE)
                self._move("PAUSED", "shutdown" if e["why"] == "shutdown" else "")
                row["due"] = e["due"]
            case "AttemptLost":
                self._end_grant()
                self._move("PENDING")
                row["crashes"] += e["why"] == "crashed"
                row["sessions_lost"] += e["why"] in _LOST
            case "AttemptFailed":
                self._end_grant()
                row |= {"error": e["error"], "charged": False, "crashes": 0, "run_used": 0}
            case "RetryScheduled":
                self._move("PENDING", "retry_backoff")
                self._arm("due", e["due"])
                row["due"] = e["due"]
            case "TaskCompleted":
                self.fold.put(self.scope + keys.RESULT, slim({"result": e["result"]}))
                self._end("COMPLETED", error=None)
            case "TaskFailed":
                self._end("FAILED", error=e["error"])
            case "TaskTimedOut":
                text = f"the {e['which'].replace('_', '-')} timeout ran out"
                error = {"type": "timeout", "message": text, "error_types": ["timeout"], "traceback": ""}
                self._end("TIMED_OUT", error=error, stop_detail=e["which"])
            case "TaskCancelled":
                self._end("CANCELLED", stop_detail=e["reason"])

    def _end(self, state: str, **changes: Any) -> None:
        self._leave_queue()
        self._end_grant()
        self.row["timers"] = {}
        self._move(state)
        if state in ("COMPLETED", "CANCELLED"):
            self._arm("retain", self.fold.due(self.e, limits.RETAIN_MS))
        self.row |= {"finished_at": self.e["at"], "due": None} | changes
        if self.spec["policy"] is None:
            self.fold.policy_known(self.task)

    def _redriven(self) -> None:
        e, row = self.e, self.row
        if e["input"] is not None:
            self.spec["input"] = slim(e["input"])
            self.fold.put(self.scope + keys.SPEC, self.spec)
        if self.spec["policy"] is None:
            self.fold.wait_for_policy(self.task, e)
        row["timers"] = {}
        self._move("PENDING")
        self._arm_total()
        row |= {"attempt": 0, "charged": False, "order": e["order"], "dead_letter": False, "finished_at": None,
                "queue_used": 0, "run_used": 0, "crashes": 0, "sessions_lost": 0, "stop_detail": ""}  # fmt: skip
        self._forget_begun()

    def _retired(self) -> None:
        if self.spec["key"] is not None:
            self.fold.drop(self._idempotency_key())
        for suffix in (keys.SPEC, keys.STATE, keys.RESULT):
            self.fold.drop(self.scope + suffix)
        self._forget_begun()
        self.task.row = self.task.spec = None

    def _forget_begun(self) -> None:
        for step_id in self.task.begun:
            self.fold.drop(self.scope + keys.BEGUN + step_id.encode())

    # Parts -----------------------------------------------------------------------------------------------------------

    def _move(self, state: str, reason: str = "") -> None:
        self.row |= {"state": state, "reason": reason, "stopping": "none"}

    def _leave_queue(self) -> None:
        row = self.row
        if row["ready"]:
            used = max(0, row["queue_used"] + self.fold.now(self.e) - row["clock_since"])
            row |= {"ready": False, "queue_used": used}
        self._disarm("queue")

    def _end_grant(self) -> None:
        row = self.row
        if not row["session"]:
            return
        ran = max(0, self.fold.now(self.e) - row["clock_since"]) if row["started"] else 0
        self._disarm("run", "start")
        row |= {"session": "", "started": False, "run_used": row["run_used"] + ran, "ran": row["ran"] + ran}
        if self.e.get("usage") is not None:
            row["usage"] = self.e["usage"]

    def _arm(self, kind: str, due: int) -> None:
        self.row["timers"] = self.row["timers"] | {kind: due}

    def _disarm(self, *kinds: str) -> None:
        self.row["timers"] = {k: due for k, due in self.row["timers"].items() if k not in kinds}

    def _arm_total(self) -> None:
        total = self._policy("total_timeout")
        if total is not None:
            self._arm("total", self.fold.due(self.e, total))

    def _policy(self, name: str) -> int | None:
        """A timeout of the task's policy; while that is unknown, what the submitter has set."""
        policy = self.spec["policy"]
        found = policy[name] if policy is not None else json.loads(self.spec["overrides"] or b"{}").get(name)
        return None if found is None else int(found)

    def _idempotency_key(self) -> bytes:
        spec = self.spec
        return keys.IDEMPOTENCY + keys.text(spec["queue"]) + keys.text(spec["type"]) + keys.text(spec["key"])


def answer_key(task_id: str, command_id: str) -> bytes:
    """Key of a stored answer."""
    return keys.scope_of(task_id) + keys.ANSWER + keys.text(command_id)


def outbox_key(target: int, number: int) -> bytes:
    """Key of a record on its way to another partition."""
    return keys.OUTBOX + target.to_bytes(4, "big") + keys.number(number)


def local_id_of(queue: str, task_type: str, key: str) -> str:
    """The local id of a task that was submitted with an idempotency key and no id."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"perdure\x00{queue}\x00{task_type}\x00{key}"))


def _unbound_key(task: Task) -> bytes:
    assert task.spec is not None
    return keys.UNBOUND + keys.text(task.spec["type"]) + task.id.encode()


def slim(row: Any) -> Any:
    """A row with long values replaced by their digests: what is kept of a task does not grow with its input."""
    if isinstance(row, bytes):
        return row if len(row) <= _LONG else b"\x00" + digest(row.hex())
    if isinstance(row, dict):
        return {name: value if name == "overrides" else slim(value) for name, value in row.items()}
    return row
