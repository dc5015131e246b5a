"""What others may append to the topics: records that are broken, forged, old or odd, and configuration that changes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from perdure.schemas import codec, commands, inbox, reports, topics
from perdure.schemas.signing import signed
from tests.simulation.workers import TYPES
from tests.world import CLIENT, HOUR, KEYS, SECOND, completed, step

if TYPE_CHECKING:
    from tests.simulation.simulator import Simulator

WRONG_KEY = b"x" * 32


def attack(sim: Simulator) -> None:
    """One hostile record."""
    partition = sim.draw.randrange(sim.world.partitions)
    sim.append(sim.draw.choice(ATTACKS)(sim, partition), partition)


def _noise(sim: Simulator, partition: int) -> bytes | None:
    odd = codec.encode(inbox.EndSession(worker_id="", session="", why=""))
    return sim.draw.choice((None, b"", b"noise", b"{}", b"{", b'{"command": "Tick"}', odd, b"\xc3\x01" + bytes(9)))


def _damaged(sim: Simulator, partition: int) -> bytes | None:
    """A record that was sent before, with a byte changed or its end cut off."""
    data = bytearray(_earlier(sim, partition) or b"\x00")
    at = sim.draw.randrange(len(data))
    if sim.draw.random() < 0.5:
        return bytes(data[:at])
    data[at] ^= 1 << sim.draw.randrange(8)
    # Commands are not signed: one that still can be read is a command like any other, and may do what nobody planned.
    is_command = not isinstance(_decoded(bytes(data)), commands.SubmitTask | commands.Control | commands.SubmitBatch)
    return bytes(data) if is_command else b"noise"


def _decoded(data: bytes) -> Any:
    try:
        return codec.decode(data)
    except codec.DecodeError:
        return None


def _earlier(sim: Simulator, partition: int) -> bytes | None:
    """Any record that was sent before, once more."""
    end = sim.log.end(topics.COMMANDS.name, partition)
    records, _ = sim.log.since(topics.COMMANDS.name, partition, sim.draw.randrange(end) if end else 0)
    return records[0].value if records else b"noise"


def _forged_report(sim: Simulator, partition: int) -> bytes | None:
    """A report without the right key, token, epoch or session."""
    running = [a for a in sim.running() if a.session.partition == partition]
    if not running:
        return b"noise"
    attempt = sim.draw.choice(running)
    grant, how = attempt.grant, sim.draw.choice(("key", "token", "epoch", "session"))
    said = sim.draw.choice((completed("forged"), step("items@000000000000/work", b'"forged"')))
    entry = reports.ReportEntry(
        task_id=grant.task_id, epoch=grant.epoch + (how == "epoch"), token=b"t" * 32 if how == "token" else grant.token,
        reports=[codec.replace(said, seq=attempt.seq + 1)],
    )  # fmt: skip
    batch = reports.ReportBatch(session="s999999" if how == "session" else grant.session, entries=[entry])
    return signed(batch, "w1", WRONG_KEY if how == "key" else KEYS.worker["w1"])


def _forged_host(sim: Simulator, partition: int) -> bytes | None:
    """What only hosts may say, without their key."""
    cancel = [codec.encode(commands.CancelTask(command_id="forged", task_id=task_id)) for task_id in sim.plans]
    record = sim.draw.choice((
        commands.ApplyConfig(name="type/job", version=1 << 40, content=None),
        commands.Forwarded(source=0, target=partition, number=1 + sim.draw.randrange(5), record=cancel[0]),
        commands.ForwardedAck(source=partition, target=sim.draw.randrange(sim.world.partitions), up_to=1 << 40),
        commands.WorkerBeat(session="s000001", grants_seen=1 << 40, free=1),
    ))  # fmt: skip
    return signed(record, "e1", WRONG_KEY)


def _bare(sim: Simulator, partition: int) -> bytes | None:
    """Records that mean something only inside of others, and are not signed."""
    return codec.encode(commands.LookUp(record=b"", left=[0]))


def _tick(sim: Simulator, partition: int) -> bytes | None:
    """At the true time, or at one that disagrees with the broker's; a lie that agrees would be believed."""
    off = sim.draw.choice((0, 40 * SECOND)) if sim.world.skew == 0 else 40 * SECOND
    due = sim.now + sim.draw.choice((0, -HOUR, HOUR))
    return codec.encode(commands.Tick(due=due, host_clock=sim.now - off))


ATTACKS = (_noise, _damaged, _earlier, _forged_report, _forged_host, _bare, _tick)


def submit(sim: Simulator) -> None:
    """Submits of all shapes: JSON, batches, keys, ids without a routing key, refused ones, and questions."""
    n = sim.draw.randrange(4)
    queue = sim.draw.choice((None, *sim.queues))
    partition = sim.draw.randrange(sim.world.partitions)
    match sim.draw.randrange(4):
        case 0:
            content = {"command": "SubmitTask", "type": sim.draw.choice(("once", "job", "nobody")), "queue": queue,
                       "input": n % 2, "key": sim.draw.choice((None, "k1", "k2")), "reply_to": CLIENT,
                       "task_id": sim.draw.choice((None, f"extra-{n}", f"default/extra-{n}"))}  # fmt: skip
            sim.append(json.dumps({k: v for k, v in content.items() if v is not None}).encode(), partition)
        case 1:
            tasks = [
                commands.SubmitTask(command_id="", task_id=f"{q}/extra-{n}", type="once", queue=q) for q in sim.queues
            ]
            batch = commands.SubmitBatch(command_id=f"batch-{n}", tasks=tasks, reply_to=CLIENT)
            sim.append(codec.encode(batch), partition)
        case 2:
            kind = sim.draw.choice((commands.PauseTask, commands.CancelTask, commands.ResumeTask, commands.RetryTask))
            task_id = sim.draw.choice((f"extra-{n}", f"default/extra-{n}", "default/none"))
            record = kind(command_id=f"{kind.__name__}-{n}", task_id=task_id, reply_to=CLIENT)
            sim.append(codec.encode(record), partition)
        case _:
            find = commands.FindTasks(command_id=f"f{next(sim.numbers)}", prefix="default/extra", reply_to=CLIENT)
            sim.append(codec.encode(find), partition)


def configure(sim: Simulator) -> None:
    """A new version of a type, a type that is gone, a queue that comes and goes."""
    name = sim.draw.choice(list(TYPES))
    match sim.draw.randrange(4):
        case 0:
            policy = TYPES[name] | {"cancel_grace": sim.draw.choice((5, 1_000))}
            sim.versions[name] = sim.world.configure_type(name, policy)
        case 1:
            sim.world.producer.append("config", 0, f"type/{name}".encode(), None)
        case 2:
            sim.world.configure("queue/other", {"routing_keys": ["other"]})
        case _:
            sim.world.producer.append("config", 0, b"queue/other", None)
    sim.wake_all()


def configure_all(sim: Simulator) -> None:
    """Every type as it has to be in the end."""
    if "configuration" in sim.faults:
        for name, policy in TYPES.items():
            sim.versions[name] = sim.world.configure_type(name, policy)
