"""Why a peer is ahead where it is ahead: what is known of it, without figures. The page takes them from here.

Where a peer is ahead and nothing stands here, the page says that the reason is not known.
"""

from __future__ import annotations

from benchmarks.peers.results import Figure

_ANY = "*"
_LIST = "a worker that waits on a Redis list is handed the message at once; nothing is recorded before it runs"
_OWN = (
    "a process that starts takes its own workflows over by one query; Perdure's worker registers first, and its tasks "
    "are granted anew"
)
_PUSHED = (
    "its server calls the worker over a connection that is open; Perdure's submit goes through Kafka twice, as a "
    "command and as a grant, and each is fetched by another process"
)
_REDIS = "Redis is one small C program; Perdure brings a broker on the JVM, an engine and a server with projections"
_ONE = "one server program; Perdure has a broker on the JVM, an engine and a server with projections"
_COMPILED = "Java runs the code for a record many times faster than Python once it is compiled"

_REASONS = {
    ("W2", "dbos"): "the process that submits runs the function itself: one write to the database",
    ("W2", "dbos-queue"): "one write to the database, one read by the worker's poll",
    ("W2", "restate"): _PUSHED,
    ("W2", "littlehorse"): _PUSHED,
    ("W2", "celery"): _LIST,
    ("W2", "rq"): _LIST,
    ("W2", "rq-simple"): _LIST,
    ("W2", "dramatiq"): _LIST,
    ("W3", "temporal-local"): "local activities are recorded in bulk with their workflow task; a crash repeats them",
    ("W4", "restate"): "its handlers keep no state: the server tries again as soon as the new process listens",
    ("W4", "dbos-queue"): _OWN,
    ("worker_pss_mb", _ANY): "its worker has no supervisor, no fork server and no children that wait ready",
    ("server_pss_mb", "celery"): _REDIS,
    ("server_pss_mb", "rq"): _REDIS,
    ("server_pss_mb", "rq-simple"): _REDIS,
    ("server_pss_mb", "dramatiq"): _REDIS,
    ("server_pss_mb", _ANY): _ONE,
    ("idle_cpu_percent", _ANY): "fewer processes that beat, tick and fetch while nothing is to be done",
    ("S100k", "kafka-streams"): _COMPILED,
    ("S1M", "kafka-streams"): _COMPILED,
    ("S1M", "quix-default"): "it commits so seldom that each key is written to the changelog once for many records",
}


def reason(figure: Figure, peer: str) -> str:
    """Why the peer is ahead in a figure."""
    keys = ((figure.key, peer), (figure.workload, peer), (figure.key, _ANY))
    return next((_REASONS[key] for key in keys if key in _REASONS), "why is not known")
