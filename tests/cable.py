"""A cable to a server that can be cut: at once, in the middle of an answer, or so that it hangs.

Hundreds of outages cost little that way. An answer that is cut off after the server has done what it was asked for is
the case that nobody can tell from a request that never arrived.
"""

import socket
from contextlib import suppress
from threading import Lock, Thread

_CHUNK = 65536


class Cable:
    """Forwards TCP connections from a port of its own to another one of this machine."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.cuts = 0
        """How often it has been cut so far."""
        self._lock = Lock()
        self._ends: set[socket.socket] = set()
        self._whole, self._hanging = True, False
        self._left: int | None = None
        """Bytes of answers that pass until it is cut."""
        Thread(target=self._accept, daemon=True).start()

    @property
    def whole(self) -> bool:
        """Whether it is not cut."""
        return self._whole

    def cut(self) -> None:
        """End every connection, and refuse new ones."""
        with self._lock:
            self.cuts += self._whole
            self._whole, self._left = False, None
            for end in self._ends:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def cut_after(self, n_bytes: int) -> None:
        """Cut it as soon as so many more bytes of answers have passed; the server has then carried out the request."""
        with self._lock:
            self._left = n_bytes

    def hang(self) -> None:
        """Accept connections and requests from now, and pass on nothing."""
        self.cut()
        with self._lock:
            self._whole, self._hanging = True, True

    def mend(self) -> None:
        """Pass everything on again."""
        with self._lock:
            hung, self._hanging = self._hanging, False
        if hung:
            self.cut()
        with self._lock:
            self._whole, self._left = True, None

    def close(self) -> None:
        """Give back its port."""
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                Thread(target=self._connect, args=(near,), daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        with near, suppress(OSError):
            if not self._whole:
                return
            far = near.dup() if self._hanging else socket.create_connection(("127.0.0.1", self._target))
            with far:
                with self._lock:
                    self._ends |= {near, far}
                if self._hanging:
                    while near.recv(_CHUNK):
                        pass
                else:
                    there = Thread(target=self._pass_on, args=(near, far), daemon=True)
                    there.start()
                    self._pass_on(far, near, answers=True)
                    there.join()
                with self._lock:
                    self._ends -= {near, far}

    def _pass_on(self, source: socket.socket, target: socket.socket, *, answers: bool = False) -> None:
        with suppress(OSError):
            while data := source.recv(_CHUNK):
                if answers and self._left is not None and len(data) > self._left:
                    target.sendall(data[: self._left])
                    self.cut()
                    break
                if answers and self._left is not None:
                    self._left -= len(data)
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
