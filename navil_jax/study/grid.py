"""What a study runs: a Python file with `get_study() -> Study`.

A study is a set of runs. Each takes one of the study's language models, an encoder of some depth and width, experts or
none, a language model that was pre-trained on text or not, and a share of the data. All other settings are those of
`Study.base`.
"""

import dataclasses
import itertools
import runpy
from collections.abc import Iterable, Mapping
from pathlib import Path

from navil_jax.config import Config, DecoderConfig, SourceConfig, VisionConfig, validate
from navil_jax.config.flags import found_recipe, neighbours_importable
from navil_jax.data.sources import expand_meta, has_split
from navil_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a study."""

    llm: str  # a key of Study.llms
    encoder: tuple[int, int]  # depth, width
    ffn_experts: bool = True
    attention_experts: bool = True
    initialised: bool = True  # the language model was pre-trained on text
    data_share: float = 1.0  # of every source's samples
    seed: int = 0

    @property
    def name(self) -> str:
        """Names its folder. Example: "l2-3x64-fa-init-s0" """
        experts = ("f" if self.ffn_experts else "") + ("a" if self.attention_experts else "") or "none"
        share = "" if self.data_share == 1 else f"-d{self.data_share:g}"
        start = "init" if self.initialised else "scratch"
        return f"{self.llm}-{self.encoder[0]}x{self.encoder[1]}-{experts}-{start}{share}-s{self.seed}"


@dataclasses.dataclass(frozen=True)
class Study:
    """A grid of runs.

    Attributes:
      base: what all runs share: data, optimizer, steps, evaluations. The width of a vision head, and everything else
        of the encoder but its depth and width, is that of `base.model.vision`.
      llms: name -> decoder without experts.
      runs: in the order in which they are made.
      language: how a language model is pre-trained on text: steps, optimizer, rows and slots; None: no run is
        initialised, or `language_models` says where from.
      language_models: name of an LLM -> folder of a pre-trained one, in the place of those trained here.
      text_bytes: of text for pre-training.
      metric: sources whose held-out loss counts, averaged; empty: all that have held-out samples.
    """

    name: str
    base: Config
    llms: Mapping[str, DecoderConfig]
    runs: tuple[Run, ...]
    language: Config | None = None
    language_models: Mapping[str, str] = dataclasses.field(default_factory=dict)
    text_bytes: int = 1_000_000
    metric: tuple[str, ...] = ()


def grid(
    llms: Iterable[str],
    encoders: Iterable[tuple[int, int]],
    experts: Iterable[tuple[bool, bool]] = ((True, True),),
    initialised: Iterable[bool] = (True,),
    data_shares: Iterable[float] = (1.0,),
    seeds: Iterable[int] = (0,),
) -> tuple[Run, ...]:
    """All combinations; `experts` are pairs (in the feed-forward layers, in attention)."""
    return tuple(
        Run(llm, encoder, ffn, attention, start, share, seed)
        for seed, llm, encoder, (ffn, attention), start, share in itertools.product(
            seeds, llms, encoders, experts, initialised, data_shares
        )
    )


def union(*grids: Iterable[Run]) -> tuple[Run, ...]:
    """Runs of several grids, each once; those of low seeds first, so that an unfinished study has whole grids."""
    return tuple(sorted(dict.fromkeys(itertools.chain(*grids)), key=lambda run: run.seed))


def load_study(path: Path) -> Study:
    """Runs a study file, which may import those beside it, and checks every run's config.

    Raises:
      UserError: no such file, no `get_study`, an error in it, or a run that cannot be.
    """
    path = found_recipe(path, "study")
    try:
        with neighbours_importable(path.resolve().parent):
            study = runpy.run_path(str(path))["get_study"]()
    except KeyError as error:
        raise UserError(f"{path}: defines no get_study(), or KeyError: {error}") from error
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(study, Study):
        raise UserError(f"{path}: get_study() returned {type(study).__name__}, not navil_jax.study.grid.Study")
    try:
        check_study(study)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return study


def check_study(study: Study) -> None:
    """Raises `UserError` for a study that cannot run."""
    base, names = study.base, [source.name for source in study.base.data.sources]
    if not study.runs:
        raise UserError("runs: the study has none")
    if base.model.vision is None:
        raise UserError("base.model.vision: a study needs an encoder")
    if unknown := [name for name in study.metric if name not in names]:
        raise UserError(f"metric: {unknown[0]!r} is not among the sources {', '.join(names)}")
    if not any(has_split(source, "test") for source in base.data.sources):
        raise UserError("base.data.sources: none has held-out samples, so no loss could be measured")
    for run in study.runs:
        if run.llm not in study.llms:
            raise UserError(f"runs: {run.name}: no LLM {run.llm!r}; the study has {', '.join(study.llms)}")
        if not 0 < run.data_share <= 1:
            raise UserError(f"runs: {run.name}: data_share {run.data_share} is no share, from above 0 to 1")
        if run.initialised and study.language is None and run.llm not in study.language_models:
            raise UserError(f"runs: {run.name}: is initialised, but neither language nor language_models says how")
        run_config(study, run, Path())


def run_config(study: Study, run: Run, folder: Path) -> Config:
    """The config of a run in a study's folder."""
    base = study.base
    assert base.model.vision is not None  # check_study
    vision = encoder_config(base.model.vision, *run.encoder, where=run.name)
    decoder = dataclasses.replace(
        study.llms[run.llm], ffn_experts=run.ffn_experts, attention_experts=run.attention_experts
    )
    sources = tuple(part for source in base.data.sources for part in _share_of(base, source, run.data_share))
    config = dataclasses.replace(
        base,
        workdir=str(folder / "runs" / run.name),
        init_from=str(folder / "init" / run.name) if run.initialised else "",
        seed=run.seed,
        model=dataclasses.replace(base.model, vision=vision, decoder=decoder),
        data=dataclasses.replace(
            base.data, sources=sources, seed=run.seed, tokenizer=base.data.tokenizer or str(folder / "tokenizer")
        ),
    )
    validate(config)
    return config


def _share_of(base: Config, source: SourceConfig, share: float) -> tuple[SourceConfig, ...]:
    """The source with the first `share` of its samples alone, of each part where it is a meta file.

    Half of an epoch of two passes would be one pass over all samples, so an epoch of a share has at most one pass.
    """
    if share == 1:
        return (source,)
    parts = expand_meta(source, base)
    return tuple(dataclasses.replace(part, repeat=min(part.repeat, 1) * share) for part in parts)


def encoder_config(vision: VisionConfig, depth: int, width: int, where: str = "") -> VisionConfig:
    """An encoder of 12 * depth * width^2 parameters with heads as wide as those of `vision`."""
    if width % vision.head_dim:
        raise UserError(f"{where}: encoder width {width} is not a multiple of the heads' {vision.head_dim}")
    return dataclasses.replace(vision, depth=depth, width=width, mlp_dim=4 * width, num_heads=width // vision.head_dim)


def language_config(study: Study, llm: str, folder: Path) -> Config:
    """The config of the pre-training of a language model on text, of a study that says how."""
    language = study.language
    assert language is not None
    decoder = dataclasses.replace(study.llms[llm], ffn_experts=False, attention_experts=False)
    source = SourceConfig(
        "text",
        kind="llava",
        path=str(folder / "text" / "train.jsonl"),
        held_out=str(folder / "text" / "held_out.jsonl"),
    )
    config = dataclasses.replace(
        language,
        workdir=str(folder / "language" / llm),
        model=dataclasses.replace(language.model, vision=None, decoder=decoder, special_token_ids=()),
        data=dataclasses.replace(
            language.data,
            sources=(source,),
            tokenizer=study.base.data.tokenizer or str(folder / "tokenizer"),
            template=study.base.data.template,
        ),
    )
    validate(config)
    return config
