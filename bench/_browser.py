"""A page in a real, headless Chromium: how long it takes to open, and what a script finds in it."""

import functools
import http.server
import json
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# Opens the page in a frame of the same origin, waits until it has drawn, and tells the server what it found.
WRAPPER = """<!doctype html><link rel="icon" href="data:,"><body style="margin:0">
<iframe style="border:0;width:1350px;height:3000px"></iframe>
<img src="wait"><script>
const frame = document.querySelector("iframe"), begun = performance.now(), found = {};
const drawn = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
frame.onload = async () => {
  const page = frame.contentDocument, view = frame.contentWindow;
  await drawn();
  found.ms = performance.now() - begun;
  found.wide = page.documentElement.scrollWidth - page.documentElement.clientWidth;
  try { %s } catch (error) { found.error = String(error); }
  await fetch("found", { method: "POST", body: JSON.stringify(found) });
};
frame.src = "index.html";
</script>"""


class _Server(http.server.SimpleHTTPRequestHandler):
    """The folder of the page; `wait` answers when the wrapper has told what it found."""

    def __init__(self, *args: Any, told: dict[str, Any], ready: threading.Event, **options: Any) -> None:
        self.told, self.ready = told, ready
        super().__init__(*args, **options)

    def do_GET(self) -> None:
        if self.path != "/wait":
            return super().do_GET()
        self.ready.wait(100)
        return self._done()

    def do_POST(self) -> None:
        self.told |= json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._done()
        self.ready.set()

    def _done(self) -> None:
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


def opened(folder: Path, script: str = "") -> dict[str, Any]:
    """What `script`, with `page`, `view` and `found`, finds in FOLDER/index.html; `ms` it took to open.

    `complaints` are errors of its scripts and breaches of its own policy.
    """
    told = loaded(folder, WRAPPER % script, folder / ".profile")
    shutil.rmtree(folder / ".profile", ignore_errors=True)
    return told | {"complaints": complaints(told.pop("log"))}


def loaded(folder: Path, wrapper: str, profile: Path) -> dict[str, Any]:
    """What a page beside those in `folder` posts to `found` before its picture `wait` is there; and `log`."""
    (folder / "wrapper.html").write_text(wrapper, encoding="utf-8")
    told: dict[str, Any] = {}
    handler = functools.partial(_Server, directory=str(folder), told=told, ready=threading.Event())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/wrapper.html"
        log = chromium(profile, "--window-size=1360,3000", "--dump-dom", url)
        server.shutdown()
    (folder / "wrapper.html").unlink()
    return told | {"log": log}


def chromium(profile: Path, *flags: str) -> str:
    """Run headless Chromium to its end; returns what it logged."""
    assert CHROMIUM is not None
    return subprocess.run(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--enable-logging=stderr", f"--user-data-dir={profile}", *flags),
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    ).stderr


def complaints(log: str) -> list[str]:
    """Errors of scripts and breaches of the page's own policy."""
    return [line for line in log.splitlines() if "CONSOLE" in line and "wrapper.html" not in line]
