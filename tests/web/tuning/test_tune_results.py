"""A job on the page for fine-tuning: live by itself, beside the version before, and deleted."""

import re

import pytest
from playwright.sync_api import expect

from tests.support.clients.chat_page import LIMIT_MS, OpenPage
from tests.support.servers.server_process import ServerProcess
from tests.support.tuning.tune_page import OPERATOR, PAIRS, TRAINED_MS, call, paste

pytest.importorskip("accelerate")
expect.set_options(timeout=LIMIT_MS)


def test_a_job_goes_live_by_itself_is_compared_with_the_version_before_and_is_deleted(
    open_page: OpenPage, tuned: ServerProcess
) -> None:
    before = next(
        job
        for job in call(tuned, "fine_tuning/jobs")["data"]
        if job["status"] == "succeeded" and job["user_provided_suffix"] == "pirate"
    )
    call(tuned, f"fine_tuning/jobs/{before['id']}/publish", name="crew")
    page = open_page(tuned, "/tune", OPERATOR).page
    paste(page, PAIRS)
    page.get_by_label("Name", exact=True).fill("second")
    page.get_by_label("Epochs").fill("1")
    page.locator("#more summary").click()
    page.get_by_label("Make it live as").fill("crew")
    page.get_by_label("For callers").fill("25")
    page.get_by_label("Count the answers").check()
    page.get_by_role("button", name="Start training").click()
    view = page.locator("#job .job")
    expect(view.locator(".result")).to_have_text("Becomes live as crew once it has succeeded, for 25% of the callers.")
    expect(view.locator(".badge")).to_have_text("succeeded", timeout=TRAINED_MS)
    expect(view.locator(".result .note")).to_have_text("Went live as crew, version 2, for 25% of the callers.")
    job = call(tuned, "fine_tuning/jobs?limit=1")["data"][0]
    columns = ("base_valid", "previous_valid", "valid")
    losses = [f"{job['losses'][column]:.3f}" for column in columns]
    exact = [f"{job['exact_match'][column]:.0%}" for column in columns]
    assert exact[0] == "0%" and len(set(losses)) == 3
    rows = view.locator(".result tr")
    heads = ["On the examples held out", "Without adapter", "Version before", "New"]
    expect(rows.nth(0).locator("th")).to_have_text(heads)
    expect(rows.nth(1).locator("td")).to_have_text(losses)
    expect(rows.nth(2).locator("td")).to_have_text(exact)
    versions = call(tuned, "adapters/crew/versions")
    assert sorted(versions["shares"].values()) == [0.25, 0.75]

    page.get_by_role("button", name="Delete the model").click()
    page.get_by_role("button", name="Delete the model Sure?").click()
    expect(view.locator("[role=status]")).to_have_text("The model is deleted.")
    expect(page.locator("#live")).to_be_hidden()
    expect(page.locator("#comparison")).to_be_hidden()
    served = [model["id"] for model in call(tuned, "models")["data"]]
    assert job["fine_tuned_model"] not in served and "crew" in served
    assert call(tuned, "adapters/crew/versions") == versions
    page.get_by_role("button", name="Delete the files").click()
    page.get_by_role("button", name="Delete the files Sure?").click()
    expect(view.locator("[role=status]")).to_have_text("The files are deleted.")
    expect(page.get_by_role("button", name=re.compile("^Delete"))).to_have_count(0)
    stored = {file["id"] for file in call(tuned, "files")["data"]}
    assert not stored & {job["training_file"], job["validation_file"], *job["result_files"]}
    assert before["training_file"] in stored
