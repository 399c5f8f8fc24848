"""A reader's first hour, in a real browser: open, restart and run all, move a slider, solve an exercise."""

import re

import nbformat
import pytest
from playwright.sync_api import expect


def opened(page, lab, name):
    """The panel of a notebook, once its kernel is idle."""
    url, _ = lab
    page.goto(f"{url}/lab/tree/notebooks/{name}?reset")
    panel = page.locator(".jp-NotebookPanel:visible")
    expect(panel.locator(".jp-Notebook .jp-Cell").first).to_be_visible()
    for _ in range(240):
        told = page.request.get(f"{url}/api/sessions").json()
        if [s for s in told if s["path"].endswith(name) and s["kernel"]["execution_state"] == "idle"]:
            return panel
        page.wait_for_timeout(500)
    raise AssertionError(f"no idle kernel: {told}")


def restart_and_run_all(page, panel):
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text(re.compile("^Restart Kernel and Run All Cells")).click()
    page.locator(".jp-Dialog .jp-mod-accept").click()
    expect(panel.locator(".jp-InputArea-prompt", has_text="[*]")).to_have_count(0)
    prompts, errors = panel.locator(".jp-CodeCell .jp-InputArea-prompt"), panel.locator("[data-mime-type='application/vnd.jupyter.error']")
    expect(errors.or_(prompts.last.filter(has_text=f"[{prompts.count()}]:")).first).to_be_visible()
    assert not errors.all_inner_texts()
    return int(prompts.last.inner_text().strip("[]:"))


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


@pytest.mark.parametrize("name", ["01_losses.ipynb", "06_your_own_models.ipynb"])
def test_a_slider_draws_anew_and_stays_in_its_bounds(page, lab, shot, name):
    panel = opened(page, lab, name)
    restart_and_run_all(page, panel)
    view = panel.locator(".widget-interact").first
    picture, readout, slider = view.locator("img"), view.locator(".widget-readout").first, view.locator(".noUi-target").first
    expect(picture).to_have_count(1)
    slider.scroll_into_view_if_needed()
    before, told, box = picture.get_attribute("src"), readout.inner_text(), slider.bounding_box()
    page.mouse.click(box["x"] + 0.7 * box["width"], box["y"] + box["height"] / 2)
    expect(readout).not_to_have_text(told)
    expect(picture).not_to_have_attribute("src", before)
    shot(page, name.split(".")[0])
    limit = float(view.locator(".noUi-handle").first.get_attribute("aria-valuemax"))
    readout.click()
    page.keyboard.press("Control+A")
    page.keyboard.type("999")
    page.keyboard.press("Enter")
    expect(readout).not_to_have_text("999")
    assert float(readout.inner_text()) == pytest.approx(10**limit if name.startswith("01") else limit, rel=0.01), "the greatest that is allowed"
    expect(view.locator("[data-mime-type='application/vnd.jupyter.error']")).to_have_count(0)


def test_a_sheet_tells_a_mistake_and_then_a_solution(page, lab, shot):
    panel = opened(page, lab, "exercises/1_the_loss.ipynb")
    restart_and_run_all(page, panel)
    expect(panel.get_by_text("nothing is written yet")).to_have_count(4)
    cell = panel.locator(".jp-CodeCell", has_text="def soften")
    for body, said in (("return F.log_softmax(logits * temperature, dim=-1)", "multiplied by the temperature"), ("return F.log_softmax(logits / temperature, dim=-1)", "✓ 1.1 soften: right")):
        cell.locator(".cm-content").click()
        page.keyboard.press("Control+A")
        page.keyboard.insert_text(f'def soften(logits, temperature):\n    {body}\n\n\ncheck("soften", soften)')
        page.keyboard.press("Shift+Enter")
        expect(cell.locator(".jp-OutputArea-output")).to_contain_text(said)
    cell.scroll_into_view_if_needed()
    shot(page, "exercise")
