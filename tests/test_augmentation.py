"""Every epoch draws the random changes of its images anew, wherever and however often it is read."""

import dataclasses
import hashlib
import json

import jax
import numpy as np
import pytest
from made_sources import TOKENIZER, config, samples_of
from PIL import Image

from navil_jax.config import Config, DataConfig, SourceConfig
from navil_jax.data.features import FeatureSource, Usable
from navil_jax.data.mixture import mix
from navil_jax.data.pipeline import make_dataset, sample_streams
from navil_jax.data.quarantine import Quarantine
from navil_jax.data.sample import Sample

SAMPLES = 6


@dataclasses.dataclass(frozen=True)
class Noise:
    """Images on which every size and JPEG quality leaves its mark."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Sample:
        pixels = np.random.default_rng(index).integers(0, 256, (48, 64, 3), np.uint8)
        return Sample(f"noise/{index}", (Image.fromarray(pixels),), (("What?", "Noise."),))

    def texts(self) -> list[str]:
        return []


def augmented(switch: bool = True, repeat: float = 1.0, **changes: object) -> Config:
    transforms = ("resolution", "jpeg") if switch else ()
    sources = (SourceConfig("plain"), SourceConfig("changed", transforms=transforms, repeat=repeat))
    return config(sources=sources, **{"rows": 6} | changes)


def stream(settings: Config, process: int = 0, processes: int = 1):
    return sample_streams(settings, [Noise(), Noise()], TOKENIZER, [process], processes)[0]


def looks(settings: Config, places: int, source: int = 1) -> dict[int, list[bytes]]:
    """Sample -> its patches whenever it comes, of one source."""
    found: dict[int, list[bytes]] = {index: [] for index in range(SAMPLES)}
    samples = stream(settings)
    for usable in (samples[place] for place in range(places)):
        assert isinstance(usable, Usable)
        if usable.features["text_source_ids"][0] == source:
            found[int(usable.features["text_sample_ids"][0])].append(usable.features["patches"].tobytes())
    return found


def test_every_epoch_changes_an_image_in_another_way() -> None:
    for shown in looks(augmented(), 2 * 5 * SAMPLES).values():
        assert len(shown) == len(set(shown)) == 5


def test_every_pass_within_an_epoch_changes_an_image_in_another_way() -> None:
    for shown in looks(augmented(repeat=3.0), 2 * 6 * SAMPLES).values():
        assert len(shown) == len(set(shown)) == 6


def test_images_that_are_not_changed_are_the_same_in_every_epoch() -> None:
    for settings, source in ((augmented(), 0), (augmented(switch=False), 1)):
        assert all(len(shown) == 5 and len(set(shown)) == 1 for shown in looks(settings, 10 * SAMPLES, source).values())


def test_changes_follow_from_the_seed() -> None:
    first, again, other = (looks(augmented(seed=seed), 4 * SAMPLES) for seed in (0, 0, 1))
    assert first == again
    assert not any(set(first[index]) & set(other[index]) for index in first)


@pytest.mark.parametrize("processes", [2, 3])
def test_hosts_change_images_as_one_host_does(processes: int) -> None:
    """What the hosts read together is what one reads alone, in every epoch."""

    def shown(places: int, process: int, processes: int) -> list[tuple[int, int, bytes]]:
        samples = stream(augmented(), process, processes)
        features = [samples[place].features for place in range(places)]
        return [(int(f["text_source_ids"][0]), int(f["text_sample_ids"][0]), f["patches"].tobytes()) for f in features]

    alone = shown(10 * SAMPLES, 0, 1)
    parts = [shown(10 * SAMPLES // processes, process, processes) for process in range(processes)]
    assert sorted(alone) == sorted(sample for part in parts for sample in part)


@pytest.mark.parametrize("other", [{"threads": 4}, pytest.param({"workers": 2}, marks=pytest.mark.slow)])
def test_threads_and_processes_change_images_as_one_thread_does(other: dict[str, int]) -> None:
    plain, many = (
        iter(make_dataset(augmented(**changes), [Noise(), Noise()], TOKENIZER)) for changes in ({"threads": 0}, other)
    )
    for _ in range(8):
        jax.tree.map(np.testing.assert_array_equal, next(plain), next(many))
        assert plain.get_state() == many.get_state()


def test_changes_are_the_same_after_a_restart() -> None:
    dataset = make_dataset(augmented(), [Noise(), Noise()], TOKENIZER)
    iterator = iter(dataset)
    states, batches = [], []
    for _ in range(9):
        states.append(json.dumps(iterator.get_state()))
        batches.append(next(iterator))
    assert sum(len(samples_of(batch)) for batch in batches) > 3 * 2 * SAMPLES
    for start in (2, 7):
        resumed = iter(dataset)
        resumed.set_state(json.loads(states[start]))
        for expected in batches[start:]:
            jax.tree.map(np.testing.assert_array_equal, next(resumed), expected)


def test_the_order_of_samples_is_the_one_it_always_was() -> None:
    """A run that goes on, and one that is compared with an older one, read the same samples."""
    lengths, weights, repeats = (5, 3, 8), (1.0, 2.0, 0.5), (1.0, 2.4, 0.5)
    entries = [SourceConfig(f"s{i}", weights[i], repeat=repeats[i]) for i in range(3)]
    readers = [lambda index, place, i=i: (i, index) for i in range(3)]

    def order(process: int, processes: int, seed: int) -> list[tuple[int, int]]:
        data = DataConfig(tuple(entries), seed=seed)
        sources = [FeatureSource([None] * n, f"s{i}", i, Config(), None, {}) for i, n in enumerate(lengths)]
        samples = mix(data, sources, readers, Quarantine(), process, processes)
        return [samples[place] for place in range(300)]

    assert order(0, 1, 0)[:8] == [(0, 2), (1, 1), (1, 2), (0, 3), (1, 0), (1, 1), (2, 1), (0, 0)]
    orders = [order(process, processes, seed) for process, processes in ((0, 1), (1, 3), (2, 3)) for seed in (0, 7)]
    assert hashlib.sha256(json.dumps(orders).encode()).hexdigest().startswith("0141014d52699acd")
