"""A way to a PostgreSQL server that breaks at the worst moment: a commit is done, and its answer lost."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sqlalchemy import make_url


class Cutter:
    """Passes bytes on to a server; once armed, breaks the connection that commits next."""

    def __init__(self, url: str) -> None:
        self._target = make_url(url)
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.url = self._target.set(port=port).render_as_string(hide_password=False)
        self.armed = False
        self.cuts = 0
        self._open: list[tuple[socket.socket, threading.Thread]] = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def close(self) -> None:
        """Break every connection, and take none any more."""
        with self._listener:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._accepting.join()
        for client, thread in self._open:
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
            thread.join()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection((self._target.host, self._target.port))
                thread = threading.Thread(target=self._serve, args=(client, server), daemon=True)
                thread.start()
                self._open.append((client, thread))

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        cut = threading.Event()
        with client, server:
            up = threading.Thread(target=self._to_server, args=(client, server, cut), daemon=True)
            up.start()
            self._to_client(server, client, cut)
            up.join()

    def _to_server(self, client: socket.socket, server: socket.socket, cut: threading.Event) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                if self.armed and data.startswith(b"Q") and b"COMMIT" in data:
                    self.armed = False
                    cut.set()
                server.sendall(data)
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)

    def _to_client(self, server: socket.socket, client: socket.socket, cut: threading.Event) -> None:
        with suppress(OSError):
            while data := server.recv(65536):
                if cut.is_set():  # the answer: it is committed
                    self.cuts += 1
                    break
                client.sendall(data)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)


@contextmanager
def cutting(url: str) -> Iterator[Cutter]:
    """A cutter in front of the server at an address."""
    cutter = Cutter(url)
    try:
        yield cutter
    finally:
        cutter.close()
