"""Every maximum and every standing interval, in one place. Sizes in bytes, times in ms."""

from __future__ import annotations

# Records
RECORD_MAX = 512 * 1024
"""A record on task-commands."""
COMMAND_MAX = 448 * 1024
"""A command: leaves room for the envelope when it is forwarded."""
VALUE_MAX = 192 * 1024
"""An input, step result or result inside a record; a larger one lies in the store of large values."""
LARGE_VALUE_MAX = 64 * 1024 * 1024
"""An input, step result or result in the store of large values."""
REFERENCE_MAX = 2048
PREVIEW_MAX = 200
"""Characters of a large value that its reference repeats."""
UNCLAIMED_DAYS = 1
"""How long a large value may lie in the store before the record that refers to it is written."""
INBOX_MAX = 256 * 1024
"""A grant or a page of steps."""
OUTPUT_MAX = 1_000_000
"""Any record that the engine writes; below the topics' max.message.bytes of 1 MiB with room for framing."""
QUARANTINE_KEPT = 64 * 1024
"""Bytes of a bad record that the quarantine keeps."""
TOPIC_RECORD_MAX = 1_048_576
"""max.message.bytes of every topic: a batch as any producer makes it by default (1,000,000 bytes) has to fit."""
FRAMING = 128
"""What Kafka adds to a record that is alone in its batch, rounded up."""
LINE_MAX = 64 * 1024
"""A log line."""
TRACEBACK_MAX = 16 * 1024
MESSAGE_MAX = 8 * 1024
TEXT_MAX = 1024
"""A label, reason, step name or other short text."""
LABELS_MAX = 64
ATTEMPTS_MAX = 1_000_000
LOCAL_ID_MAX = 512
"""A local task id, UTF-8."""
ROUTING_KEY_MAX = 128
STEP_ID_MAX = 1024
BATCH_TASKS_MAX = 100
POSITIONS_MAX = 256
"""Tracks open at the same time in one checkpoint."""
MILESTONES_MAX = 1_000
MILESTONES_BYTES = POSITIONS_BYTES = 12 * 1024
"""Of the names of a task's milestones; of the paths of a checkpoint's tracks (9 more for each) and its URI: every later
grant carries them."""
FIND_PREFIX_MIN = 8
FIND_IDS_MAX = 100

# Decoding
DEPTH_MAX = 64
"""Nesting of JSON and of Avro values."""

# Engine
BATCH_RECORDS = 1_000
"""Records in a transaction. Where they are quick to execute, more: what a transaction costs is shared by all in it."""
BATCH_RECORDS_QUICK = 10_000
BATCH_CPU_MS = 50
"""So much time to execute the records of a transaction is little beside what its commit takes under load."""
BATCH_BYTES = 8 * 1024 * 1024
DECISION_KEYS = 1_000
CHUNK = 150
"""Tasks that one decision changes when it works through many."""
TICK_TIMERS = 500
PUT_OFF_MS = 10 * 60_000
"""How long ticks and grants leave out what one of them has failed at."""
STEPS_CHUNK = 500

# Time
TIME_MAX = 1 << 62
"""Any time or span that is kept, ms: what a record from outside says may be anything."""
BEAT_MS = 2_000
LEASE_MS = 10_000
START_DEADLINE_MS = 60_000
CLOCK_AGREES_MS = 30_000
"""A tick whose log time and host clock differ by more fires nothing; a forward jump of more needs confirmation."""
CLOCK_BACK_MS = 1_000
"""Backward steps of the log's clock up to this are waited out."""
TICK_SPACING_MS = 50
WAITER_MAX_MS = 60_000
RETAIN_MS = 7 * 24 * 3600 * 1000
"""How long the engine knows an ended task and its answers, at least 24 h; dead letters stay until discarded."""
FORWARD_RESEND_MS = 5_000
ORPHAN_AFTER_MS = 600_000
CHECKPOINT_INTERVAL_MAX = 300_000
"""Between checkpoints of a type that says nothing of its own."""
VERDICT_MS = 5_000
"""How long a client waits for the engine's verdict."""

# Caps of the crash rules
CRASHES_MAX = 5
SESSIONS_LOST_MAX = 20
KILLER_DEATHS = 3
"""Times a record may kill the engine before it is quarantined unread."""

DEFAULT_PARTITIONS = 8
DEFAULT_QUEUE = "default"
PRIORITY_MAX = 9
DEFAULT_PRIORITY = 5
