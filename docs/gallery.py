"""Makes docs/images/gallery_*.png anew from a short run of the demo: `python docs/gallery.py FOLDER` (ten minutes).

FOLDER keeps the run, so that what is there is not made again. Pages are photographed by Chromium.
"""

import html
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

IMAGES = Path(__file__).parent / "images"
WIDTHS = {"desk": 1100, "phone": 390}
HIGHEST = 1600  # pixels of a page that are shown
LEAST = 500  # pixels that a window of Chromium is wide at least
BAR = 120  # pixels of a window's height that it keeps for itself, at most
CHROMIUM = ("chromium", "--headless=new", "--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=10000")
DEMO = ("--config", "configs/demo.py")
PAGES = (
    ("doctor", "doctor/report.html"),
    ("rows", "rows.html"),
    ("study", "study.html"),
    ("run", "run/report.html"),
    ("attention", "look/index.html"),
)


def commands(folder: Path) -> dict[Path, tuple[str, ...]]:
    """What is made, and the arguments of `python -m` that make it."""
    run, photo = folder / "run", folder / "photo.png"
    short = ("--config.steps=150", "--config.eval_every=50", "--config.eval_samples=100", "--config.log_every=10")
    return {
        run / "evaluation.md": ("navil_jax.train", *DEMO, f"--config.workdir={run}", *short),
        folder / "doctor/report.html": ("navil_jax.data", "doctor", *DEMO, "--out", f"{folder}/doctor"),
        folder / "rows.html": ("navil_jax.data", "preview", *DEMO, "--out", f"{folder}/rows.html"),
        folder / "study.html": ("navil_jax.study", "report", "--out", f"{folder}/study.html"),
        run / "report.html": ("navil_jax.train", "report", str(run)),
        folder / "look/index.html": (
            "navil_jax.generate", "attention", "--checkpoint", str(run), "--image", f"{folder}/shape.png", "--prompt",
            "what shape is in the image?", "--out", f"{folder}/look",
        ),
        folder / "tokens.png": (
            "navil_jax.data", "tokens", "--image", str(photo), "--config.images.max_patches=1024", "--out",
            f"{folder}/tokens.png",
        ),
        folder / "extrapolation.png": (
            "navil_jax.study", "extrapolate", str(run), "--out", f"{folder}/extrapolation.png",
        ),
    }  # fmt: skip


def photograph(page: Path, width: int, target: Path) -> None:
    """A page as a window of so many pixels shows it, in a frame, as windows have a least width."""
    with tempfile.TemporaryDirectory() as folder:
        outer = Path(folder) / "frame.html"
        style = f"border:0;width:{width}px;height:{HIGHEST}px"
        inner = html.escape(page.read_text())
        outer.write_text(f'<!doctype html><body style="margin:0"><iframe style="{style}" srcdoc="{inner}"></iframe>')
        window = f"--window-size={max(width, LEAST)},{HIGHEST + BAR}"
        subprocess.run([*CHROMIUM, window, f"--screenshot={target}", str(outer)], check=True, capture_output=True)
    keep(target, target, width)


def keep(drawn: Path, target: Path, width: int = 0) -> None:
    """The left `width` pixels (0: all) of an image, a page's down to `HIGHEST`, in few colours."""
    image = Image.open(drawn).convert("RGB")
    if width:
        image = image.crop((0, 0, width, HIGHEST))
    image.thumbnail((1100, HIGHEST))
    image.quantize(96, Image.Quantize.MAXCOVERAGE, kmeans=1).save(target, optimize=True)  # small things keep theirs


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "photo.png").exists():
        Image.effect_mandelbrot((900, 600), (-2, -1, 1, 1), 60).save(folder / "photo.png")
    if not (folder / "shape.png").exists():
        shape = Image.new("RGB", (64, 64), "honeydew")
        ImageDraw.Draw(shape).polygon([(8, 52), (32, 8), (56, 52)], fill="firebrick")
        shape.save(folder / "shape.png")
    for made, arguments in commands(folder).items():
        if not made.exists():
            subprocess.run([sys.executable, "-m", *arguments], check=False)  # the doctor's status tells of its findings
    for name in ("loss", "answers"):
        keep(folder / "run" / f"{name}.png", IMAGES / f"gallery_{name}.png")
    for name in ("tokens", "extrapolation"):
        keep(folder / f"{name}.png", IMAGES / f"gallery_{name}.png")
    for name, page in PAGES:
        for kind, width in WIDTHS.items():
            photograph(folder / page, width, IMAGES / f"gallery_{name}_{kind}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
