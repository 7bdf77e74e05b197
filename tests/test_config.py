"""Recipes, flags and JSON: every mistake is one line that names the key."""

import dataclasses
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from navil_jax.config import Config, DataConfig, SourceConfig
from navil_jax.config.flags import apply_overrides, describe, load_config, parse
from navil_jax.config.plain import differences, from_json, to_json
from navil_jax.convert.hf_config import model_config, read_config
from navil_jax.errors import UserError

TWO_SOURCES = Config(data=DataConfig(sources=(SourceConfig("a"), SourceConfig("b", 3.0))))


def write_recipe(folder, text):
    path = folder / "recipe.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("steps", "1_000", 1000),
        ("model.decoder.depth", "4", 4),
        ("optimizer.eps", "1e3", 1000.0),
        ("optimizer.clip_norm", "2", 2.0),
        ("images.multiscale", "false", False),
        ("images.multiscale", "True", True),
        ("model.decoder.family", "qwen3", "qwen3"),
        ("model.decoder.pad_token_id", "none", None),
        ("model.decoder.pad_token_id", "2", 2),
        ("model.vision", "none", None),
        ("model.vision.full_attention_layers", "1,5", (1, 5)),
        ("model.vision.full_attention_layers", "(7,)", (7,)),
        ("data.sources.1.weight", "0.5", 0.5),
        ("data.sources.0.name", "x=y", "x=y"),
        ("optimizer.trainable", "vision/**, connector/**", ("vision/**", "connector/**")),
        ("data.sources.1.transforms", "jpeg", ("jpeg",)),
        ("mesh.fsdp", "-1", -1),
        ("workdir", "", ""),
    ],
)
def test_override_is_read_by_the_fields_type(key, text, value):
    changed = apply_overrides(TWO_SOURCES, {key: text})
    node = changed
    for name in key.split("."):
        node = node[int(name)] if isinstance(node, tuple) else getattr(node, name)
    assert node == value
    assert type(node) is type(value)
    assert set(differences(TWO_SOURCES, changed)) <= {key} or value is None


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("model.decoder.dept", "4", "config.model.decoder.dept: no such key, the nearest one is config.model.decoder."),
        ("decoder.depth", "4", "nearest one is config.model.decoder.depth"),
        ("data.sources.2.weight", "4", "nearest one is config.data.sources."),
        ("steps.x", "4", "nearest one is config.steps"),
        ("steps", "\u0663", "is not int"),
        ("steps", "\uff15", "is not int"),
        ("optimizer.b1", "0.\u0665", "is not float"),
        ("profile_steps", "\u0661,\u0662", "is not int"),
        ("data.sources.2.name", "x", "there are 2 entries, numbered from 0, and recipes add others"),
        ("data.sources.00.name", "x", "no such key"),
        ("data.sources.\u0660.name", "x", "no such key"),
        ("steps", "4.5", "config.steps: '4.5' is not int"),
        ("steps", "", "config.steps: '' is not int"),
        ("optimizer.eps", "nan", "config.optimizer.eps: nan is not float"),
        ("images.multiscale", "1", "config.images.multiscale: '1' is not true | false"),
        ("model.attention", "flash", "'flash' is not auto | xla | splash"),
        ("model.decoder.pad_token_id", "x", "'x' is not int or none"),
        ("model.vision.full_attention_layers", "1,a", "'1,a' is not int,int,... or none"),
        ("model.decoder", "x", "is a group of fields"),
        ("data.sources", "x", "is a group of fields"),
        ("data.sources.0", "x", "is a group of fields"),
        ("model.decoder.num_kv_heads", "5", "not a multiple"),
        ("model.decoder.num_kv_heads", "0", "config.model.decoder.num_kv_heads: must be at least 1, not 0"),
        ("optimizer.trainable", "", "config.optimizer.trainable: no pattern, so nothing would be trained"),
        ("optimizer.learning_rate_scales", "vision/**", "is a group of fields"),
        ("log_every", "0", "config.log_every: must be at least 1, not 0"),
    ],
)
def test_wrong_override_is_one_line_that_names_the_key(key, text, message):
    with pytest.raises(UserError) as error:
        apply_overrides(TWO_SOURCES, {key: text})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_overrides_are_validated_together():
    changed = apply_overrides(Config(), {"model.decoder.num_heads": "9", "model.decoder.num_kv_heads": "3"})
    assert (changed.model.decoder.num_heads, changed.model.decoder.num_kv_heads) == (9, 3)


def test_parse_takes_both_forms_and_the_commands_options(tmp_path):
    recipe = write_recipe(
        tmp_path, "from navil_jax.config import Config\ndef get_config():\n    return Config(steps=7)\n"
    )
    argv = ["--seed-file", "s", "--config", str(recipe), "--config.mesh.fsdp", "-1", "--config.workdir=a=b"]
    config, options = parse(argv, "Tests.", lambda parser: parser.add_argument("--seed-file"))
    assert config == Config(steps=7, workdir="a=b")
    assert options.seed_file == "s"
    with pytest.raises(UserError, match=r"--config\.steps: no value given"):
        parse(["--config", str(recipe), "--config.steps", "--config.seed=1"], "Tests.")
    with pytest.raises(UserError, match=r"unrecognized arguments: --confg; the nearest option is --config; .* --help"):
        parse(["--config", str(recipe), "--confg"], "Tests.")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\ny = (\n", "recipe.py:2: syntax error"),
        ("x = 1\n", "defines no get_config()"),
        ("def get_config():\n    return 3\n", "returned int, not navil_jax.config.Config"),
        ("x = 1\nraise ValueError('bad')\n", "recipe.py:2: ValueError: bad"),
        ("def get_config():\n    return {}['k']\n", "recipe.py:2: KeyError: 'k'"),
        (
            "from navil_jax.config import Config\ndef get_config():\n    return Config(steps='3')\n",
            "recipe.py: config.steps: '3' is not int",
        ),
        (
            "from navil_jax.config import Config\ndef get_config():\n    return Config(steps=0)\n",
            "recipe.py: config.steps: must be at least 1, not 0",
        ),
    ],
)
def test_wrong_recipe_is_one_line_with_its_place(tmp_path, text, message):
    with pytest.raises(UserError) as error:
        load_config(write_recipe(tmp_path, text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_recipe(tmp_path):
    with pytest.raises(UserError, match="no such config file"):
        load_config(tmp_path / "none.py")


def test_lists_in_a_recipe_become_tuples(tmp_path):
    text = "from navil_jax.config import Config, DataConfig, SourceConfig\n"
    text += "def get_config():\n    return Config(data=DataConfig(sources=[SourceConfig('a', 2)]))\n"
    config = load_config(write_recipe(tmp_path, text))
    assert config.data.sources == (SourceConfig("a", 2.0),)
    hash(config)


@given(
    steps=st.integers(1, 10**12),
    eps=st.floats(0, 1, allow_nan=False),
    name=st.text(),
    layers=st.none() | st.lists(st.integers(0, 99)).map(tuple),
)
def test_json_round_trip(steps, eps, name, layers):
    config = dataclasses.replace(TWO_SOURCES, steps=steps, workdir=name)
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, eps=eps))
    vision = dataclasses.replace(config.model.vision, full_attention_layers=layers)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vision=vision))
    assert from_json(to_json(config)) == config


def test_json_is_strict():
    with pytest.raises(UserError, match=r"config\.model\.decoder\.dept: no such key.*config\.model\.decoder\.depth"):
        from_json('{"model": {"decoder": {"dept": 3}}}')
    with pytest.raises(UserError, match=r"config\.steps: 3\.5 is not int"):
        from_json('{"steps": 3.5}')
    with pytest.raises(UserError, match=r"config\.data\.sources\.0\.name: no value given"):
        from_json('{"data": {"sources": [{"weight": 1}]}}')
    assert from_json("{}") == Config()


def test_help_names_every_key_with_its_comment(capsys):
    text = describe(Config)

    def leaves(config_class):
        for name, hint in typing.get_type_hints(config_class).items():
            if dataclasses.is_dataclass(hint):
                yield from leaves(hint)
            elif not typing.get_args(hint):
                yield name

    assert all(f"{name} = " in text for name in leaves(Config))
    assert "  data.rows = 8  (int; packed rows of one global batch)" in text
    assert "  data.sources.N.weight = 1.0  (float; share of samples" in text
    assert "  model.vision.qkv_bias = true  (true | false)" in text
    assert "  optimizer.final_learning_rate = 0.0  (float" in text
    assert "  optimizer.learning_rate_scales.N.pattern = (required)  (str" in text
    assert "  optimizer.no_decay = **/bias,**/scale,**/ls1,**/ls2  (str,str,...; patterns of" in text
    with pytest.raises(SystemExit):
        parse(["--help"], "Tests.")
    assert "  mesh.fsdp = -1" in capsys.readouterr().out


def test_vision_qk_normalization_is_refused():
    """The released code has it on by default, and cannot run it with more than one head."""
    released = read_config(Path(__file__).parent / "golden" / "internlm2_small")
    released["vision_config"]["qk_normalization"] = True
    with pytest.raises(UserError, match="qk_normalization"):
        model_config(released)
