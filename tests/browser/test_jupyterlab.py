"""A reader's first hour, in a real browser: open, restart and run all, move a slider, solve an exercise."""

import re
import sys

import nbformat
import pytest
from playwright.sync_api import expect

from kdlib.results import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "notebooks" / "exercises"))


def opened(page, lab, name):
    """The panel of a notebook, once its kernel is there."""
    page.goto(f"{lab[0]}/notebooks/{name}?reset")
    panel = page.locator(".jp-NotebookPanel:visible")
    expect(panel.locator(".jp-Notebook .jp-Cell").first).to_be_visible()
    expect(panel.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]')).to_be_visible()
    return panel


def restart_and_run_all(page, panel):
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text(re.compile("^Restart Kernel and Run All Cells")).click()
    page.locator(".jp-Dialog .jp-mod-accept").click()
    expect(panel.locator(".jp-InputArea-prompt", has_text="[*]")).to_have_count(0)
    prompts = panel.locator(".jp-CodeCell .jp-InputArea-prompt")
    expect(prompts.last).to_have_text(f"[{prompts.count()}]:")
    expect(panel.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']")).to_have_count(0)
    return prompts.count()


def test_start_here_runs_from_a_restart_to_its_figure(page, lab, shot):
    panel = opened(page, lab, "00_start_here.ipynb")
    ran = restart_and_run_all(page, panel)
    stored = nbformat.read(lab[1] / "00_start_here.ipynb", 4)
    assert ran == sum(c.cell_type == "code" for c in stored.cells)
    figure = panel.locator(".jp-OutputArea-output img")
    expect(figure).to_have_count(1)
    assert figure.evaluate("image => image.naturalWidth") > 400
    expect(panel.get_by_text("C1a, world 0: supported")).to_be_visible()
    figure.scroll_into_view_if_needed()
    shot(page, "00_start_here")


def test_a_link_of_the_map_opens_the_next_notebook(page, lab):
    panel = opened(page, lab, "00_start_here.ipynb")
    panel.get_by_role("link", name="01_losses", exact=True).first.click()
    expect(page.locator(".lm-TabBar-tabLabel", has_text="01_losses.ipynb").first).to_be_visible()


@pytest.mark.parametrize("name, key, bound", [("01_losses.ipynb", "ArrowRight", "End"), ("06_your_own_models.ipynb", "ArrowRight", "End")])
def test_a_slider_draws_anew_and_stays_in_its_bounds(page, lab, shot, name, key, bound):
    panel = opened(page, lab, name)
    restart_and_run_all(page, panel)
    view = panel.locator(".widget-interact").first
    view.scroll_into_view_if_needed()
    picture, readout = view.locator("img"), view.locator(".widget-readout").first
    before, told = picture.get_attribute("src"), readout.inner_text()
    handle = view.locator(".noUi-handle").first
    for _ in range(5):
        handle.press(key)
    expect(readout).not_to_have_text(told)
    expect(picture).not_to_have_attribute("src", before)
    shot(page, name.split(".")[0])
    handle.press(bound)
    most = readout.inner_text()
    handle.press(key)
    assert readout.inner_text() == most
    expect(view.locator("[data-mime-type='application/vnd.jupyter.error']")).to_have_count(0)


def test_a_sheet_tells_a_mistake_and_then_a_solution(page, lab, shot):
    panel = opened(page, lab, "exercises/1_the_loss.ipynb")
    restart_and_run_all(page, panel)
    expect(panel.get_by_text("nothing is written yet")).to_have_count(4)
    cell = panel.locator(".jp-CodeCell", has_text="def soften")
    for body, said in (("return F.log_softmax(logits * temperature, dim=-1)", "✗ 1.1 soften"), ("return F.log_softmax(logits / temperature, dim=-1)", "✓ 1.1 soften: right")):
        cell.locator(".cm-content").click()
        page.keyboard.press("Control+A")
        page.keyboard.insert_text(f'def soften(logits, temperature):\n    {body}\n\n\ncheck("soften", soften)')
        page.keyboard.press("Shift+Enter")
        expect(cell.locator(".jp-OutputArea-output")).to_contain_text(said)
    cell.scroll_into_view_if_needed()
    shot(page, "exercise")
