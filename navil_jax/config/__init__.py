"""Typed configs: what a recipe in `configs/` may say, with the defaults of the paper.

A recipe is a Python file with `get_config() -> Config`. Every dimension and behaviour of the model, the data and the
run is a field here; `flags.py` turns `--config.a.b=c` into changes of them. Frozen, so that a config can be a
static argument of a compiled function.
"""

import dataclasses
from typing import Literal

from navil_jax.config.checks import WITHOUT_EFFECT as WITHOUT_EFFECT
from navil_jax.config.checks import check_data, check_run, require
from navil_jax.config.ranges import (
    Amount,
    Axis,
    Between,
    Count,
    Decay,
    Factor,
    NotNegative,
    Passes,
    Positive,
    Processes,
    Seed,
    Share,
    Temperature,
    Threads,
    check_ranges,
)

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

    depth: Count = 24
    width: Count = 1472
    mlp_dim: Count = 5888
    num_heads: Count = 23
    patch_size: Count = 16
    merge_size: Count = 2  # a merged unit is merge_size x merge_size patches
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    norm_eps: Positive = 1e-6
    qkv_bias: bool = True
    rope_theta: Positive = 10000.0
    full_attention_layers: tuple[Amount, ...] | None = None  # None: every layer is full; else the others are windowed
    window_size: Count = 8  # side of a window, in patches
    window_order: bool = True  # patches stand in window order, as the released code always has them
    layer_scale_init: NotNegative = 0.1
    patch_waves: Amount = 0  # a new encoder's filters mix so many lowest frequencies along a patch's sides; 0: all

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
    depth: Count = 24
    width: Count = 2048
    mlp_dim: Count = 8192
    num_heads: Count = 16
    num_kv_heads: Count = 8
    head_dim: Count = 128
    vocab_size: Count = 92556
    norm_eps: Positive = 1e-5
    rope_theta: Positive = 1e6
    rope_scaling: Literal["none", "linear", "dynamic"] = "none"
    rope_factor: Factor = 1.0
    max_positions: Count = 32768
    qkv_bias: bool = False  # of queries, keys and values
    out_bias: bool = False  # of the attention's output projection
    qk_norm: bool = False  # RMSNorm of every query and key head before the rotation (Qwen3)
    attention_experts: bool = True  # visual tokens have their own attention projections
    ffn_experts: bool = True  # visual tokens have their own feed-forward weights
    serial_visual_output: bool = True  # a visual token's output is wo_ve(wo(a)) (InternLM2) instead of wo_ve(a)
    tie_embeddings: bool = False
    pad_token_id: Amount | None = None  # its embedding row gets no gradient, as in the released code


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A whole NaViL, or a plain language model where `vision` is None."""

    vision: VisionConfig | None = VisionConfig()
    decoder: DecoderConfig = DecoderConfig()
    special_token_ids: tuple[Amount, ...] = tuple(range(92544, 92556))  # in the order of SPECIAL_TOKENS
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of frozen parameters; what trains is float32
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # Gradients of matrices are summed over devices in it. Sums over the tokens of a device are always float32.
    gradient_sums: Literal["compute", "float32"] = "compute"
    # What the backward pass recomputes of a layer: nothing; all; all but attention; all but matmuls; or all, from
    # inputs that wait in the host's memory.
    remat: Literal["none", "full", "attention", "dots", "offload"] = "attention"
    attention: Literal["auto", "xla", "splash"] = "auto"  # auto: splash on TPU, XLA elsewhere
    lora_rank: Amount = 0  # of the updates (lora_a, lora_b) that every matrix of the layers gets, to fine-tune; 0: none
    lora_scale: Positive = 2.0  # factor of these updates (alpha / rank)

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

    min_patches: Count = 256
    max_patches: Count = 24576
    multiscale: bool = True  # also smaller copies, each about half the pixels of the one before
    scale_factor: Between = 0.7071  # side of one scale against the next larger


@dataclasses.dataclass(frozen=True)
class WeightPoint:
    """A source's weight from a step on (of config.batch_samples samples)."""

    step: Amount
    weight: NotNegative  # 0: nothing is drawn from it


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One data source of the mixture."""

    name: str  # a key of data.sources.SOURCES; where `kind` is given, any name for logs
    weight: Positive = 1.0  # share of samples drawn from it, against the other weights
    kind: str = ""  # format of the files: array_record, llava, meta, webdataset, parquet, huggingface, tfds
    path: str = ""  # file, folder, pattern or address (gs://...) of the training samples
    held_out: str = ""  # the same for held-out samples; empty: the source is not evaluated; not of kind meta
    root: str = ""  # folder of the images that records name; empty: that of the file
    repeat: Passes = 1.0  # passes over its samples that are shuffled as one; below 1: only the first part of them
    prompt: str = ""  # question of samples that are a caption only; empty: data.sources.CAPTION_PROMPT
    video_frames: Count = 8  # images that a video becomes, evenly spread; all where it has fewer
    video_fps: Positive | None = None  # frames for each second of a video, at most video_frames; none: video_frames
    boxes: Literal["", "0..1", "0..1000", "pixels"] = ""  # coordinates of <box> in its texts; empty: the records say
    system_message: str | None = None  # none: data.system_message; a message that a sample brings counts first
    max_patches: Count | None = None  # of an image's largest scale; none: images.max_patches
    loss_weight: Literal["token", "sample", "square"] | None = None  # none: data.loss_weight
    transforms: tuple[str, ...] = ()  # what changes training samples, in order: jpeg, resolution, or module:function
    leave_out: str = ""  # list of training samples that are not used, of `data clean`, or the folder with it
    weight_points: tuple[WeightPoint, ...] = ()  # other weights from later steps on, in their order

    def weighted(self, factor: float) -> "SourceConfig":
        """The source with all of its weights times a number."""
        points = tuple(WeightPoint(point.step, point.weight * factor) for point in self.weight_points)
        return dataclasses.replace(self, weight=self.weight * factor, weight_points=points)

    def weight_at(self, step: int) -> float:
        """The weight that holds at a step: of the last point until then, or `weight` before the first one."""
        return next((point.weight for point in reversed(self.weight_points) if point.step <= step), self.weight)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Sources, the packed batch's shape, and how samples become tokens."""

    sources: tuple[SourceConfig, ...] = ()
    temperature: Temperature = 0.0  # T: weights are multiplied by size^(1/T), in samples times repeat; 0: not
    rows: Count = 8  # packed rows of one global batch
    streams: Amount = 0  # shares of the data, fixed for the run; as many hosts serve them as divide it; 0: one a host
    visual_slots: Count = 8192
    text_slots: Count = 8192
    patch_slots: Count = 24576
    packing_lookahead: Count = 32  # rows' worth of samples of which a row takes what fills it; more waste less
    balance_window: Count = 1  # steps among which rows are grouped by the cost of their attention; 1: as packed
    oversize: Literal["drop", "resize", "error"] = "drop"  # samples longer than a row; resize: their images
    tokenizer: str = ""  # folder with tokenizer.model or tokenizer.json; empty: one is trained on the text
    tokenizer_size: Count = 1024  # pieces of a tokenizer that is trained
    template: Literal["internlm2-chat", "qwen3-chat"] = "internlm2-chat"
    system_message: str = ""
    loss_weight: Literal["token", "sample", "square"] = "square"  # 1, 1/n, 1/sqrt(n) with n the sample's label tokens
    quarantine: str = ""  # file with a list of bad samples that are not read, beside the run's own
    max_bad_share: Share = 0.01  # of the samples read (from 1,000 on); more bad ones stop the run
    threads: Threads = 2  # that read samples
    workers: Processes = 0  # processes that read samples in the place of threads
    seed: Seed = 0


# Biases, the scales of norms and layer scales.
NO_DECAY = ("**/bias", "**/scale", "**/ls1", "**/ls2")


@dataclasses.dataclass(frozen=True)
class ScaleConfig:
    """A factor of the learning rate of some parameters. No parameter may have two."""

    pattern: str  # of parameter names, such as vision/**
    scale: Positive


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (paper, table of training settings) or Muon; parameters are chosen by patterns of their names.

    In a pattern * stands for anything between two slashes and ** for any number of names with slashes between them
    (docs/recipe.md, "Choosing parameters").
    """

    algorithm: Literal["adamw", "muon"] = "adamw"  # muon: orthogonal updates of the layers' matrices, Adam for the rest
    peak_learning_rate: Positive = 5e-5
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: Amount = 200
    final_learning_rate: NotNegative = 0.0  # where the cosine ends
    b1: Decay = 0.9
    b2: Decay = 0.95
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.05
    clip_norm: Positive = 1.0
    microbatches: Count = 1  # into which a batch is cut, one computed after the other; the same step with less memory
    ema_decay: Decay = 0.0  # of a running average of the trained parameters, kept beside them; 0: none
    # What a loss or gradient that is not finite does. Skip: no update, but the step counts, and so do its samples: the
    # schedule goes on and they are not read again.
    not_finite: Literal["stop", "skip"] = "stop"
    spikes: Literal["note", "skip", "stop"] = "note"  # what a loss far above the last ones does; skip: as above
    spike_deviations: Positive = 8.0  # standard deviations of the last losses above their mean that make a spike
    max_skipped: Count = 10  # steps skipped one after the other; more stop the run
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

    data: Axis = 1  # rows of the batch, parameters whole on each
    fsdp: Axis = -1  # rows of the batch, parameters split
    tensor: Axis = 1  # heads and feed-forward width
    context: Axis = 1  # context parallelism: positions of a row; inside attention heads (Ulysses)
    rules: tuple[AxisRule, ...] = ()


@dataclasses.dataclass(frozen=True)
class EvaluatorConfig:
    """What is measured on held-out samples: by a name of `train.evaluators.EVALUATORS`, or "package.module:Class"."""

    name: str
    every: Amount | None = None  # steps between evaluations; none: eval_every; 0: only at the end
    samples: Amount | None = None  # of every source each time; none: eval_samples; at the end all are used
    benchmark: str = ""  # of "benchmark": docvqa, mme, ...
    data: str = ""  # of "benchmark" and "captions": file or folder with the questions
    split: str = ""  # of "benchmark"; empty: one whose answers are public
    protocol: str = ""  # of "benchmark": whose prompts and scores; empty: those of reports


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    workdir: str = ""
    init_from: str = ""  # workdir of the run whose newest parameters and tokenizer this one starts with; empty: fresh
    seed: Seed = 0
    init_model: bool = False  # model, template and image settings are those of init_from, not the recipe's
    resume_with: str = ""  # keys that change in a run that goes on: optimizer.peak_learning_rate,data.sources
    steps: Count = 1000
    batch_samples: Amount = 0  # steps of run and schedule are so many samples each, whatever rows that takes; 0: steps
    model: ModelConfig = ModelConfig()
    images: ImageConfig = ImageConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    log_every: Count = 10
    writers: tuple[str, ...] = ("tensorboard",)  # of WRITERS: what gets all scalars besides metrics.jsonl
    profile_steps: tuple[Count, ...] = ()  # first and last step of an xprof trace in <workdir>/profile; none: no trace
    evaluators: tuple[EvaluatorConfig, ...] = (EvaluatorConfig("held_out"),)  # what is measured, see EvaluatorConfig
    eval_every: Amount = 0  # steps between evaluations; 0: at the end only
    eval_samples: Amount = 0  # held-out samples per source for evaluations during the run; 0: all
    eval_baseline_samples: Amount = 10_000  # training samples that the report's question-only baseline learns from
    eval_ema: bool = True  # evaluations use the running average where there is one (optimizer.ema_decay)
    checkpoint_every: Count = 1000  # steps
    checkpoint_minutes: NotNegative = 0.0  # also when so many have passed since the last one; 0: by steps alone
    # What a run does whose newest checkpoint is damaged: it goes on from an older one that is whole, or stops.
    checkpoint_damage: Literal["older", "stop"] = "older"
    keep_checkpoints: Count = 2  # the newest ones
    keep_checkpoints_every: Amount = 0  # besides, those of steps that are multiples of it stay for good; 0: none
    keep_best_checkpoints: Amount = 0  # besides, so many that are best by best_metric
    best_metric: str = ""  # a name of metrics.jsonl, such as loss_mean or eval/web/loss
    best_mode: Literal["min", "max"] = "min"  # whether the lowest or the highest value is best


def validate(config: Config) -> None:
    """Raises a `UserError` that names the key for numbers out of their range, and for combinations that cannot work."""
    check_ranges(config)
    _check_decoder(config.model)
    _check_vision(config)
    check_data(config)
    check_run(config)


def _check_decoder(model: ModelConfig) -> None:
    decoder, key = model.decoder, "model.decoder."
    heads, kv_heads, vocab = decoder.num_heads, decoder.num_kv_heads, decoder.vocab_size
    require(heads % kv_heads == 0, key + "num_heads", f"{heads} is not a multiple of num_kv_heads = {kv_heads}")
    require(decoder.head_dim % 2 == 0, key + "head_dim", f"{decoder.head_dim} is odd, RoPE needs it even")
    scaling, factor = decoder.rope_scaling, decoder.rope_factor
    require(factor == 1 or scaling != "none", key + "rope_factor", "has no effect without rope_scaling")
    require(decoder.head_dim > 2 or scaling != "dynamic", key + "head_dim", "must be above 2 for dynamic rope_scaling")
    pad = decoder.pad_token_id
    require(pad is None or pad < vocab, key + "pad_token_id", f"{pad} lies outside the vocabulary of {vocab}")
    ids, key = model.special_token_ids, "model.special_token_ids"
    needed = len(SPECIAL_TOKENS)
    require(len(ids) in (0, needed), key, f"{len(ids)} ids given, {needed} needed (order of SPECIAL_TOKENS)")
    require(all(i < vocab for i in ids), key, f"an id lies outside the vocabulary of {vocab}")
    require(len(set(ids)) == len(ids), key, "two special tokens have the same id")


def _check_vision(config: Config) -> None:
    vision, images, key = config.model.vision, config.images, "model.vision."
    smallest, largest = images.min_patches, images.max_patches
    require(smallest <= largest, "images.min_patches", f"{smallest} is above images.max_patches = {largest}")
    if vision is None:
        return
    width, heads = vision.width, vision.num_heads
    require(width % heads == 0, key + "num_heads", f"width {width} is not a multiple of {heads}")
    require(vision.head_dim % 4 == 0, key + "num_heads", f"head_dim {vision.head_dim} must divide by 4")
    window, merge = vision.window_size, vision.merge_size
    require(window % merge == 0, key + "window_size", f"{window} is not a multiple of merge_size = {merge}")
    full = vision.full_attention_layers or ()
    beyond = [layer for layer in full if layer >= vision.depth]
    last = vision.depth - 1
    require(not beyond, key + "full_attention_layers", f"there is no layer {beyond[:1]}, the last one is {last}")
    slots, unit = config.data.patch_slots, vision.unit_patches
    require(slots % unit == 0, "data.patch_slots", f"{slots} is not a multiple of {unit} (patches of a merged unit)")
