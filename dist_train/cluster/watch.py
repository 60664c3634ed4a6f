"""Ends a job whose rank died, fell silent or hangs, with one line that names the rank and its host.

Collectives alone cannot: one that waits for a lost host waits, and one that fails names no rank. So rank 0 listens on a
port of its own, each other rank holds a connection to it, and both sides say something every few seconds from a thread.
A connection that ends without a farewell is a rank that died; one without a word for `timeout_s` a host that is lost or
a process that is stopped; a rank that takes no part in a collective while the others wait in vain hangs.

The same thread sees to it that no process stays behind: where the launcher (any of its processes) or the connection to
it is gone, the process asks itself to stop as if by SIGTERM.
"""

from __future__ import annotations

import logging
import os
import secrets
import select
import selectors
import signal
import socket
import stat
import sys
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from dist_train.errors import WorkError, name_some
from dist_train.launcher import noted_launcher
from dist_train.place import Place

log = logging.getLogger(__name__)

_GRACE = 5.0  # seconds for an error of a rank's own to be printed, and for all that wait in vain to say so
_GREETING_S = 20.0  # seconds for who has connected to say who it is
_BEAT, _BYE, _COMPLAINT, _END = "beat", "bye", "complaint", "end"


@dataclass
class _Peer:
    """The other end of a connection. complaint: what its collective failed of."""

    rank: int
    host: str
    connection: socket.socket
    heard: float = field(default_factory=time.monotonic)
    unread: bytes = b""
    complaint: str = ""
    left: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"

    def say(self, word: str, text: str = "") -> None:
        try:
            self.connection.sendall(f"{word} {text}\n".encode())
        except OSError:
            pass  # reading will tell

    def listen(self) -> list[tuple[str, str]] | None:
        """The (word, text) lines that have come; None where the connection has ended."""
        try:
            received = self.connection.recv(4096)
        except OSError:
            received = b""
        if not received:
            return None
        self.heard = time.monotonic()
        *lines, self.unread = (self.unread + received).split(b"\n")
        words = [line.decode(errors="replace").partition(" ") for line in lines]
        return [(word, text) for word, _, text in words]


class Watch:
    """Watches the job from a thread of its own while its block runs. All ranks make one together.

    timeout_s: seconds without a sign of life after which a rank counts as lost. Raises WorkError where the ranks cannot
    reach rank 0.
    """

    def __init__(self, place: Place, timeout_s: float) -> None:
        self.place, self.timeout = place, timeout_s
        self._interval = min(5.0, timeout_s / 10)
        self._host = socket.gethostname()
        self._parent, self._launcher = os.getppid(), noted_launcher()
        self._closing = threading.Event()
        self._ending = threading.Lock()
        self._complaint = ""  # what a collective of this rank failed of
        self._first_complaint: float | None = None
        self._stop_asked: float | None = None
        self._peers: list[_Peer] = []
        self._selector = selectors.DefaultSelector()
        if place.world_size > 1:
            self._connect()
        if place.world_size > 1 or self._launcher is not None:
            threading.Thread(target=self._run, name="watch", daemon=True).start()

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._closing.set()
            for peer in self._peers:
                peer.say(_BYE)
        elif isinstance(error, Exception) and self.place.world_size > 1 and _of_a_collective(error):
            self._complain(" ".join(str(error).split())[:300])

    def _complain(self, complaint: str) -> None:
        """A collective has failed: wait for the thread to end this process, once it knows which rank is to blame."""
        for peer in self._peers:
            peer.say(_COMPLAINT, complaint)
        self._complaint = complaint
        time.sleep(self.timeout + 3 * _GRACE)

    # ------------------------------------------------------------------ connections
    def _connect(self) -> None:
        """Rank 0 listens; the others connect to it, with a password that comes through the process group."""
        if self.place.rank == 0:
            listener = socket.create_server(("", 0), backlog=self.place.world_size)
            meeting: list[Any] = [(listener.getsockname()[1], secrets.token_hex(16), self._host)]
            torch.distributed.broadcast_object_list(meeting, 0)
            self._accept_all(listener, password=meeting[0][1])
            return
        meeting = [None]
        torch.distributed.broadcast_object_list(meeting, 0)
        port, password, host = meeting[0]
        try:
            connection = socket.create_connection((os.environ["MASTER_ADDR"], port), self.timeout)
            connection.sendall(f"{password} {self.place.rank} {self._host}\n".encode())
        except OSError as error:
            raise WorkError(
                f"{self._host} cannot connect to rank 0 at {os.environ['MASTER_ADDR']} port {port} ({error}); "
                "let the hosts reach each other on all ports"
            ) from None
        self._add(_Peer(0, host, connection))

    def _accept_all(self, listener: socket.socket, password: str) -> None:
        listener.settimeout(self.timeout)
        while len(self._peers) < self.place.world_size - 1:
            try:
                connection, _ = listener.accept()
            except OSError:
                missing = set(range(1, self.place.world_size)) - {peer.rank for peer in self._peers}
                raise WorkError(
                    f"ranks {sorted(missing)} did not connect to {self._host} port {listener.getsockname()[1]} within "
                    f"{self.timeout:g} s; let the hosts reach each other on all ports"
                ) from None
            connection.settimeout(min(self.timeout, _GREETING_S))
            try:
                greeting = connection.makefile("rb").readline(400).split()
            except OSError:
                greeting = []
            if len(greeting) == 3 and secrets.compare_digest(greeting[0], password.encode()):
                connection.settimeout(self.timeout)
                self._add(_Peer(int(greeting[1]), greeting[2].decode(), connection))
            else:
                connection.close()  # somebody else's
        listener.close()

    def _add(self, peer: _Peer) -> None:
        self._peers.append(peer)
        self._selector.register(peer.connection, selectors.EVENT_READ, peer)

    # ------------------------------------------------------------------ the thread
    def _run(self) -> None:
        beat_due = 0.0
        while not self._closing.is_set():
            if time.monotonic() >= beat_due:
                beat_due = time.monotonic() + self._interval
                for peer in self._peers:
                    peer.say(_BEAT)
            self._check_launcher()
            for key, _ in self._selector.select(min(self._interval, 1.0)):
                self._hear(key.data)
            self._check_silence()
            self._check_complaints()

    def _hear(self, peer: _Peer) -> None:
        lines = peer.listen()
        if lines is None:
            self._selector.unregister(peer.connection)
            self._peers.remove(peer)
            if not peer.left:
                self._end(f"{peer} has died, or ended by an error that it names itself", _GRACE)
        for word, text in lines or ():
            if word == _BYE:
                peer.left = True
            elif word == _COMPLAINT:
                peer.complaint = text
            elif word == _END:
                self._end(text, _GRACE, told=True)

    def _check_silence(self) -> None:
        silent = [str(p) for p in self._peers if not p.left and time.monotonic() - p.heard > self.timeout]
        if silent:
            self._end(
                f"no sign of life for {self.timeout:g} s (train.timeout_s) from {name_some(silent, 8)}: "
                "the host or the network is down, or the process is stopped"
            )

    def _check_complaints(self) -> None:
        """Of ranks that live, those hang that do not complain while others do. Rank 0 hears of all complaints."""
        if self.place.rank != 0 or not (self._complaint or any(peer.complaint for peer in self._peers)):
            return
        self._first_complaint = self._first_complaint or time.monotonic()
        if time.monotonic() - self._first_complaint < _GRACE:
            return
        own = _Peer(0, self._host, socket.socket(), complaint=self._complaint)
        ranks = [own, *self._peers]
        hanging = [str(peer) for peer in ranks if not peer.complaint]
        why = next(peer.complaint for peer in ranks if peer.complaint)
        self._end(
            f"{name_some(hanging, 8)} took no part in what all ranks do together: it hangs"
            if hanging
            else f"the ranks cannot talk to each other any more: {why}"
        )

    def _check_launcher(self) -> None:
        """Where nobody would end this process or read what it says, ask for the end of the run as SIGTERM does."""
        if self._stop_asked is not None:
            if time.monotonic() - self._stop_asked > self.timeout:
                os._exit(1)
        elif (
            os.getppid() != self._parent
            or (self._launcher is not None and self._launcher.is_gone())
            or (sys.__stderr__ is not None and _nobody_reads(sys.__stderr__.fileno()))
        ):
            self._stop_asked = time.monotonic()
            log.warning("rank %d on %s: its launcher is gone; stopping", self.place.rank, self._host)
            os.kill(os.getpid(), signal.SIGTERM)

    def _end(self, reason: str, grace: float = 0.0, told: bool = False) -> None:
        """Tell the other ranks why the job ends, say it, and end this process, whatever its main thread waits for.

        grace: seconds for the main thread to end by an error that says more. told: rank 0 has said it already.
        """
        for peer in self._peers:
            peer.say(_END, reason)
        if grace and not self._complaint:
            self._closing.wait(grace)
        if not told and os.environ.get("LOCAL_RANK", "0") == "0":
            log.error("error (noticed by rank %d on %s): %s", self.place.rank, self._host, reason)
        os._exit(1)


def _of_a_collective(error: Exception) -> bool:
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()


def _nobody_reads(descriptor: int) -> bool:
    """Whether the other end of a pipe or socket is closed; False for files and terminals."""
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        return False
    poll = select.poll()
    poll.register(descriptor, 0)  # errors and hang-ups are reported unasked
    return bool(poll.poll(0))
