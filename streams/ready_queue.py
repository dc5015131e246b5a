"""Who runs next: priority, then order of submission, on the session with the most idle slots.

A queue and type have one ready scope; a session draws from the scopes of its queues and types. Limits, windows and
fairness will be asked in `_candidate`, where a scope's head is considered.
"""

from __future__ import annotations

from collections.abc import Iterator

from perdure.schemas import events, inbox, limits, references
from perdure.schemas.common import ErrorInfo, StepRecord
from perdure.schemas.rows import Session
from perdure.streams import policies, tables, task_lifecycle
from perdure.streams.decision import Moment, Outputs, Part, ToWorker, of_task
from perdure.streams.state import State

_STEP_OVERHEAD = 64
_GRANT_OVERHEAD = 4096


def next_grant(s: State, m: Moment) -> Outputs:
    """Grant one task, if one is ready and a slot is idle; yields nothing otherwise."""
    free = [w for w in s.sessions.values() if w.state == "live" and w.running < w.slots and not w.full]
    for session in sorted(free, key=lambda w: (w.running - w.slots, w.session)):
        found = _candidate(s, session)
        if found is not None:
            place, task_id, scope = found
            yield Part(task_id, _grant(s, m.following(), task_id, session), (scope, place))
            return


def _candidate(s: State, session: Session) -> tuple[bytes, str, bytes] | None:
    """Place, id and scope of the first task in any ready scope that the session serves."""
    heads = [(*head, scope) for scope in _scopes(s, session) if (head := s.first_ready(scope)) is not None]
    return min(heads) if heads else None


def _scopes(s: State, session: Session) -> Iterator[bytes]:
    """Ready scopes of the session's queues and types, as far as the types' configuration has arrived here."""
    for task_type, version in session.types.items():
        known = s.config("type/" + task_type)
        if known is None or known[0] < version:
            continue
        for queue in session.queues:
            yield tables.ready(queue, task_type)


def _grant(s: State, m: Moment, task_id: str, session: Session) -> Outputs:
    yield from policies.bind(s, m, task_id)
    t = s.known(task_id)
    begun = begun_steps(s, task_id) if t.epoch else []
    size = _carried(s, task_id, begun)
    if size > limits.INBOX_MAX:
        message = f"what a worker has to be told of the task is {size:,} bytes; at most {limits.INBOX_MAX:,} fit"
        error = ErrorInfo(type="too_large", message=message, error_types=["too_large"])
        yield from task_lifecycle.die(s, m, task_id, error, "not_retryable")
        return
    attempt = t.attempt + (0 if t.charged else 1)
    yield events.TaskGranted(
        **of_task(s, m, task_id), epoch=t.epoch + 1, attempt=attempt, worker_id=session.worker_id,
        session=session.session, grant=session.grants + 1,
    )  # fmt: skip
    yield ToWorker(_run_attempt(s, task_id, begun))
    if s.known(task_id).steps_kept:
        yield ToWorker(step_page(s, task_id, after=""))


def _carried(s: State, task_id: str, begun: list[str]) -> int:
    """Upper bound of the size of a grant's record, but for an input that is within its own limit."""
    t, spec, policy = s.known(task_id), s.spec(task_id), policies.effective(s, task_id)
    texts = [
        task_id, spec.type, *spec.labels, *spec.labels.values(), *t.milestones, *begun,
        *(policy.retry.retry_on or ()), *(policy.retry.never_on or ()), policy.code_version,
        *(() if t.checkpoint is None else (*t.checkpoint.positions, t.checkpoint.uri)),
    ]  # fmt: skip
    values = len(spec.input) + len(spec.resources or b"") + len(spec.agent_config or b"")
    return values + sum(len(text.encode()) + 10 for text in texts) + _GRANT_OVERHEAD


def _run_attempt(s: State, task_id: str, begun: list[str]) -> inbox.RunAttempt:
    t, spec = s.known(task_id), s.spec(task_id)
    policy = policies.effective(s, task_id)
    total = t.timers.get("total")
    large = references.is_reference(spec.input)
    return inbox.RunAttempt(
        worker_id=t.worker_id, session=t.session, grant=t.grant, task_id=task_id, type=spec.type,
        input=None if large else spec.input, input_ref=spec.input.decode() if large else None,
        policy=policy, attempt=t.attempt, epoch=t.epoch, checkpoint=t.checkpoint, steps_total=t.steps_kept,
        priority=spec.priority, submitted_at=spec.submitted_at,
        deadline=None if total is None else total - s.clock.offset,
        run_timeout_left=None if policy.run_timeout is None else max(1, policy.run_timeout - t.run_used),
        agent_config=spec.agent_config, milestones=t.milestones, resources=spec.resources, labels=spec.labels,
        begun_steps=begun,
    )  # fmt: skip


def begun_steps(s: State, task_id: str) -> list[str]:
    """At-most-once steps that began and never ended."""
    return [tables.step_id(suffix) for suffix, _ in s.scan(tables.task(task_id), prefix=tables.BEGUN)]


def step_page(s: State, task_id: str, after: str) -> inbox.StepPage:
    """The recorded steps behind `after`, as many as fit."""
    t = s.known(task_id)
    page: list[StepRecord] = []
    size, more = 4096, False
    for step_id, step in s.steps(task_id, after):
        assert step.result is not None, "a step without a result is a begun one"
        texts = (step_id, step.function, step.code_version, step.args_hash)
        size += sum(len(text.encode()) for text in texts) + len(step.result) + _STEP_OVERHEAD
        if page and size > limits.INBOX_MAX:
            more = True
            break
        page.append(StepRecord(
            step_id=step_id, function=step.function, code_version=step.code_version, args_hash=step.args_hash,
            result=step.result,
        ))  # fmt: skip
    return inbox.StepPage(
        worker_id=t.worker_id, session=t.session, task_id=task_id, epoch=t.epoch, after=after, steps=page, more=more
    )
