"""A real JupyterLab over a copy of the notebooks, and a real Chromium to look at it with."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest
from playwright.sync_api import expect, sync_playwright

from kdlib.results import REPOSITORY

SCREENSHOTS = REPOSITORY / ".browser"
expect.set_options(timeout=240_000)


@pytest.fixture(scope="session")
def chromium():
    """The browser that CHROMIUM names, else one on the path, else Playwright's own."""
    with sync_playwright() as play:
        found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        browser = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium):
    page = chromium.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(240_000)
    yield page
    page.close()


@pytest.fixture
def shot():
    """Keep a picture of a page under .browser, for people to look at."""
    SCREENSHOTS.mkdir(exist_ok=True)
    return lambda page, name, **how: page.screenshot(path=SCREENSHOTS / f"{name}.png", **how)


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """``(url, folder)`` of a JupyterLab whose files are a copy of the notebooks, without what they show."""
    root = tmp_path_factory.mktemp("lab")
    shutil.copytree(REPOSITORY / "notebooks", folder := root / "notebooks")
    for path in folder.rglob("*.ipynb"):
        notebook = nbformat.read(path, 4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, path)
    (settings := root / "settings" / "@jupyterlab" / "notebook-extension").mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text(json.dumps({"windowingMode": "none"}))  # every cell is in the page
    (settings := root / "settings" / "@jupyterlab" / "apputils-extension").mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
               "--IdentityProvider.token=", f"--ServerApp.root_dir={root}"]
    with open(root / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=root, env={**os.environ, "JUPYTERLAB_SETTINGS_DIR": str(root / "settings")})
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status", timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, (root / "log").read_text()
                time.sleep(0.25)
        yield f"http://127.0.0.1:{port}", folder
    finally:
        server.terminate()
        server.wait(20)
