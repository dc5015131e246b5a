"""Why a peer is ahead where it is ahead: what is known of it, without figures. The page takes them from here.

Keys: (workload, peer). Where a peer is ahead and nothing stands here, the page says that the reason is not known.
"""

from __future__ import annotations

_REDIS = "Redis is one small C program; Perdure brings a broker on the JVM, an engine and a server with it"
REASONS = {
    ("W2", "dbos"): "the process that submits runs the function itself: one write to the database and no other process",
    ("W2", "restate"): "its server calls the handler over a connection that is open, after one append to its own log; "
    "Perdure's submit goes through Kafka twice, as a command and as a grant, and each is fetched by another process",
    (
        "W2",
        "celery",
    ): "a worker that waits on a Redis list is handed the message at once; nothing is recorded before it runs",
    ("W2", "rq-simple"): "a worker that waits on a Redis list is handed the job at once",
    ("W2", "rq"): "a worker that waits on a Redis list is handed the job at once",
    ("W2", "dramatiq"): "one message through Redis, and nothing is recorded before it runs",
    ("W2", "littlehorse"): "one append to Kafka, after which its server hands the task over a connection that is open",
    ("W4", "restate"): "its handlers are stateless: the server tries again as soon as the new process accepts a "
    "connection; Perdure's worker first registers, and its tasks are granted anew",
    ("W4", "dbos"): "a process that starts takes over its own workflows by one query",
    ("W4", "dbos-queue"): "a process that starts takes over its own workflows by one query",
    (
        "W3",
        "temporal-local",
    ): "local activities do not go through the server one by one: they are recorded in bulk, and a "
    "crash repeats those of the workflow task under way",
    (
        "W5",
        "celery",
    ): _REDIS,
    ("W5", "rq"): _REDIS,
    ("W5", "rq-simple"): "Redis is one small C program, and the worker one process without a supervisor",
    ("W5", "dramatiq"): "Redis is one small C program, and the worker has no supervisor and no fork server",
    ("W5", "temporal"): "the server is one Go program, the worker one process without a supervisor and fork server",
    ("W5", "restate"): "the server is one Rust program, the worker one process without a supervisor and fork server",
    ("W5", "dbos-queue"): "PostgreSQL is the only server, the worker one process without a supervisor and fork server",
    ("W5", "littlehorse"): "its worker is one process of threads, without a supervisor and a fork server",
    ("S100k", "kafka-streams"): "Java runs the records' code many times faster than Python once it is compiled",
    ("S1M", "kafka-streams"): "Java runs the records' code many times faster than Python once it is compiled",
    ("S100k", "quix"): "its state of many records is written at once, with few commits",
    ("S1M", "quix"): "its state of many records is written at once, with few commits",
    ("S1M", "quix-default"): "it commits each 5 s, so that each key is written to the changelog once for many records",
}
