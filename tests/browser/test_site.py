"""The HTML edition: readable by everyone, on a phone too, and every link leads somewhere."""

import html
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
from axe_playwright_python.sync_playwright import Axe

from kdlib.results import REPOSITORY

PAGES = ["index", *(p.relative_to(REPOSITORY / "notebooks").with_suffix("").as_posix()
                    for where in ("*.ipynb", "exercises/[1-9]_*.ipynb") for p in sorted((REPOSITORY / "notebooks").glob(where)))]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, str(REPOSITORY / ".ci" / "site.py"), str(folder)], check=True)
    return folder


@pytest.mark.parametrize("name", PAGES)
def test_nothing_serious_keeps_anyone_from_reading(page, site, name):
    page.goto((site / f"{name}.html").as_uri(), wait_until="load")
    found = [v for v in Axe().run(page).response["violations"] if v["impact"] in ("serious", "critical")]
    assert not found, "\n".join(f"{v['id']}: {v['help']}: {[n['html'][:150] for n in v['nodes'][:3]]} ({len(v['nodes'])})" for v in found)


@pytest.mark.parametrize("name", PAGES)
def test_a_phone_shows_whole_lines_and_figures_that_can_be_read(page, site, shot, name):
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto((site / f"{name}.html").as_uri(), wait_until="load")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("[...document.images].every(i => i.naturalWidth > 0 && i.getBoundingClientRect().width >= 0.69 * i.naturalWidth)")
    if name in ("index", "02_data_budget", "05_report", "exercises/1_the_loss"):
        if "0" in name:
            page.locator("img").first.scroll_into_view_if_needed()
        shot(page, f"phone-{Path(name).name}", full_page=name == "index")


@pytest.mark.parametrize("name", PAGES)
def test_every_link_of_a_page_leads_to_a_page_and_a_place(page, site, name):
    page.goto((site / f"{name}.html").as_uri(), wait_until="load")
    links = page.evaluate("[...document.querySelectorAll('a[href]')].map(a => a.href)")
    own = [link for link in links if link.startswith("file:")]
    assert own and not [link for link in links if not link.startswith(("file:", "https://", "mailto:"))]
    for link in set(own):
        target, _, place = link.removeprefix("file://").partition("#")
        assert Path(target).is_file(), link
        if place:
            ids = set(map(html.unescape, re.findall(r'\bid="([^"]*)"', Path(target).read_text(encoding="utf-8"))))
            assert ids & {place, unquote(place)}, link
