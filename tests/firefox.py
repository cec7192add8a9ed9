"""Firefox without a window, over Marionette, the protocol that it speaks by itself: Playwright asks later ones only."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FIREFOX = next(filter(None, map(shutil.which, ("firefox", "firefox-esr"))), None)
needs_firefox = pytest.mark.skipif(FIREFOX is None, reason="there is no Firefox on the path")
PREFERENCES = {"marionette.port": 0, "browser.shell.checkDefaultBrowser": False, "app.update.disabledForTesting": True}


class Firefox:
    """A browser with one page.

    Args:
        connection: to its Marionette.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._file = connection.makefile("rwb")
        self._read()  # its greeting
        self._call("WebDriver:NewSession", capabilities={"alwaysMatch": {"timeouts": {"script": None}}})

    def goto(self, address: str) -> None:
        """Open a page."""
        self._call("WebDriver:Navigate", url=address)

    def evaluate(self, function: str, *arguments: Any) -> Any:
        """Return what an asynchronous function of JavaScript gives, or the text of its error."""
        script = f"const done = [...arguments].at(-1); ({function})(...arguments).then(done, (e) => done(String(e)));"
        return self._call("WebDriver:ExecuteAsyncScript", script=script, args=list(arguments))["value"]

    def _call(self, command: str, **parameters: Any) -> Any:
        content = json.dumps([0, 1, command, parameters]).encode()
        self._file.write(b"%d:%b" % (len(content), content))
        self._file.flush()
        _, _, error, result = self._read()
        assert error is None, error
        return result

    def _read(self) -> Any:
        length = b""
        while (letter := self._file.read(1)) != b":":
            assert letter, "Firefox has ended"
            length += letter
        return json.loads(self._file.read(int(length)))


@contextmanager
def firefox() -> Iterator[Firefox]:
    """Start the browser with a profile of its own."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        lines = [f"user_pref({json.dumps(key)}, {json.dumps(value)});" for key, value in PREFERENCES.items()]
        (Path(name) / "user.js").write_text("\n".join(lines))
        command = [str(FIREFOX), "--headless", "--marionette", "--profile", name]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            assert process.stdout is not None
            port = next(line.split()[-1] for line in process.stdout if "Listening on port" in line)
            with socket.create_connection(("127.0.0.1", int(port))) as connection:
                yield Firefox(connection)
        finally:
            process.kill()
            process.communicate()
