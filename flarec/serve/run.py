"""A socket, uvicorn on it, and signals: the server until somebody stops it."""

from __future__ import annotations

import contextlib
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn

from flarec.errors import UsageError

from .app import Service

GRACE = 30
"""Seconds that open requests get after a signal, before they are cancelled."""


def listening(host: str, port: int) -> socket.socket:
    """A socket bound to an address; port 0 is any free one. Raises `UsageError`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"the host {host!r} cannot be used ({error}); give an address of this machine") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise UsageError(
            f"port {port} of {host} cannot be used ({error.strerror}); give another one (--port 0: any)"
        ) from None
    return bound


def url_of(bound: socket.socket) -> str:
    """What clients call the base URL."""
    host, port = bound.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def is_loopback(bound: socket.socket) -> bool:
    """Whether nobody but this machine can reach the socket."""
    return ipaddress.ip_address(str(bound.getsockname()[0]).partition("%")[0]).is_loopback


class HttpServer(uvicorn.Server):
    """uvicorn that says when it is ready, and whose first signal ends it in order, with exit code 0 for SIGTERM.

    interrupted: Ctrl-C was what ended it
    """

    def __init__(self, service: Service, *, grace: int = GRACE, ready: Callable[[], None] = lambda: None) -> None:
        super().__init__(uvicorn.Config(
            service.app(), http="h11", ws="none", lifespan="on", log_level="warning", access_log=False,
            server_header=False, proxy_headers=False, timeout_graceful_shutdown=grace,
        ))
        self.ready = ready
        self.interrupted = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self.ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.interrupted |= sig == signal.SIGINT
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own raises the signal again in the end, and SIGTERM would end the process as if it had died."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(service: Service, bound: socket.socket, *, grace: int = GRACE, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or Ctrl-C; the latter raises `KeyboardInterrupt` in the end. ready: called once requests are
    taken."""
    server = HttpServer(service, grace=grace, ready=ready)
    server.run(sockets=[bound])
    if server.interrupted:
        raise KeyboardInterrupt
