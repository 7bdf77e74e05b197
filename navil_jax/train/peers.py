"""Peers: when a process of a run dies, the others say which one in a line and end, in the place of waiting for it."""

import atexit
import contextlib
import os
import secrets
import socket
import sys
import threading
import time
from types import TracebackType

import jax
import numpy as np
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

from navil_jax.errors import explain, status_of
from navil_jax.train.checksums import DamagedCheckpoint

CONNECT_SECONDS = 10.0  # for all processes to find the first one
GRACE_SECONDS = 10.0  # for the others to fail alike, after one has failed
HEAR_SECONDS = 2.0  # for the end of a connection to be heard, after what a process computed with another has failed
LEAVE_SECONDS = 5.0  # for the others to leave before the first one
SILENT_SECONDS = 25  # after which a host that answers nothing counts as dead


class Peers:
    """Watches over the processes of a run, from `with` to its end; of one process it does nothing.

    Each process keeps a connection to the first one, which passes on what it hears. The system closes a connection when
    its process ends, however it ends: one that has not said that it leaves has died. Then this process prints a line
    and ends with status 1. Of one that leaves with an error the others wait `GRACE_SECONDS` for an error of their own.
    """

    def __init__(self, again: str = "the same command goes on from the newest checkpoint") -> None:
        """Args: again: what to do then."""
        self._again = again
        self._number, self._count = jax.process_index(), jax.process_count()
        self._connections: dict[int, socket.socket] = {}  # of the first process: all others; of these: the first
        self._left: dict[int, str] = {}  # processes no longer in the run: over, failed, died, or gone because of those
        self._closed: set[int] = set()  # of the connections
        self._changed = threading.Condition()
        self._over = False

    def __enter__(self) -> "Peers":
        if self._count > 1:
            listener = socket.create_server(("", 0)) if self._number == 0 else None
            port = listener.getsockname()[1] if listener else 0
            own = np.array([port, *secrets.token_bytes(16)], np.int32)
            first, *token = np.asarray(multihost_utils.broadcast_one_to_all(own)).tolist()
            try:
                if listener:
                    self._accept(listener, bytes(token))
                else:
                    self._connect(first, bytes(token))
            except OSError as error:
                rest = "if one dies, the rest may wait for it for minutes; let them reach the first one at any port"
                print(f"process {self._number} cannot watch over the others ({error}): {rest}", flush=True)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error and self._connections and not explain(error):
            time.sleep(HEAR_SECONDS)  # where the cause is another's death, the thread that listens says so and ends
        with self._changed:
            self._over = True
        self._tell(f"{'failed' if error else 'over'} {self._number}")
        if error and self._connections:
            alone = not self._all_leave()
            status = 1 if isinstance(error, DamagedCheckpoint) or not explain(error) else status_of(error)
            # A write that hangs, or waits for the others, would keep this process.
            leaving = threading.Timer(LEAVE_SECONDS, os._exit, (status,))
            leaving.daemon = True
            leaving.start()
            if alone:  # JAX would wait for the others, and abort.
                atexit.register(os._exit, status)

    def _accept(self, listener: socket.socket, token: bytes) -> None:
        with listener:
            listener.settimeout(CONNECT_SECONDS)
            while len(self._connections) < self._count - 1:
                connection, _ = listener.accept()
                connection.settimeout(CONNECT_SECONDS)
                said = connection.recv(len(token) + 4, socket.MSG_WAITALL)
                if said[: len(token)] == token:
                    self._watch(int.from_bytes(said[len(token) :], "big"), connection)

    def _connect(self, port: int, token: bytes) -> None:
        host = (global_state.coordinator_address or "").rpartition(":")[0].strip("[]")
        connection = socket.create_connection((host, port), CONNECT_SECONDS)
        connection.sendall(token + self._number.to_bytes(4, "big"))
        self._watch(0, connection)

    def _watch(self, number: int, connection: socket.socket) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", SILENT_SECONDS - 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._connections[number] = connection
        threading.Thread(target=self._listen, args=(number, connection), daemon=True, name="peer-watch").start()

    def _listen(self, number: int, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection.makefile() as lines:
            for line in lines:
                what, who = line.split()
                self._note(int(who), what)
        with self._changed:
            self._closed.add(number)
            self._changed.notify_all()
        if number not in self._left:
            self._note(number, "died")

    def _note(self, number: int, what: str) -> None:
        with self._changed:
            self._left[number] = what
            self._changed.notify_all()
        if self._number == 0:
            self._tell(f"{what} {number}", besides=number)
        if what == "died":
            self._end(f"process {number} of {self._count} has died (killed, out of memory or a crash)")
        elif what == "failed":
            why = f"process {number} of {self._count} has failed, as its output says"
            timer = threading.Timer(GRACE_SECONDS, self._end, (why,))
            timer.daemon = True
            timer.start()

    def _end(self, why: str) -> None:
        with self._changed:
            if not self._over:
                print(f"error: {why}; process {self._number} ends too, {self._again}", file=sys.stderr, flush=True)
                self._over = True
                self._tell(f"gone {self._number}")
                if self._number == 0:  # JAX aborts processes that outlive the first one
                    self._changed.wait_for(lambda: set(self._connections) <= self._closed, LEAVE_SECONDS)
                os._exit(1)

    def _tell(self, line: str, besides: int = -1) -> None:
        for number, connection in list(self._connections.items()):
            if number != besides:
                with contextlib.suppress(OSError):
                    connection.sendall(f"{line}\n".encode())

    def _all_leave(self) -> bool:
        """Whether all the others leave by themselves too, once that is known."""
        with self._changed:
            others = set(range(self._count)) - {self._number}
            self._changed.wait_for(lambda: others <= set(self._left), 2 * GRACE_SECONDS)
            return others <= set(self._left) and set(self._left.values()) <= {"over", "failed"}
