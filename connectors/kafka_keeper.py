"""A tiny process that starts the embedded broker's JVM, watches over it, and ends it when its owner ends.

Run as a script (`python -I -S kafka_keeper.py ...`), never imported: standard library only, one thread.

Why a process of its own: the kernel's "signal me when my parent dies" fires when the *thread* that forked dies, so it
is exact only below a process with one thread; and a held pipe stays open in every forked child of the owner. The keeper
watches the owner through a pidfd, which neither threads nor forks disturb, so the broker still gets a clean shutdown
when its owner is killed with SIGKILL. If the keeper itself is killed, the kernel kills the JVM.

The lock on the data folder is an open file that the keeper and the JVM inherit: it is held exactly as long as one of
them lives, whatever kills them.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys

_PR_SET_PDEATHSIG = 1
_GRACE_S = 30.0


def main(lock_fd: int, owner: int, new_archive: str, archive: str, *java: str) -> None:
    """Start `java`, print both process ids as JSON, then stay until the JVM has ended.

    owner: the process whose end ends the broker; 0 = nobody. new_archive: the class-data archive that the JVM may write
    when it exits, moved to `archive` ("" = none).
    """
    owner_fd = os.pidfd_open(owner) if owner else None
    if os.fork():
        os._exit(0)  # the owner's child; the keeper itself is nobody's child, so it leaves the owner no zombie
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    jvm = _start(java, lock_fd)
    who = {"pid": jvm.pid, "keeper": os.getpid()}
    _note(lock_fd, who)
    print(json.dumps(who), flush=True)
    os.dup2(2, 1)  # whoever reads our answer sees its end

    watched = select.poll()
    for fd in (os.pidfd_open(jvm.pid), woken, owner_fd):
        if fd is not None:
            watched.register(fd, select.POLLIN)
    watched.poll()
    _note(lock_fd, who | {"stopping": True})
    if jvm.poll() is None:
        jvm.terminate()
        try:
            jvm.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            jvm.kill()
            jvm.wait()
    if archive:
        _keep_archive(new_archive, archive, usable=jvm.returncode in (0, 128 + signal.SIGTERM))


def _start(java: tuple[str, ...], lock_fd: int) -> subprocess.Popen[bytes]:
    libc = ctypes.CDLL(None, use_errno=True)
    keeper = os.getpid()

    def die_with_keeper() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:
            os._exit(1)

    return subprocess.Popen(java, stdin=subprocess.DEVNULL, stdout=2, pass_fds=(lock_fd,), preexec_fn=die_with_keeper)


def _note(lock_fd: int, facts: dict[str, int]) -> None:
    """Write who holds the lock into the locked file, padded: a reader never sees half of an old note."""
    os.pwrite(lock_fd, json.dumps(facts).ljust(100).encode(), 0)


def _keep_archive(new_archive: str, archive: str, *, usable: bool) -> None:
    """Put the archive in place by a rename; a cache that cannot be written costs start-up time only."""
    try:
        if usable:
            partial = f"{archive}.{os.getpid()}"
            shutil.copyfile(new_archive, partial)
            os.replace(partial, archive)
        os.unlink(new_archive)
    except OSError as error:
        print(f"no class-data archive kept: {error}", file=sys.stderr)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
