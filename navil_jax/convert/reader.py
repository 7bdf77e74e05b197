"""The weight files of a PyTorch checkpoint folder: what they hold, and each tensor as a view on its file."""

import logging
import mmap
import os
import re
import weakref
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import numpy as np

from navil_jax.convert.stored import DTYPES, StoredTensor, are_counts, listed, parsed
from navil_jax.convert.torch_pickle import pickled_tensors
from navil_jax.errors import UserError

_LFS_POINTER = b"version https://git-lfs"
_WEIGHTS = re.compile(r"pytorch_model.*\.bin|.*\.safetensors")
_log = logging.getLogger(__name__)
_LARGEST_HEADER = 100_000_000  # of the safetensors format


class TensorFolder(Mapping[str, np.ndarray]):
    """The tensors of a checkpoint folder, by name; a tensor is read when it is asked for.

    The files are those that the released code would load: model.safetensors, else model.safetensors.index.json and its
    shards, else shards without an index, else the same of pytorch_model.bin. Opening the folder reads no tensor, but
    checks that every file is whole and that index and shards agree. Links, as in a hub cache, keep their own names.

    Attributes:
      tensors: shape, dtype and place of every tensor, by name.

    Raises:
      UserError: no folder, no weight file, or faults in the files; all faults are listed.

    Example:
      folder = TensorFolder(Path("internlm2-1_8b"))
      folder.tensors["output.weight"].shape  ->  (92544, 2048)
      folder.read("output.weight")           ->  array [92544, 2048] bfloat16
    """

    def __init__(self, folder: Path) -> None:
        self.tensors = _open(folder)
        _tell_of_others(folder, {tensor.file.name for tensor in self.tensors.values()})
        self._maps: dict[Path, mmap.mmap] = {}

    def read(self, name: str) -> np.ndarray:
        """The tensor as a read-only view on its file; memory is given back when the last view of it is gone.

        Raises:
          KeyError: there is no such tensor.
        """
        tensor = self.tensors[name]
        if tensor.nbytes == 0:
            return np.empty(tensor.shape, tensor.dtype)
        if tensor.file not in self._maps:
            with tensor.file.open("rb") as opened:
                self._maps[tensor.file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        mapped = self._maps[tensor.file]
        array = np.ndarray(tensor.shape, tensor.dtype, mapped, tensor.offset, tensor.strides)
        before = tensor.offset % mmap.PAGESIZE
        pages = tensor.offset - before, before + tensor.span
        weakref.finalize(array, mapped.madvise, mmap.MADV_DONTNEED, *pages).atexit = False
        return array

    __getitem__ = read

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def _open(folder: Path) -> dict[str, StoredTensor]:
    files, index = _find(folder)
    found: dict[str, StoredTensor] = {}
    problems = []
    for file in files:
        placed = {name for name, shard in index.items() if shard == file.name}
        try:
            tensors = _stored_tensors(file)
        except FileNotFoundError:
            lost = f", and with it {len(placed)} tensors of the index" if index else ""
            problems.append(f"{file}: missing{lost}; download it again")
            continue
        except OSError as error:
            problems.append(f"{file}: cannot be read ({error.strerror}); make it readable")
            continue
        except UserError as error:
            problems.append(str(error))
            continue
        if absent := sorted(placed - tensors.keys()):
            problems.append(
                f"{file}: lacks {listed(absent, ', ', 5)}, which the index places in it; download both again"
            )
        if index and (more := sorted(tensors.keys() - placed)):
            problems.append(f"{file}: the index does not name its {listed(more, ', ', 5)}; download both again")
        for name in sorted(tensors.keys() & found.keys()):
            problems.append(f"{file}: {name} is also in {found[name].file.name}; remove the file that is wrong")
        found |= tensors
    if problems:
        raise UserError(listed(problems))
    return found


def _tell_of_others(folder: Path, read: Set[str]) -> None:
    """Warns of weight files that are passed over, as other programs may have written other weights into them."""
    others = sorted(file.name for file in folder.iterdir() if _WEIGHTS.fullmatch(file.name) and file.name not in read)
    if others and read:
        files = f"{min(read)}{f' and {len(read) - 1} more' if len(read) > 1 else ''}"
        _log.warning("%s: the weights are read from %s, and not from %s", folder, files, listed(others, ", ", 3))


def _find(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """(files that should be there, file name of each tensor by the index), the latter empty without an index."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a checkpoint")
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        single = folder / f"{stem}{suffix}"
        if os.path.lexists(single):
            return [single], {}
        index_file = folder / f"{stem}{suffix}.index.json"
        if os.path.lexists(index_file):
            index = _read_index(index_file)
            return [folder / name for name in sorted(set(index.values()))], index
        shard = re.compile(rf"{stem}-(\d+)-of-(\d+){re.escape(suffix)}")
        if matches := [match for file in folder.iterdir() if (match := shard.fullmatch(file.name))]:
            counts = {match[2] for match in matches}
            numbers = {(f"{n + 1:0{len(count)}d}", count) for count in counts for n in range(int(count))}
            return [folder / f"{stem}-{number}-of-{count}{suffix}" for number, count in sorted(numbers)], {}
    raise UserError(f"{folder}: no model*.safetensors and no pytorch_model*.bin; give the folder of a checkpoint")


def _read_index(file: Path) -> dict[str, str]:
    try:
        index = parsed(file.read_bytes())["weight_map"]
        if not all(isinstance(shard, str) and Path(shard).name == shard for shard in index.values()):
            raise ValueError("weight_map")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not JSON with a weight_map from tensors to files; download it again") from error
    return index


def _stored_tensors(file: Path) -> dict[str, StoredTensor]:
    with file.open("rb") as opened:
        if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UserError(f"{file}: a git-lfs pointer, not the data; run `git lfs pull` in its folder")
    return pickled_tensors(file) if file.suffix == ".bin" else _safetensors(file)


def _safetensors(file: Path) -> dict[str, StoredTensor]:
    """What the header of a safetensors file says: 8 bytes of length (little-endian), JSON, then the data."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        start = 8 + length
        if start > size or length > _LARGEST_HEADER:
            raise UserError(f"{file}: truncated, or not a safetensors file ({size:,} bytes); download it again")
        header = opened.read(length)
    tensors, unreadable, place = {}, [], 0
    try:
        entries = {name: entry for name, entry in parsed(header).items() if name != "__metadata__"}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            if code not in DTYPES:
                unreadable.append(f"{name} is {code}")
            else:
                tensors[name] = StoredTensor(shape, DTYPES[code], file, start + begin)
                if not are_counts(begin, end, *shape) or tensors[name].nbytes != end - begin:
                    raise ValueError(name)
            if begin != place:
                raise ValueError(name)
            place = end
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: its header is damaged ({error}); download it again") from error
    if unreadable:
        raise UserError(f"{file}: dtypes that cannot be read: {listed(unreadable, ', ', 5)}; save it in another one")
    if start + place != size:
        raise UserError(f"{file}: {size:,} bytes where its header asks for {start + place:,}; download it again")
    return {name: tensors[name] for name in entries}
