"""A webhook's other end, for benchmarks: what came in, by its key."""

import random
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Outside:
    """The other end of the webhook: what came in, by key. It fails one delivery in five, after taking it."""

    def __init__(self, seed: int) -> None:
        self.keys: Counter[str] = Counter()
        draw, lock, keys = random.Random(seed), threading.Lock(), self.keys

        class Hook(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                with lock:
                    keys[self.headers["Idempotency-Key"]] += 1
                    code = 503 if draw.random() < 0.2 else 204
                self.send_response(code)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Nothing: what came in is in `keys`."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
