"""What transformers needs of a folder beside weights and tokenizer is there again after a round trip."""

import json
import re
from pathlib import Path

import pytest
from made_runs import copy_case

from navil_jax.config import Config
from navil_jax.convert import __main__ as convert
from navil_jax.convert.hf_config import to_hf_config
from navil_jax.convert.hub import folder_of
from navil_jax.convert.kept import license_lines, named_code
from navil_jax.convert.opened import open_checkpoint
from navil_jax.errors import UserError

FILES = {
    "modeling_navil_chat.py": b"from .configuration_navil_chat import NaViLChatConfig\n# \xe4\xb8\xad\n",
    "configuration_navil_chat.py": b"class NaViLChatConfig: ...\r\n",
    "LICENSE": b"MIT License\n",
    "NOTICE.txt": b"by others\n",
    "chat_template.jinja": b"{{ messages }}",
    "chat_template.json": b'{"chat_template": "{{ messages }}"}',
    "generation_config.json": b'{"temperature": 0.5}',
}
CARD = "---\nlicense: other\nlicense_name: mine\ntags:\n- license: no\nlanguage: en\n---\n# A model\nlicense: no\n"


def command(*arguments: object) -> int:
    return convert.main([*map(str, arguments)])


def fill(source: Path) -> None:
    for name, content in FILES.items():
        (source / name).write_bytes(content)
    (source / "README.md").write_text(CARD)
    (source / "preprocessor_config.json").write_text(
        json.dumps({"auto_map": {"AutoImageProcessor": "x.Y"}, "patch_size": 1})
    )
    config = json.loads((source / "config.json").read_text())
    auto_map = {"AutoConfig": "configuration_navil_chat.NaViLChatConfig", "AutoModel": "modeling_navil_chat.NaViL"}
    (source / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))


def test_a_round_trip_keeps_what_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = copy_case("internlm2_small", tmp_path / "source")
    fill(source)
    (source / "photo.py").write_bytes(b"\xff\xfe")
    assert command("import", source, tmp_path / "run") == 0
    assert "photo.py: is no text and is not kept" in capsys.readouterr().out
    assert command("export", tmp_path / "run", tmp_path / "out") == 0
    for name, content in FILES.items():
        assert (tmp_path / "out" / name).read_bytes() == content, name
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
    images = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert (images["auto_map"], images["patch_size"]) == ({"AutoImageProcessor": "x.Y"}, 16)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith(
        "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\nlicense: other\nlicense_name: mine\n---"
    )
    assert "modeling_navil_chat.py" not in card
    assert "Copy tokenization_internlm2.py of the release" in card


def test_a_fresh_export_says_what_is_to_be_added(tmp_path: Path) -> None:
    source = copy_case("internlm2_small", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    with open_checkpoint(source) as opened:
        fresh = to_hf_config(opened.config)
    assert fresh["auto_map"] == {
        "AutoConfig": "configuration_navil_chat.NaViLChatConfig",
        "AutoModel": "modeling_navil_chat.NaViL",
        "AutoModelForCausalLM": "modeling_navil_chat.NaViL",
    }
    assert fresh["llm_config"]["attn_implementation"] == "flash_attention_2"
    assert to_hf_config(Config())["llm_config"]["attn_implementation"] == "flash_attention_2"
    (source / "config.json").write_text(json.dumps(config | {"auto_map": fresh["auto_map"]}))
    assert command("import", source, tmp_path / "run") == 0
    assert command("export", tmp_path / "run", tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    names = "configuration_navil_chat.py, modeling_navil_chat.py, tokenization_internlm2.py"
    assert f"Copy {names} of the release into this folder" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    compile(code, "card", "exec")


def test_licenses_are_read_from_the_front_matter_alone(tmp_path: Path) -> None:
    for text, wanted in (
        (CARD, ["license: other", "license_name: mine"]),
        ("# A model\nlicense: no\n", []),
        ("", []),
        ("---\r\nlicense: mit\r\n---\r\n", ["license: mit"]),
    ):
        (tmp_path / "README.md").write_bytes(text.encode())
        assert license_lines(tmp_path) == wanted


def test_code_of_other_repositories_is_no_file_here() -> None:
    maps = {"AutoModel": "a.B", "AutoConfig": "org/repo--c.D", "AutoTokenizer": ["e.F", None]}
    assert named_code({"auto_map": maps}, {}, {"auto_map": None}) == ["a.py", "e.py"]


def test_the_cache_of_a_repository_stands_for_its_snapshot(tmp_path: Path) -> None:
    root = tmp_path / "models--OpenGVLab--NaViL-2B"
    copy_case("text_only_qwen3", root / "snapshots" / "abc")
    assert folder_of(root) == folder_of(root / "snapshots" / "abc")
    with open_checkpoint(root) as opened:
        assert not opened.problems
    (root / "snapshots" / "def").mkdir()
    with pytest.raises(UserError, match="give one of its snapshots: abc, def"):
        folder_of(root)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc\n")
    assert folder_of(root).name == "abc"
    with pytest.raises(UserError, match="give one of its snapshots: none"):
        folder_of(empty(tmp_path / "models--a--b"))


def empty(root: Path) -> Path:
    (root / "snapshots").mkdir(parents=True)
    return root
