"""Typed configs: what a recipe in `configs/` may say, with the defaults of the paper.

A recipe is a Python file with `get_config() -> Config`. Every dimension and behaviour of the model, the data and the
run is a field here; `flags.py` turns `--config.a.b=c` into changes of them. Frozen, so that a config can be a
static argument of a compiled function.
"""

import dataclasses
from typing import Literal

from navil_jax.errors import UserError

# The special tokens in the order of the rows of the released `special_token_embedding`.
SPECIAL_TOKENS = (
    "</box>",
    "<box>",
    "<IMG_CONTEXT>",
    "</img>",
    "<img>",
    "</quad>",
    "<quad>",
    "</ref>",
    "<ref>",
    "<img_uncond>",
    "<IMG_LINE_BREAK>",
    "<IMG_FRAME_BREAK>",
)

# The system message of a released model whose config.json has none.
DEFAULT_SYSTEM_MESSAGE = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"  # noqa: RUF001
)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The any-resolution vision encoder (paper section 3.2; every field of the released vision_config that acts)."""

    depth: int = 24
    width: int = 1472
    mlp_dim: int = 5888
    num_heads: int = 23
    patch_size: int = 16
    merge_size: int = 2  # a merged unit is merge_size x merge_size patches
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    rope_theta: float = 10000.0
    full_attention_layers: tuple[int, ...] | None = None  # None: every layer is full; else the others are windowed
    window_size: int = 8  # side of a window, in patches
    window_order: bool = True  # patches stand in window order, as the released code always has them
    layer_scale_init: float = 0.1

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def patch_dim(self) -> int:
        return 3 * self.patch_size**2

    @property
    def unit_patches(self) -> int:
        """Patches of one merged unit, which fills one visual token."""
        return self.merge_size**2


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The language model with modality-specific experts (paper section 3.3)."""

    family: str = "internlm2"  # file of convert/families that names the tensors in checkpoints; no behaviour
    depth: int = 24
    width: int = 2048
    mlp_dim: int = 8192
    num_heads: int = 16
    num_kv_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 92556
    norm_eps: float = 1e-5
    rope_theta: float = 1e6
    rope_scaling: Literal["none", "linear", "dynamic"] = "none"
    rope_factor: float = 1.0
    max_positions: int = 32768
    qkv_bias: bool = False  # of queries, keys and values
    out_bias: bool = False  # of the attention's output projection
    qk_norm: bool = False  # RMSNorm of every query and key head before the rotation (Qwen3)
    attention_experts: bool = True  # visual tokens have their own attention projections
    ffn_experts: bool = True  # visual tokens have their own feed-forward weights
    serial_visual_output: bool = True  # a visual token's output is wo_ve(wo(a)) (InternLM2) instead of wo_ve(a)
    tie_embeddings: bool = False
    pad_token_id: int | None = None  # its embedding row gets no gradient, as in the released code


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A whole NaViL, or a plain language model where `vision` is None."""

    vision: VisionConfig | None = VisionConfig()
    decoder: DecoderConfig = DecoderConfig()
    special_token_ids: tuple[int, ...] = tuple(range(92544, 92556))  # in the order of SPECIAL_TOKENS
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of frozen parameters; what trains is float32
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # Gradients of matrices are summed over devices in it. Sums over the tokens of a device are always float32.
    gradient_sums: Literal["compute", "float32"] = "compute"
    # What the backward pass recomputes of a layer: nothing; all; all but attention; all but matmuls; or all, from
    # inputs that wait in the host's memory.
    remat: Literal["none", "full", "attention", "dots", "offload"] = "attention"
    attention: Literal["auto", "xla", "splash"] = "auto"  # auto: splash on TPU, XLA elsewhere
    lora_rank: int = 0  # of the updates (lora_a, lora_b) that every matrix of the layers gets, to fine-tune; 0: none
    lora_scale: float = 2.0  # factor of these updates (alpha / rank)

    @property
    def encoder(self) -> VisionConfig:
        """`vision`, of a model that has it."""
        if self.vision is None:
            raise ValueError("config.model.vision: this model reads no images")
        return self.vision

    @property
    def sum_dtype(self) -> str:
        """The dtype in which gradients of matrices are summed over devices."""
        return self.compute_dtype if self.gradient_sums == "compute" else "float32"

    def special_id(self, token: str) -> int:
        """The id of one of SPECIAL_TOKENS."""
        return self.special_token_ids[SPECIAL_TOKENS.index(token)]

    @property
    def visual_token_ids(self) -> tuple[int, int]:
        """Ids that use the visual weights: `<IMG_CONTEXT>` and `<img>` (released behaviour)."""
        return self.special_id("<IMG_CONTEXT>"), self.special_id("<img>")


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """How an image becomes patches (paper section 3.2; released preprocessing)."""

    min_patches: int = 256
    max_patches: int = 24576
    multiscale: bool = True  # also smaller copies, each about half the pixels of the one before
    scale_factor: float = 0.7071  # side of one scale against the next larger


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One data source of the mixture."""

    name: str  # a key of data.sources.SOURCES; where `kind` is given, any name for logs
    weight: float = 1.0  # share of samples drawn from it, against the other weights
    kind: str = ""  # format of the files: array_record, llava, meta, webdataset, parquet, huggingface, tfds
    path: str = ""  # file, folder, pattern or address (gs://...) of the training samples
    held_out: str = ""  # the same for held-out samples; empty: the source is not evaluated
    root: str = ""  # folder of the images that records name; empty: that of the file
    repeat: float = 1.0  # passes over its samples that are shuffled as one; below 1: only the first part of them
    prompt: str = ""  # question of samples that are a caption only; empty: data.sources.CAPTION_PROMPT
    system_message: str | None = None  # none: data.system_message; a message that a sample brings counts first
    max_patches: int | None = None  # of an image's largest scale; none: images.max_patches
    loss_weight: Literal["token", "sample", "square"] | None = None  # none: data.loss_weight
    transforms: tuple[str, ...] = ()  # what changes training samples, in order: jpeg, resolution, or module:function


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Sources, the packed batch's shape, and how samples become tokens."""

    sources: tuple[SourceConfig, ...] = ()
    rows: int = 8  # packed rows of one global batch
    visual_slots: int = 8192
    text_slots: int = 8192
    patch_slots: int = 24576
    packing_lookahead: int = 32  # rows' worth of samples of which a row takes what fills it; more waste less
    balance_window: int = 1  # steps among which rows are grouped by the cost of their attention; 1: as they are packed
    oversize: Literal["drop", "resize", "error"] = "drop"  # samples longer than a row; resize: their images
    tokenizer: str = ""  # folder with tokenizer.model or tokenizer.json; empty: one is trained on the text
    tokenizer_size: int = 1024  # pieces of a tokenizer that is trained
    template: Literal["internlm2-chat", "qwen3-chat"] = "internlm2-chat"
    system_message: str = ""
    loss_weight: Literal["token", "sample", "square"] = "square"  # 1, 1/n, 1/sqrt(n) with n the sample's label tokens
    quarantine: str = ""  # file with a list of bad samples that are not read, beside the run's own
    max_bad_share: float = 0.01  # of the samples read (from 1,000 on); more bad ones stop the run
    threads: int = 2  # that read samples
    workers: int = 0  # processes that read samples in the place of threads
    seed: int = 0


# Biases, the scales of norms and layer scales.
NO_DECAY = ("**/bias", "**/scale", "**/ls1", "**/ls2")


@dataclasses.dataclass(frozen=True)
class ScaleConfig:
    """A factor of the learning rate of some parameters. No parameter may have two."""

    pattern: str  # of parameter names, such as vision/**
    scale: float


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (paper, table of training settings) or Muon; parameters are chosen by patterns of their names.

    In a pattern * stands for anything between two slashes and ** for any number of names with slashes between them
    (docs/recipe.md, "Choosing parameters").
    """

    algorithm: Literal["adamw", "muon"] = "adamw"  # muon: orthogonal updates of the layers' matrices, Adam for the rest
    peak_learning_rate: float = 5e-5
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 200
    final_learning_rate: float = 0.0  # where the cosine ends
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    microbatches: int = 1  # into which a batch is cut, one computed after the other; the same step with less memory
    ema_decay: float = 0.0  # of a running average of the trained parameters, kept beside them; 0: none
    # What a loss or gradient that is not finite does. Skip: no update, but the step counts, and so do its samples: the
    # schedule goes on and they are not read again.
    not_finite: Literal["stop", "skip"] = "stop"
    spikes: Literal["note", "skip", "stop"] = "note"  # what a loss far above the last ones does; skip: as above
    spike_deviations: float = 8.0  # standard deviations of the last losses above their mean that make a spike
    max_skipped: int = 10  # steps skipped one after the other; more stop the run
    trainable: tuple[str, ...] = ("**",)  # patterns of what trains, such as vision/**,connector/**; the rest is frozen
    no_decay: tuple[str, ...] = NO_DECAY  # patterns of what has no weight decay
    learning_rate_scales: tuple[ScaleConfig, ...] = ()


@dataclasses.dataclass(frozen=True)
class AxisRule:
    """A row of the table from logical axes to mesh axes that differs from `sharding.RULES`."""

    axis: str  # logical axis, such as embed
    mesh_axes: tuple[str, ...] = ()  # that split it; none: it is kept whole


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 takes what the others leave. Slices of a pod divide the data axis."""

    data: int = 1  # rows of the batch, parameters whole on each
    fsdp: int = -1  # rows of the batch, parameters split
    tensor: int = 1  # heads and feed-forward width
    context: int = 1  # context parallelism: positions of a row; inside attention heads (Ulysses)
    rules: tuple[AxisRule, ...] = ()


@dataclasses.dataclass(frozen=True)
class EvaluatorConfig:
    """What is measured on held-out samples: by a name of `train.evaluators.EVALUATORS`, or "package.module:Class"."""

    name: str
    every: int | None = None  # steps between evaluations; none: eval_every; 0: only at the end
    samples: int | None = None  # of every source each time; none: eval_samples; at the end all are used


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    workdir: str = ""
    init_from: str = ""  # workdir of the run whose newest parameters and tokenizer this one starts with; empty: fresh
    seed: int = 0
    init_model: bool = False  # model, template and image settings are those of init_from, not the recipe's
    resume_with: str = ""  # keys that change in a run that goes on: optimizer.peak_learning_rate,data.sources
    steps: int = 1000
    batch_samples: int = 0  # steps of run and schedule are so many samples each, however many rows that takes; 0: steps
    model: ModelConfig = ModelConfig()
    images: ImageConfig = ImageConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    log_every: int = 10
    profile_steps: tuple[int, ...] = ()  # first and last step of an xprof trace in <workdir>/profile; none: no trace
    evaluators: tuple[EvaluatorConfig, ...] = (EvaluatorConfig("held_out"),)  # what is measured, see EvaluatorConfig
    eval_every: int = 0  # steps between evaluations; 0: at the end only
    eval_samples: int = 0  # held-out samples per source for evaluations during the run; 0: all
    eval_baseline_samples: int = 10_000  # training samples that the report's question-only baseline learns from
    eval_ema: bool = True  # evaluations use the running average where there is one (optimizer.ema_decay)
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2


def validate(config: Config) -> None:
    """Raises a `UserError` that names the key for combinations that cannot work."""

    def require(good: bool, key: str, why: str) -> None:
        if not good:
            raise UserError(f"config.{key}: {why}")

    decoder, vision, data, optimizer = config.model.decoder, config.model.vision, config.data, config.optimizer
    positive = ("depth", "width", "mlp_dim", "num_heads")
    groups = [
        ("", config, ("steps", "log_every", "checkpoint_every", "keep_checkpoints")),
        ("model.decoder.", decoder, (*positive, "num_kv_heads", "head_dim", "vocab_size")),
        ("model.vision.", vision, (*positive, "patch_size", "merge_size", "window_size")),
        (
            "data.",
            data,
            ("rows", "visual_slots", "text_slots", "patch_slots", "packing_lookahead", "balance_window", "threads"),
        ),
        (
            "optimizer.",
            optimizer,
            ("peak_learning_rate", "eps", "clip_norm", "microbatches", "spike_deviations", "max_skipped"),
        ),
    ]
    for prefix, group, keys in groups:
        for key in keys if group else ():
            require(getattr(group, key) > 0, prefix + key, "must be positive")
    require(data.workers >= 0, "data.workers", "must not be negative")
    require(config.batch_samples >= 0, "batch_samples", "must not be negative")
    require(0 <= optimizer.ema_decay < 1, "optimizer.ema_decay", "must be at least 0 and below 1")
    require(
        data.rows % optimizer.microbatches == 0,
        "optimizer.microbatches",
        f"data.rows = {data.rows} cannot be cut into {optimizer.microbatches} microbatches",
    )
    require(
        not config.init_model or bool(config.init_from),
        "init_model",
        "says to take the model of init_from, which is empty",
    )
    require(
        len(config.profile_steps) in (0, 2) and sorted((1, *config.profile_steps)) == [1, *config.profile_steps],
        "profile_steps",
        "must be the first and the last step to trace, such as 20,23",
    )
    require(config.model.lora_rank >= 0, "model.lora_rank", "must not be negative")
    require(0 <= data.max_bad_share <= 1, "data.max_bad_share", "is a share, from 0 to 1")
    for number, source in enumerate(data.sources):
        key = f"data.sources.{number}."
        require(source.weight > 0, key + "weight", "must be positive")
        require(source.repeat > 0, key + "repeat", "must be positive")
        require(not source.kind or bool(source.path), key + "path", f"no path to the data of kind {source.kind}")
        require(not source.path or bool(source.kind), key + "kind", f"which format has {source.path}?")
        require(
            source.max_patches is None or source.max_patches >= config.images.min_patches,
            key + "max_patches",
            f"{source.max_patches} is below images.min_patches = {config.images.min_patches}",
        )
    require(bool(optimizer.trainable), "optimizer.trainable", "no pattern, so nothing would be trained")
    for number, entry in enumerate(optimizer.learning_rate_scales):
        require(entry.scale > 0, f"optimizer.learning_rate_scales.{number}.scale", "must be positive")
    require(
        decoder.num_heads % decoder.num_kv_heads == 0,
        "model.decoder.num_heads",
        f"{decoder.num_heads} is not a multiple of num_kv_heads = {decoder.num_kv_heads}",
    )
    require(decoder.head_dim % 2 == 0, "model.decoder.head_dim", f"{decoder.head_dim} is odd, RoPE needs it even")
    require(
        len(config.model.special_token_ids) in (0, len(SPECIAL_TOKENS)),
        "model.special_token_ids",
        f"{len(config.model.special_token_ids)} ids given, {len(SPECIAL_TOKENS)} needed (order of SPECIAL_TOKENS)",
    )
    require(
        all(0 <= i < decoder.vocab_size for i in config.model.special_token_ids),
        "model.special_token_ids",
        f"an id lies outside the vocabulary of {decoder.vocab_size}",
    )
    if vision is not None:
        require(
            vision.width % vision.num_heads == 0,
            "model.vision.num_heads",
            f"width {vision.width} is not a multiple of {vision.num_heads}",
        )
        require(vision.head_dim % 4 == 0, "model.vision.num_heads", f"head_dim {vision.head_dim} must divide by 4")
        require(
            data.patch_slots % vision.unit_patches == 0,
            "data.patch_slots",
            f"{data.patch_slots} is not a multiple of {vision.unit_patches} (patches of a merged unit)",
        )
        require(
            vision.window_size % vision.merge_size == 0,
            "model.vision.window_size",
            f"{vision.window_size} is not a multiple of merge_size = {vision.merge_size}",
        )
    require(
        config.images.min_patches <= config.images.max_patches,
        "images.min_patches",
        f"{config.images.min_patches} is above images.max_patches = {config.images.max_patches}",
    )
    require(0 < config.images.scale_factor < 1, "images.scale_factor", "must lie between 0 and 1")
    require(
        sum(size == -1 for size in dataclasses.astuple(config.mesh)) <= 1,
        "mesh",
        "at most one axis may be -1 (the rest)",
    )
