"""The report in Chromium, as wide as on a desktop and a phone: no element leaves the page, no column is squeezed, no error."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from flextron_mcore.adaptive import report as adaptive
from flextron_mcore.report import TOPICS, build_report
from tests.adaptive.test_report import made
from tests.report import synthetic
from tests.report.test_page import make_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Replaces the title by what is wrong: elements that leave the page, unless they are in a box that scrolls, and narrow cells.
PROBE = """<script>
addEventListener("load", () => {
  const width = document.documentElement.clientWidth, scrolls = (e) => e.closest(".scroll, pre") && !e.matches(".scroll, pre");
  document.querySelectorAll("details").forEach((e) => { e.open = true; });
  const found = [], shown = (e) => e.tagName + "." + e.className + " " + e.textContent.trim().slice(0, 40);
  if (document.documentElement.scrollWidth > width) found.push("the page scrolls sideways");
  for (const e of document.body.querySelectorAll("*"))
    if (!scrolls(e) && e.getClientRects().length && e.getBoundingClientRect().right > width + 1) found.push(shown(e));
  for (const e of document.querySelectorAll("th, td"))
    if (e.textContent.trim().length > 4 && e.clientWidth < 45) found.push("narrow: " + shown(e));
  for (const e of document.images) if (e.getClientRects().length && !e.naturalWidth) found.push("image " + e.alt);
  document.title = JSON.stringify({ width, found });
});
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    """A report with every part, long names, warnings and an unfinished stage."""
    run = make_run(tmp_path_factory.mktemp("browser") / "a_run_with_a_long_name_that_has_no_space_at_all_in_it")
    for name, kind in (("router", "router"), ("joint", "joint"), ("a_second_joint_run_with_a_long_name", "joint")):
        metrics, log = synthetic.routing(kind, kind == "router")
        synthetic.write(run / name, {**metrics, "warnings": ["x" * 200]}, log)
    synthetic.write(run / "gumbel", *synthetic.gumbel())
    synthetic.write(run / "adaptive", *made())
    synthetic.write(run / "sensitivity", synthetic.sensitivity())
    synthetic.write(run / "compare", synthetic.compare())
    synthetic.write(run / "models", synthetic.family())
    (run / ".export_of_a_network_with_a_long_name_that_has_no_space_at_all_in_it.tmp").mkdir()
    return build_report(run, run / "report", (*TOPICS, *adaptive.TOPICS))["index"].read_text(encoding="utf-8")


def look(folder: Path, text: str, width: int) -> dict:
    """{width of the page, faults} as Chromium finds them in a frame of `width` pixels."""
    (folder / "page.html").write_text(text.replace("</head>", f"{PROBE}</head>"), encoding="utf-8")
    # The page is shown in a frame, because Chromium's windows are at least 500 pixels wide, and a phone is narrower.
    frame = f'<iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe>'
    wait = "<script>setTimeout(() => { document.title = frames[0].document.title; }, 3000)</script>"
    (folder / "frame.html").write_text(f"<title></title>{frame}{wait}", encoding="utf-8")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--allow-file-access-from-files",
        "--enable-logging=stderr",
    ]
    size = ["--window-size=1400,1000", "--virtual-time-budget=8000", f"--user-data-dir={folder / 'profile'}"]
    command = [CHROMIUM, *options, *size, "--dump-dom", (folder / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    faults = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not faults, "\n".join(faults)
    return json.loads(re.search(r"<title>(.*?)</title>", done.stdout)[1])


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
@pytest.mark.parametrize("width", [1100, 390])
def test_nothing_leaves_the_page(tmp_path, page, width):
    assert look(tmp_path, page, width) == {"width": width, "found": []}


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
def test_the_probe_sees_what_it_is_for(tmp_path, page):
    wide = page.replace("</main>", '<p style="width: 2000px">wide</p></main>')
    narrow = "<table><tr><td style='display: block; width: 30px; min-width: 0'>letters</td></tr></table></main>"
    found = look(tmp_path, wide.replace("</main>", narrow), 390)["found"]
    assert "the page scrolls sideways" in found and "P. wide" in found and any("letters" in fault for fault in found)
