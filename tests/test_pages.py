"""Pages in Chromium: nothing that axe-core finds serious, no sideways scroll, phone heights, printing."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from made_cleaning import PACKAGES, SETTINGS, needs_packages, write_faults
from made_data import talk, write_lines
from made_runs import copy_case, run_logs
from made_sources import BUDGETS, TOKENIZER_FOLDER
from PIL import Image

from navil_jax.data.__main__ import main as data
from navil_jax.generate.__main__ import main as generate
from navil_jax.study.__main__ import main as study
from navil_jax.train.__main__ import main as train

AXE = Path(os.environ.get("AXE_CORE", "node_modules/axe-core/axe.min.js"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="Chromium is absent: apt install chromium"),
]
needs_axe = pytest.mark.skipif(not AXE.exists(), reason="axe-core is absent: npm install axe-core, or AXE_CORE=FILE")
# pixels on a phone
MOST_HEIGHT = {"clean": 14000, "doctor": 6000, "rows": 4000, "study": 4500, "attention": 4000, "run": 6000}
PAGES = [pytest.param(name, marks=[needs_packages] if name == "clean" else []) for name in MOST_HEIGHT]
MEASURE = """
const said = {height: document.documentElement.scrollHeight, width: document.documentElement.scrollWidth};
const tell = found => {
  const text = parent.document.createElement("pre");
  text.textContent = "FOUND" + JSON.stringify({...said, found}) + "END";
  parent.document.body.append(text);
};
"""
RUN_AXE = "axe.run(document).then(all => tell(all.violations.map(one => [one.impact, one.id, one.nodes[0].html])));"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> HTML file."""
    folder = tmp_path_factory.mktemp("pages")
    records = []
    for number in range(40):
        Image.new("RGB", (20 + number, 24), (number, 0, 0)).save(folder / f"{number}.png")
        records.append({"image": f"{number}.png", "conversations": talk("<image>\nWhich?", f"Red {number}.")})
    records += [
        records[0],
        *({"image": f"no{number}.png", "conversations": talk("<image>", "a")} for number in range(9)),
    ]
    lines = write_lines(folder / "train.jsonl", records)
    flags = [f"--config.data.{name}={slots}" for name, slots in BUDGETS.items()]
    flags += ["--config.images.min_patches=4", "--config.images.max_patches=256", "--workers=0"]
    flags += [f"--config.data.tokenizer={TOKENIZER_FOLDER}"]
    data(["doctor", "--source", f"llava:{lines}", "--out", str(folder / "doctor"), *flags])
    recipe = str(Path(__file__).parent / "toy_recipe.py")
    assert data(["preview", "--config", recipe, "--rows", "3", "--out", str(folder / "rows.html")]) == 0
    assert study(["report", "--out", str(folder / "study.html")]) == 0
    faults = folder / "faults"
    faults.mkdir()
    path, _ = write_faults(faults)
    command = ["clean", "--from", "llava", "--path", path, "--out", str(folder / "clean"), "--workers=0", *SETTINGS]
    assert not PACKAGES or data(command) == 0
    model = copy_case("internlm2_small", folder / "model")
    asked = ["--image", str(folder / "0.png"), "--prompt", "Which?", "--heads", "mean,1"]
    assert generate(["attention", "--checkpoint", str(model), *asked, "--out", str(folder / "look")]) == 0
    a_run(folder / "run")
    assert train(["report", str(folder / "run")]) == 0
    return {
        **({"clean": folder / "clean" / "report.html"} if PACKAGES else {}),
        "attention": folder / "look" / "index.html",
        "run": folder / "run" / "report.html",
        "doctor": folder / "doctor" / "report.html",
        "rows": folder / "rows.html",
        "study": folder / "study.html",
    }


def a_run(folder: Path) -> None:
    """The logs of a run with three held-out sources and ten kinds of question."""
    run_logs(folder, [4 - step / 20 for step in range(40)])
    sources = {"easy_vqa_captions": ["caption"], "scenes": [f"kind of question {number}" for number in range(9)]}
    with (folder / "metrics.jsonl").open("a") as file:
        for step in (20, 40):
            scores = {
                f"eval/{source}/{kind}/accuracy": 1 / (step + number)
                for source, kinds in sources.items()
                for number, kind in enumerate(kinds)
            }
            losses = {f"eval/{source}/loss": 60 / step for source in sources}
            file.write(json.dumps({"step": step, **scores, **losses}) + "\n")
    head = ("source", "kind", "samples", "accuracy", "commonest answer", "question only")
    rows = [
        head,
        ("---",) * 6,
        *(("scenes", f"kind of question {number}", "175", "7.4%", "1.1%", "0.0%") for number in range(9)),
    ]
    (folder / "evaluation.md").write_text("".join(f"| {' | '.join(row)} |\n" for row in rows))
    Image.new("RGB", (1000, 600), "teal").save(folder / "answers.png")


def chromium(*arguments: str) -> str:
    base = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=15000"]
    return subprocess.run([*base, *arguments], capture_output=True, text=True, timeout=120, check=True).stdout


def measured(page: Path, width: int, dark: bool, script: str, folder: Path) -> dict:
    """What a script tells of a page in a frame of so many pixels; windows of Chromium have a least width."""
    text = page.read_text().replace("</body>", f"<script>{MEASURE}{script}</script></body>")
    outer = folder / "frame.html"
    frame = f'<iframe title="page" style="width:{width}px;height:800px;border:0" srcdoc="{html.escape(text)}"></iframe>'
    outer.write_text(f'<!doctype html><html lang="en"><title>frame</title><body>{frame}</body></html>')
    mode = ["--blink-settings=preferredColorScheme=0"] if dark else []
    found = re.search(
        r"FOUND(\{.*?)END", chromium(*mode, "--window-size=1400,900", "--dump-dom", str(outer)), re.DOTALL
    )
    assert found
    return json.loads(html.unescape(found[1]))


@needs_axe
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing(pages: dict[str, Path], tmp_path: Path, name: str, dark: bool) -> None:
    script = f"{AXE.read_text()};{RUN_AXE}" if AXE.exists() else ""
    assert measured(pages[name], 1100, dark, script, tmp_path)["found"] == []


@pytest.mark.parametrize("name", PAGES)
def test_a_phone_shows_a_page_without_sideways_scroll(pages: dict[str, Path], tmp_path: Path, name: str) -> None:
    found = measured(pages[name], 390, False, "addEventListener('load', () => tell([]))", tmp_path)
    assert found["width"] <= 390
    assert found["height"] <= MOST_HEIGHT[name]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_prints(pages: dict[str, Path], tmp_path: Path, name: str) -> None:
    chromium(f"--print-to-pdf={tmp_path / 'page.pdf'}", str(pages[name]))
    pdf = (tmp_path / "page.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert pdf.count(b"/Type /Page\n") <= 20


def test_the_list_of_bad_samples_filters(pages: dict[str, Path], tmp_path: Path) -> None:
    script = """
    const field = document.querySelector("input[type=search]");
    const left = () => [...document.querySelectorAll(".list p")].filter(one => !one.hidden).length;
    const before = left();
    field.value = "NO7.png file";
    field.dispatchEvent(new Event("input"));
    tell([before, left()]);
    """
    assert measured(pages["doctor"], 1100, False, script, tmp_path)["found"] == [9, 1]


def test_all_bad_samples_are_printed(pages: dict[str, Path], tmp_path: Path) -> None:
    script = "dispatchEvent(new Event('beforeprint')); tell([document.querySelectorAll('details:not([open])').length]);"
    assert measured(pages["doctor"], 1100, False, script, tmp_path)["found"] == [0]
