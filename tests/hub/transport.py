"""One port of the server: it reads requests, sends answers, and causes the faults."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.repositories import Refused

if TYPE_CHECKING:
    from tests.hub.loopback import LoopbackHub, User


@dataclass
class Fault:
    """A fault for the next requests of a kind.

    Attributes:
        method: The method of the requests.
        pattern: A regular expression for their path.
        kind: `answer` answers with an error and does nothing; `hang_up` reads half of what the client sends and closes
            the connection; `lose` does what is asked and closes the connection instead of answering; `cut` sends half
            of the answer.
        times: How many requests it applies to.
        within: Text that the body must contain; only for requests that are read to their end.
        answer: The error.
        met: How many requests it has applied to.
    """

    method: str
    pattern: str
    kind: str
    times: int = 1
    within: str = ""
    answer: Refused | None = None
    met: int = 0

    def concerns(self, method: str, path: str, body: bytes | None) -> bool:
        """Whether it applies to a request; `body` is None before the body is read, which is when `hang_up` applies."""
        if self.met >= self.times or method != self.method or (body is None) != (self.kind == "hang_up"):
            return False
        return re.search(self.pattern, path) is not None and self.within.encode() in (body or b"")


@dataclass
class Answer:
    """An answer of the server."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, value: Any, status: int = 200, **headers: str) -> Answer:
        return cls(json.dumps(value).encode(), status, {"Content-Type": "application/json", **headers})


@dataclass
class Request:
    """A request of a client.

    Attributes:
        groups: The groups that the route found in the path, unquoted.
        user: The user whose token it carries.
    """

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Any
    body: bytes
    groups: dict[str, str] = field(default_factory=dict)
    user: User | None = None

    def json(self) -> Any:
        try:
            return json.loads(self.body or b"{}")
        except ValueError as error:
            raise Refused(400, f"This is not JSON: {error}") from error


Route = tuple[str, re.Pattern[str], Callable[[Request], Answer]]


def ranged(request: Request, answer: Answer) -> Answer:
    """The part of an answer that the request asks for."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
    if asked is None:
        return answer
    size = len(answer.body)
    start, end = int(asked[1]), min(int(asked[2] or size), size - 1)
    if start >= size:
        raise Refused(416, "There is nothing there", None, Content_Range=f"bytes */{size}")
    headers = answer.headers | {"Content-Range": f"bytes {start}-{end}/{size}"}
    return Answer(answer.body[start : end + 1], 206, headers)


class Server(ThreadingHTTPServer):
    """One port."""

    daemon_threads = True

    def __init__(self, hub: LoopbackHub, routes: list[Route], is_storage: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub, self.routes, self.is_storage = hub, routes, is_storage
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.connections: set[socket.socket] = set()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, *_: Any) -> None:
        """Ignore clients that close the connection, as tests make them do; other errors are this server's own."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            self.hub.trouble.append(repr(error))


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Server
    # Headers and body are two writes. Without this, the second would wait for the client to acknowledge the first.
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, *_: Any) -> None:
        """Print nothing; `LoopbackHub.requests` has the requests."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _serve(self) -> None:
        if self.server.hub.fault_for(self.command, self.path, None) is not None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            self._close(0)
            return
        body = self._read()
        fault = self.server.hub.fault_for(self.command, self.path, body)
        ordered = fault.answer if fault is not None else None
        answer = self._refusal(ordered) if ordered is not None else self._answer(body)
        if fault is not None and fault.kind == "lose":
            self._close(answer.status)
        else:
            self._send(answer, cut=fault is not None and fault.kind == "cut")

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, body: bytes) -> Answer:
        hub, split = self.server.hub, urlsplit(self.path)
        request = Request(self.command, split.path, parse_qs(split.query), self.headers, body)
        method = "GET" if self.command == "HEAD" else self.command
        with hub.lock:
            try:
                if self.server.is_storage and self.headers.get("Authorization"):
                    raise Refused(400, "Storage got the user's token, which is the Hub's alone")
                request.user = None if self.server.is_storage else hub.user_of(self.headers)
                for wanted, pattern, function in self.server.routes:
                    match = pattern.fullmatch(split.path)
                    if match and wanted == method:
                        request.groups = {k: unquote(v) for k, v in match.groupdict().items() if v is not None}
                        return function(request)
            except Refused as refused:
                return self._refusal(refused)
            except Exception as error:
                hub.trouble.append(f"{self.command} {self.path}: {error!r}")
                return self._refusal(Refused(500, f"A mistake of this server: {error!r}"))
            hub.trouble.append(f"{self.command} {self.path} is not spoken")
        return self._refusal(Refused(404, f"This server does not speak {self.command} {split.path}"))

    def _refusal(self, refused: Refused) -> Answer:
        message = str(refused)
        headers = {"X-Error-Message": message.replace("\n", " ").encode("ascii", "replace").decode(), **refused.headers}
        if refused.code is not None:
            headers["X-Error-Code"] = refused.code
        return Answer.json({"error": message}, refused.status, **headers)

    def _send(self, answer: Answer, cut: bool) -> None:
        self.server.hub.requests.append((self.command, self.path, answer.status))
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: len(answer.body) // 2] if cut else answer.body)
        if cut:
            self._close(answer.status)

    def _close(self, status: int) -> None:
        """Close the connection without an answer; `status` is the one that the client does not receive."""
        self.server.hub.requests.append((self.command, self.path, -status))
        self.close_connection = True
        with suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
