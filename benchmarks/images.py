"""Decoding, resizing and cutting of images, side by side with others: `python -m benchmarks.images`.

Made JPEGs of photo-like content go from bytes to multi-scale patches: here, and in the usual PyTorch way (Hugging
Face's Qwen2-VL image processor once per scale, alone and in a DataLoader). Figures are CPU seconds, those of child
processes included, so they hold per core and bear other programs on the machine. What is not installed is left out with
a line: `pip install torch torchvision transformers simplejpeg opencv-python-headless imagecodecs`.
"""

import argparse
import importlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from navil_jax.config import ImageConfig, VisionConfig
from navil_jax.data.images import image_patches, load_image, plan_scales, resize
from navil_jax.errors import UserError, report_user_errors

SIZES = ((500, 375), (640, 480), (1024, 768), (1920, 1080))  # width, height
IMAGES, VISION = ImageConfig(), VisionConfig()


def photo(width: int, height: int, seed: int) -> Image.Image:
    """Smooth random shapes of several sizes, which compress about as photographs do."""
    random, total = np.random.default_rng(seed), np.zeros((height, width, 3))
    for share, cell in ((0.1, 3), (0.2, 16), (0.3, 64), (0.4, 200)):
        rough = random.integers(0, 256, (max(2, height // cell), max(2, width // cell), 3), np.uint8)
        total += share * np.asarray(Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def jpegs(count: int) -> list[bytes]:
    """Quality 90, all sizes in turn."""
    files = []
    for number in range(count):
        buffer = io.BytesIO()
        photo(*SIZES[number % len(SIZES)], number).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def milliseconds(work: Callable[[bytes], Any], files: Sequence[bytes], repeats: int = 3) -> float:
    """CPU time per image, the best of some passes, after one to warm up."""
    for file in files[: len(SIZES)]:
        work(file)
    passes = []
    for _ in range(repeats):
        start = time.process_time()
        for file in files:
            work(file)
        passes.append(time.process_time() - start)
    return 1000 * min(passes) / len(files)


def with_pillow(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def with_draft(file: bytes) -> np.ndarray:
    """A copy of half the size that the decoder makes by itself."""
    image = Image.open(io.BytesIO(file))
    image.draft("RGB", (image.width // 2, image.height // 2))
    return np.asarray(image)


def decoders() -> Iterator[tuple[str, Callable[[bytes], np.ndarray] | None]]:
    """(name, JPEG -> [h, w, 3] uint8), None for what is not installed."""
    yield "Pillow", with_pillow
    yield "Pillow, draft mode to half the size", with_draft
    for name in ("simplejpeg", "cv2", "imagecodecs"):
        try:
            package = importlib.import_module(name)
        except ModuleNotFoundError:
            yield name, None
            continue
        if name == "cv2":
            package.setNumThreads(1)
        yield (
            name,
            {
                "simplejpeg": lambda file, package=package: package.decode_jpeg(file),
                "cv2": lambda file, package=package: package.imdecode(
                    np.frombuffer(file, np.uint8), package.IMREAD_COLOR_RGB
                ),
                "imagecodecs": lambda file, package=package: package.jpeg8_decode(file),
            }[name],
        )


def difference(decoded: np.ndarray, file: bytes) -> int:
    """Largest difference from what Pillow decodes, resized if the sizes are not the same."""
    whole = Image.fromarray(with_pillow(file))
    expected = whole.resize((decoded.shape[1], decoded.shape[0]), Image.Resampling.BICUBIC)
    return int(np.abs(decoded.astype(int) - np.asarray(expected)).max())


def decoding_rows(files: Sequence[bytes]) -> Iterator[tuple[str, ...]]:
    pillow = milliseconds(with_pillow, files)
    for name, decode in decoders():
        if decode is None:
            yield name, "not installed", "", ""
            continue
        worst = max(difference(decode(file), file) for file in files[: len(SIZES)])
        spent = pillow if decode is with_pillow else milliseconds(decode, files)
        yield name, f"{spent:.2f}", f"{pillow / spent:.2f}x", str(worst)


def resizing_rows(files: Sequence[bytes]) -> Iterator[tuple[str, ...]]:
    """All scales of an image that are not of its own size."""
    images = {file: load_image(file) for file in files}

    def targets(image: Image.Image) -> list[tuple[int, int]]:
        plan = plan_scales(image.height, image.width, IMAGES, VISION)
        return [(scale.width, scale.height) for scale in plan if (scale.width, scale.height) != image.size]

    def pillow(file: bytes) -> list[np.ndarray]:
        image = images[file]
        return [np.asarray(image.resize(size, Image.Resampling.BICUBIC)) for size in targets(image)]

    def own(file: bytes) -> list[np.ndarray]:
        image, copies = images[file], []
        source = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint32).reshape(image.height, image.width)
        for width, height in targets(image):
            copies.append(np.empty((height, width), np.uint32))
            resize(source, height, width, copies[-1])
        return copies

    worst = 0
    for file in files[: len(SIZES)]:
        for theirs, ours in zip(pillow(file), own(file), strict=True):
            colours = ours.view(np.uint8).reshape(*ours.shape, 4)[..., :3]
            worst = max(worst, int(np.abs(colours.astype(int) - theirs).max()))
    reference, spent = milliseconds(pillow, files), milliseconds(own, files)
    yield "Pillow", f"{reference:.2f}", "1.00x", "0"
    yield "navil_jax", f"{spent:.2f}", f"{reference / spent:.2f}x", str(worst)


def own_patches(file: bytes) -> np.ndarray:
    return image_patches(load_image(file), IMAGES, VISION).patches


def torch_way(processor: Any) -> Callable[[bytes], Any]:
    """JPEG -> normalised patches [p, 768] float32 of all scales, one call of the processor per scale."""
    import torch

    area = VISION.patch_size**2

    def patches(file: bytes) -> Any:
        image = Image.open(io.BytesIO(file)).convert("RGB")
        parts = []
        for scale in plan_scales(image.height, image.width, IMAGES, VISION):
            size = {"shortest_edge": IMAGES.min_patches * area, "longest_edge": scale.rows * scale.cols * area}
            parts.append(processor(images=[image], size=size, return_tensors="pt")["pixel_values"])
        return torch.cat(parts)

    return patches


class Files:
    """What a DataLoader reads from."""

    def __init__(self, files: Sequence[bytes], work: Callable[[bytes], Any]) -> None:
        self.files, self.work = files, work

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        return self.work(self.files[index])


def in_data_loader(work: Callable[[bytes], Any], files: Sequence[bytes]) -> float:
    """CPU milliseconds per image with one worker process, the receiving process included."""
    from torch.utils.data import DataLoader

    start = sum(os.times()[:4])
    loader = DataLoader(Files(list(files) * 3, work), batch_size=None, num_workers=1)
    count = sum(1 for _ in loader)
    del loader
    return 1000 * (sum(os.times()[:4]) - start) / count


def patch_rows(files: Sequence[bytes]) -> Iterator[tuple[str, ...]]:
    own = milliseconds(own_patches, files)

    def row(name: str, spent: float, count: float) -> tuple[str, ...]:
        return name, f"{spent:.2f}", f"{1000 / spent:.1f}", f"{count:.0f}", f"{spent / own:.2f}x"

    sample = files[: len(SIZES)]
    yield row("navil_jax (uint8 patches)", own, np.mean([len(own_patches(file)) for file in sample]))
    try:
        torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        yield f"PyTorch: {error.name} is not installed", "", "", "", ""
        return
    torch.set_num_threads(1)
    options = {"patch_size": VISION.patch_size, "merge_size": VISION.merge_size, "temporal_patch_size": 1}
    for name in ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorPil"):
        if (kind := getattr(transformers, name, None)) is None:
            yield f"{name}: not in transformers {transformers.__version__}", "", "", "", ""
            continue
        work = torch_way(kind(image_mean=[0.5] * 3, image_std=[0.5] * 3, **options))
        count = float(np.mean([len(work(file)) for file in sample]))
        yield row(f"{name} alone", milliseconds(work, files), count)
        yield row(f"{name} in a DataLoader", in_data_loader(work, files), count)


@report_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=40, help="made JPEGs, of four sizes in turn (default: 40)")
    options = parser.parse_args(argv)
    if options.images < len(SIZES):
        raise UserError(f"--images must be at least {len(SIZES)}")
    files = jpegs(options.images)
    sizes = ", ".join(f"{width} x {height}" for width, height in SIZES)
    print(f"{len(files)} JPEGs of {sizes}; {np.mean([len(file) for file in files]) / 1000:.0f} kB each on average\n")
    for head, rows in (
        ("| decoding a JPEG | ms | speed against Pillow | largest difference |", decoding_rows),
        ("| resizing to all smaller scales | ms | speed against Pillow | largest difference |", resizing_rows),
        ("| JPEG to multi-scale patches | ms | images/s and core | patches | navil_jax is faster by |", patch_rows),
    ):
        print(head + "\n|" + " --- |" * (head.count("|") - 1))
        for row in rows(files):
            print(f"| {' | '.join(row)} |", flush=True)
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
