"""navil_jax: NaViL native multimodal language models in JAX."""

from __future__ import annotations

import os
import signal
import sys
import typing

if typing.TYPE_CHECKING:
    import types
    from pathlib import Path

    from jax.sharding import Mesh

    from navil_jax.convert.loading import Pretrained


def load_pretrained(path: str | Path, mesh: Mesh | None = None, tokenizer: str = "") -> Pretrained:
    """A model with its config, tokenizer and preprocessing, from a folder of any kind.

    Args:
      path: workdir of a run (or its newest checkpoint), a Hugging Face folder of NaViL or of a language model, or an id
        on the hub such as OpenGVLab/NaViL-2B.
      mesh: devices to spread the parameters over; None: all.
      tokenizer: folder of the tokenizer, for a Hugging Face folder that has none.

    Raises:
      UserError: the checkpoint is not whole, or of an architecture that is not known.
      TypeError: `path` is no name of a folder.

    Example:
      loaded = navil_jax.load_pretrained("NaViL-2B")
      loaded.ask("What animal is this?", ["cat.png"])  # "A cat."
      x, _ = loaded.model(batch)  # [B, L, H]
    """
    from navil_jax.convert import loading  # JAX starts when a model is loaded, not when the package is imported

    return loading.load_pretrained(path, mesh, tokenizer)


def _interrupt(number: int, frame: types.FrameType | None) -> None:
    """Ctrl-C: where modules are imported, which cannot bear an exception, or nobody awaits one, the process ends."""
    awaited = False
    while frame is not None:
        if "importlib._bootstrap" in frame.f_code.co_filename:
            awaited = False
            break
        awaited |= frame.f_code.co_filename == _DOOR
        frame = frame.f_back
    if awaited:
        raise KeyboardInterrupt
    os.write(2, b"stopped\n")
    os._exit(130)


_DOOR = os.path.join(os.path.dirname(__file__), "errors.py")  # what catches it
_IS_COMMAND = sys.argv[:1] == ["-m"] or os.path.basename((sys.argv or [""])[0]).startswith("navil-")
if _IS_COMMAND and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # some run where Ctrl-C is ignored
    signal.signal(signal.SIGINT, _interrupt)
