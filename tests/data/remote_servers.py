"""Real servers on loopback for the tests of remote shards: nginx, and a proxy before it that injects faults."""

from __future__ import annotations

import http.client
import os
import shutil
import subprocess
import threading
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from tests.harness import free_port, is_listening, wait_for

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


class Nginx:
    """nginx that serves `folder`; `requests` counts the GETs by path, from its access log."""

    def __init__(self, folder: Path, state: Path) -> None:
        self.port, self.log = free_port(), state / "access.log"
        temporary = "".join(f"{kind}_temp_path {state}/{kind};" for kind in ("client_body", "proxy", "fastcgi"))
        user = "user root;" if os.geteuid() == 0 else ""
        (state / "nginx.conf").write_text(
            f"daemon off; {user} pid {state}/pid; error_log {state}/error.log; worker_processes 1; events {{}}"
            f"http {{ log_format line '$request_method $uri'; access_log {self.log} line; {temporary}"
            f"uwsgi_temp_path {state}/uwsgi; scgi_temp_path {state}/scgi;"
            f"server {{ listen 127.0.0.1:{self.port}; root {folder}; }} }}"
        )
        self.process = subprocess.Popen(
            [str(NGINX), "-p", str(state), "-c", str(state / "nginx.conf"), "-e", str(state / "error.log")]
        )
        wait_for(lambda: is_listening(self.port), "nginx")

    def requests(self) -> Counter[str]:
        lines = self.log.read_text().splitlines()
        return Counter(line.removeprefix("GET ") for line in lines if line.startswith("GET "))

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


Fault = str | int


class FaultyProxy:
    """Passes requests on to a server, but for the faults that wait for a path: one each time, in order.

    A number is an answer with that status; `truncated` ends the body half way (with its full length announced),
    `short` announces half, `corrupt` changes a byte, `silent` says nothing and `held` stops half way until `release` is
    set.
    """

    def __init__(self, port: int) -> None:
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.always: dict[str, Fault] = {}
        self.requests: Counter[str] = Counter()
        self.half_sent, self.release = threading.Event(), threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                upstream = http.client.HTTPConnection("127.0.0.1", port)
                upstream.request("GET", self.path)
                answer = upstream.getresponse()
                proxy.answer(self, answer.status, answer.read())
                upstream.close()

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
        path = unquote(request.path)
        self.requests[path] += 1
        fault = self.faults[path].pop(0) if self.faults[path] else self.always.get(path)
        if isinstance(fault, int):
            status, body = fault, b""
        if fault == "corrupt":
            body = body[:1000] + bytes([body[1000] ^ 1]) + body[1001:]
        if fault == "short":
            body = body[: len(body) // 2]
        if fault == "silent":
            self.release.wait(60)
        half = len(body) // 2
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body[:half])
        request.wfile.flush()
        if fault == "held":
            self.half_sent.set()
            self.release.wait(60)
        if fault != "truncated":
            try:
                request.wfile.write(body[half:])
            except OSError:
                pass  # the client was killed

    def stop(self) -> None:
        self.release.set()
        self.server.shutdown()
        self.server.server_close()
