"""A checkpoint of either format as a model in memory."""

import dataclasses
from pathlib import Path

import jax
from jax.sharding import Mesh

from navil_jax.config import Config, ImageConfig, MeshConfig
from navil_jax.convert.opening import OpenCheckpoint, open_checkpoint, require_whole
from navil_jax.convert.params import iterate_params
from navil_jax.data.tokenizers.base import Tokenizer
from navil_jax.model import params as model_params
from navil_jax.model.navil import NaViL
from navil_jax.model.params import Params
from navil_jax.sharding import make_mesh
from navil_jax.train.checkpoint import Checkpoints, find_checkpoints


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model with what belongs to it.

    Attributes:
      model: the Flax module with its parameters.
      config: of the run, or what the folder's config.json says of model, images and prompt.
      tokenizer: of the checkpoint.
    """

    model: NaViL
    config: Config
    tokenizer: Tokenizer

    @property
    def images(self) -> ImageConfig:
        """How images are prepared for it: `data.images.image_patches(image, images, config.model.vision)`."""
        return self.config.images


def load_pretrained(path: str | Path, mesh: Mesh | None = None, tokenizer: str = "") -> Pretrained:
    """See `navil_jax.load_pretrained`."""
    mesh = mesh or make_mesh(MeshConfig())
    with open_checkpoint(path, tokenizer) as checkpoint:
        require_whole(checkpoint)
        whole = checkpoint.kind == "orbax" and not checkpoint.combined
        params = _restore(checkpoint, mesh) if whole else _read(checkpoint, mesh)
        return Pretrained(model_params.bind(checkpoint.config.model, params), checkpoint.config, checkpoint.tokenizer)


def _restore(checkpoint: OpenCheckpoint, mesh: Mesh) -> Params:
    model = checkpoint.config.model
    wanted = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        model_params.shapes(model),
        model_params.shardings(model, mesh),
    )
    with Checkpoints(find_checkpoints(checkpoint.path)) as checkpoints:
        return checkpoints.restore_params(wanted)


def _read(checkpoint: OpenCheckpoint, mesh: Mesh) -> Params:
    """One parameter after the other, so that the host never holds all."""
    model = checkpoint.config.model
    shardings = model_params.flatten(model_params.shardings(model, mesh))
    params = iterate_params(model, checkpoint.tensors)
    return model_params.unflatten({name: jax.device_put(value, shardings[name]) for name, value in params})
