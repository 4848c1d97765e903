"""Open pages in headless Chromium, narrow and wide, light and dark; leave a picture of each and fail where one errs.

    python look.py FOLDER PAGE.html [PAGE.html ...]

It errs where it writes to the console, asks the network for anything, doesn't load, or is wider than the window.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PyQt6.QtCore import QEventLoop, QTimer, QUrl
from PyQt6.QtWebEngineCore import (
    QWebEnginePage,
    QWebEngineProfile,
    QWebEngineSettings,
    QWebEngineUrlRequestInterceptor,
)
from PyQt6.QtWebEngineWidgets import QWebEngineView
from PyQt6.QtWidgets import QApplication

WIDTHS, HEIGHT, TALLEST = (400, 1280), 1000, 16_000  # pixels
PATIENCE, SETTLED = 60_000, 500  # milliseconds that a page may take, and that it has to settle
LOOKS = 40  # at a page at most, until it is painted: on a busy machine a taller window stays empty for a while
FLAGS = "--no-sandbox --disable-gpu --blink-settings=preferredColorScheme={}"
SCHEMES = ("dark", "light")
SIZE = "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"


class Offline(QWebEngineUrlRequestInterceptor):
    """Lets nothing through but files, and notes the rest."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__()
        self.errors = errors

    def interceptRequest(self, request: Any) -> None:
        """Block it, where it isn't a file."""
        if request.requestUrl().scheme() not in ("file", "data"):
            self.errors.append(f"asks for {request.requestUrl().toString()}")
            request.block(True)


class Page(QWebEnginePage):
    """A page that notes what it writes to the console."""

    def __init__(self, profile: QWebEngineProfile, parent: QWebEngineView, errors: list[str]) -> None:
        super().__init__(profile, parent)
        self.errors = errors

    def javaScriptConsoleMessage(self, level: Any, message: str, line: int, source: str) -> None:
        """Note it."""
        self.errors.append(f"says in line {line}: {message}")


def wait(begin: Callable[[Callable[[Any], None]], Any]) -> Any:
    """Run the application until what was begun has called back; return what it gave, None after too long."""
    loop, found = QEventLoop(), []

    def done(value: Any) -> None:
        found.append(value)
        loop.quit()

    begin(done)
    QTimer.singleShot(PATIENCE, loop.quit)
    if not found:
        loop.exec()
    return found[0] if found else None


def rest() -> None:
    wait(lambda done: QTimer.singleShot(SETTLED, lambda: done(True)))


def look(path: Path, width: int, picture: Path) -> list[str]:
    """Open a page in a window, leave a picture of it, and return what was wrong."""
    errors: list[str] = []
    profile, offline, view = QWebEngineProfile(), Offline(errors), QWebEngineView()
    profile.setUrlRequestInterceptor(offline)
    view.setPage(Page(profile, view, errors))
    view.settings().setAttribute(QWebEngineSettings.WebAttribute.LocalContentCanAccessRemoteUrls, True)  # to see it ask
    view.resize(width, HEIGHT)
    view.show()

    def load(done: Callable[[Any], None]) -> None:
        view.loadFinished.connect(done)
        view.load(QUrl.fromLocalFile(str(path.absolute())))

    if not wait(load):
        errors.append("doesn't load")
    rest()
    wide, tall = wait(lambda done: view.page().runJavaScript(SIZE, done)) or (0, HEIGHT)
    if wide > width:
        errors.append(f"is {wide} pixels wide")
    view.resize(width, min(TALLEST, int(tall)))
    if not painted(view, picture):
        errors.append("isn't painted to its end")
    view.close()
    return errors


def painted(view: QWebEngineView, picture: Path) -> bool:
    """Leave a picture of a page once two looks in a row show the same, as tall as the window is; tell whether they do.

    Until the page knows of its window's height, what is below the old one is empty.
    """
    before = None
    for _ in range(LOOKS):
        rest()
        knows = wait(lambda done: view.page().runJavaScript("window.innerHeight", done)) == view.height()
        shown = view.grab().toImage()
        shown.save(str(picture))
        if knows and shown == before:
            return True
        before = shown
    return False


def look_at_all(folder: Path, pages: list[Path], scheme: str) -> int:
    """Look at all pages in one scheme; return how many erred."""
    os.environ |= {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_DISABLE_SANDBOX": "1"}
    os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = FLAGS.format(SCHEMES.index(scheme))
    application, erred = QApplication(["look"]), 0
    for path in pages:
        for width in WIDTHS:
            picture = folder / f"{path.parent.name}-{path.stem}-{width}-{scheme}.png"
            errors = look(path, width, picture)
            print(f"{picture}: {'; '.join(errors) or 'fine'}", flush=True)
            erred += bool(errors)
    application.quit()
    return erred


def main() -> int:
    """Look in both schemes: Chromium takes one when it starts, so each has a process of its own."""
    folder, *pages = sys.argv[1:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    failed = 0
    for scheme in SCHEMES:
        if child := os.fork():
            failed |= os.waitpid(child, 0)[1]
        else:
            os._exit(look_at_all(Path(folder), [Path(page) for page in pages], scheme))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
