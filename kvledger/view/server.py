"""The server behind the page: this machine only, a secret in the address, and nothing that it could change.

A web page from elsewhere must not be able to read a log through the user's browser. So a request has to name the secret
(in its path), this machine (``Host``: a foreign name that resolves to it does not do), and may not be made by another
page (``Sec-Fetch-Site``; to follow a link that stands there is fine). The answers allow no foreign origin and no
foreign script.
"""

from __future__ import annotations

import hmac
import json
import secrets
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from ipc import LedgerError
from kvledger.debugger import SourceError
from kvledger.text import printable
from kvledger.view.assets import SCRIPTS, SERVED_POLICY, STYLES, asset, served_page
from kvledger.view.log import Log
from statemachine.errors import InvariantViolation

HOST = "127.0.0.1"
_MOST_BUCKETS = 4000
_HEADERS = {
    "Content-Security-Policy": SERVED_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "json": "application/json"}


class BadQuestion(ValueError):
    """The page asks for something that does not make sense."""


class ViewServer(ThreadingHTTPServer):
    """Serves one log to one user; ``serve_forever`` does the work, ``shutdown`` and ``server_close`` end it.

    Args:
        port: 0 takes any free one.

    Raises:
        OSError: the port is taken, or not ours to take.
    """

    daemon_threads = True
    allow_reuse_address = True  # a connection that is still closing does not keep the port

    def __init__(self, log: Log, port: int = 0) -> None:
        self.log = log
        self.lock = threading.Lock()
        """Held while the log is asked: it answers one question at a time."""
        self.secret = secrets.token_urlsafe(24)
        super().__init__((HOST, port), _Handler)

    @property
    def url(self) -> str:
        """The page's address, with its secret."""
        return f"http://{HOST}:{self.server_address[1]}/{self.secret}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of an answer is nobody's error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "kvledger"
    sys_version = ""
    timeout = 60
    server: ViewServer

    def do_GET(self) -> None:
        port = self.server.server_address[1]
        if self.headers.get("Host") not in (f"{HOST}:{port}", f"localhost:{port}"):
            return self._error(HTTPStatus.FORBIDDEN, "this page is for this machine only")
        followed = self.headers.get("Sec-Fetch-Dest") == "document"  # a link that the user clicked
        if not followed and self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            return self._error(HTTPStatus.FORBIDDEN, "another page may not ask")
        address = urlsplit(self.path)
        secret, _, name = address.path.lstrip("/").partition("/")
        if not hmac.compare_digest(secret.encode(), self.server.secret.encode()):
            return self._error(HTTPStatus.NOT_FOUND, "not found: use the whole address that kvledger view printed")
        if not name:
            return self._answer("html", served_page().encode())
        if name in SCRIPTS or name in STYLES:
            return self._answer(name.rpartition(".")[2], asset(name).encode())
        ask = _QUESTIONS.get(name)
        if ask is None:
            return self._error(HTTPStatus.NOT_FOUND, "not found")
        try:
            query = dict(parse_qsl(address.query, max_num_fields=10))
            with self.server.lock:
                answer = ask(self.server.log, query)
        except (BadQuestion, ValueError) as error:
            known = isinstance(error, BadQuestion | SourceError)
            return self._error(HTTPStatus.BAD_REQUEST, str(error) if known else "a question that makes no sense")
        except (LedgerError, InvariantViolation) as error:
            return self._error(HTTPStatus.CONFLICT, str(error))
        return self._answer("json", answer)

    def _answer(self, kind: str, body: bytes, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{_TYPES[kind]}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _error(self, status: HTTPStatus, text: str) -> None:
        self._answer("json", json.dumps({"error": printable(text)}).encode(), status)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: the address holds the secret."""


def _summary(log: Log, query: dict[str, str]) -> bytes:
    return json.dumps(log.summary()).encode()


def _timeline(log: Log, query: dict[str, str]) -> bytes:
    buckets = min(max(_number(query, "buckets"), 1), _MOST_BUCKETS)
    return json.dumps(log.timeline(_number(query, "from"), _number(query, "to"), buckets)).encode()


def _window(log: Log, query: dict[str, str]) -> bytes:
    return log.window(_number(query, "at"))


def _explain(log: Log, query: dict[str, str]) -> bytes:
    return json.dumps(log.explain(query.get("type", ""), _number(query, "id"), _number(query, "at"))).encode()


def _neighbour(log: Log, query: dict[str, str]) -> bytes:
    forward = _number(query, "direction") > 0
    found = log.neighbour(query.get("type", ""), _number(query, "id"), _number(query, "at"), forward=forward)
    return json.dumps({"n": found}).encode()


def _find(log: Log, query: dict[str, str]) -> bytes:
    return json.dumps(log.find(query.get("text", ""))).encode()


def _words(log: Log, query: dict[str, str]) -> bytes:
    return json.dumps({"words": log.words(_number(query, "run"), _number(query, "at"))}).encode()


def _number(query: dict[str, str], name: str) -> int:
    text = query.get(name, "")
    if not text.removeprefix("-").isdecimal() or len(text) > 20:
        raise BadQuestion(f"{name} has to be a number")
    return int(text)


_QUESTIONS: dict[str, Callable[[Log, dict[str, str]], bytes]] = {
    "summary": _summary,
    "timeline": _timeline,
    "window": _window,
    "explain": _explain,
    "neighbour": _neighbour,
    "find": _find,
    "words": _words,
}
