"""The tokenizer against the released one's ids and texts, and its properties."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from navil_jax.config import SPECIAL_TOKENS
from navil_jax.data.tokenizers import Tokenizer, load_tokenizer, tokenizer_from_files
from navil_jax.data.tokenizers.base import check_vocabulary, with_special_tokens
from navil_jax.data.tokenizers.sentencepiece import CHAT_MARKERS, SentencePieceTokenizer, train_tokenizer
from navil_jax.errors import UserError

FILES = SentencePieceTokenizer.FILES
PROMPTS = Path(__file__).parent / "golden" / "prompts"
CASES = {"tokenizer": "golden.json", "tokenizer_dummy_prefix": "golden_dummy_prefix.json"}
CORPUS = ["What colour is the box?\nIt is red.", "How many boxes are there? 12 or 34.", "The blue circle is left."] * 9


@pytest.fixture(params=CASES)
def released(request: pytest.FixtureRequest) -> tuple[Tokenizer, dict]:
    return load_tokenizer(PROMPTS / request.param), json.loads((PROMPTS / CASES[request.param]).read_text())


def test_released_texts(released: tuple[Tokenizer, dict]) -> None:
    tokenizer, golden = released
    for case in golden["plain_texts"]:
        assert tokenizer.encode(case["text"], allow_special=True) == case["ids_without_bos"], case
        assert [tokenizer.bos_id, *case["ids_without_bos"]] == case["ids"]


def test_released_decoding(released: tuple[Tokenizer, dict]) -> None:
    tokenizer, golden = released
    for case in golden["decode"]:
        assert tokenizer.decode(case["ids"]) == case["text"], case
        assert tokenizer.decode(case["ids"], skip_special=True) == case["text_skip_special"], case


def test_released_facts(released: tuple[Tokenizer, dict]) -> None:
    tokenizer, golden = released
    facts = golden["tokenizer_facts"]
    assert tokenizer.vocab_size == facts["length"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == tuple(
        facts[f"{name}_token_id"] for name in ("bos", "eos", "pad")
    )
    config = json.loads((Path(__file__).parent / "golden/internlm2_small/golden.json").read_text())
    assert dict(zip(SPECIAL_TOKENS, tokenizer.special_token_ids, strict=True)) == config["special_tokens"]


def test_typed_markers_stay_text(released: tuple[Tokenizer, dict]) -> None:
    tokenizer, _ = released
    aliases = [f"[UNUSED_TOKEN_{i}]" for i in range(141, 147)]
    reserved = {tokenizer.token_id(token) for token in (*SPECIAL_TOKENS, *CHAT_MARKERS)} | {0, 1, 2}
    for text in (*SPECIAL_TOKENS, *CHAT_MARKERS, *aliases, "<s>", "</s>", "<unk>", "<image>"):
        ids = tokenizer.encode(f"a {text} b{text}", allow_special=False)
        assert not reserved & set(ids), text
        assert [token.id for token in tokenizer.encode_with_spans(f"a {text} b{text}")] == ids


def test_decode_leaves_out_ids_beyond_the_table(released: tuple[Tokenizer, dict]) -> None:
    tokenizer, _ = released
    ids = tokenizer.encode("boxes", allow_special=False)
    assert tokenizer.decode([-1, *ids[:1], 10**6, *ids[1:], tokenizer.vocab_size]) == "boxes"


def test_decode_tightens_punctuation() -> None:
    tokenizer = load_tokenizer(PROMPTS / "tokenizer")
    assert tokenizer.decode(tokenizer.encode("yes , it is n't .", allow_special=False)) == "yes, it isn't."


@given(text=st.text(max_size=40))
def test_spans_cover_the_text(text: str) -> None:
    tokenizer = load_tokenizer(PROMPTS / "tokenizer")
    tokens = tokenizer.encode_with_spans(text)
    assert [token.id for token in tokens] == tokenizer.encode(text, allow_special=False)
    ends = [0, *(token.end for token in tokens)]
    assert [token.begin for token in tokens] == ends[:-1]
    assert ends[-1] == len(text)


def test_files_come_back_as_they_were(tmp_path: Path, released: tuple[Tokenizer, dict]) -> None:
    tokenizer, _ = released
    tokenizer.save(tmp_path / "new" / "folder")
    again = load_tokenizer(tmp_path / "new" / "folder")
    embedded = tokenizer_from_files(tokenizer.files())
    assert again.files() == tokenizer.files() == embedded.files()
    assert set(tokenizer.files()) == set(FILES[:4])
    text = "<|im_start|>user\n<img>"
    assert embedded.encode(text, allow_special=True) == tokenizer.encode(text, allow_special=True)


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)
    files = load_tokenizer(PROMPTS / "tokenizer").files()
    with pytest.raises(UserError, match="SentencePiece"):
        tokenizer_from_files(files | {"tokenizer.model": b"broken"})
    with pytest.raises(UserError, match="JSON"):
        tokenizer_from_files(files | {"added_tokens.json": b"{"})
    config = json.loads(files["tokenizer_config.json"])
    config["added_tokens_decoder"].pop("546")
    added = json.loads(files["added_tokens.json"])
    added.pop("<img>")
    without = tokenizer_from_files(
        files | {"tokenizer_config.json": json.dumps(config).encode(), "added_tokens.json": json.dumps(added).encode()}
    )
    with pytest.raises(UserError, match="<img>"):
        _ = without.special_token_ids


def test_training(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    tokenizer = train_tokenizer(CORPUS, 320, tmp_path / "a")
    again = train_tokenizer(CORPUS, 320, tmp_path / "b")
    assert tokenizer.files() == again.files() == load_tokenizer(tmp_path / "a").files()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(FILES[:4])
    assert capfd.readouterr() == ("", "")
    assert tokenizer.vocab_size <= 320 + 18
    markers = [tokenizer.token_id(token) for token in (*CHAT_MARKERS, *SPECIAL_TOKENS)]
    assert markers == list(range(tokenizer.vocab_size - 18, tokenizer.vocab_size))
    newline = tokenizer.encode("\n", allow_special=False)
    assert len(newline) == 1
    assert tokenizer.encode("a\n\nb", allow_special=False)[1:3] == newline * 2
    assert len(tokenizer.encode("1234", allow_special=False)) == 4
    assert len(tokenizer.encode("What colour is the box?", allow_special=False)) < 15


@given(text=st.text(max_size=30))
def test_trained_round_trip(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    tokenizer = _trained(tmp_path_factory)
    assert tokenizer.decode(tokenizer.encode(text, allow_special=False)) == text.replace("▁", " ")


_TRAINED: list[Tokenizer] = []


def _trained(factory: pytest.TempPathFactory) -> Tokenizer:
    if not _TRAINED:
        _TRAINED.append(train_tokenizer(CORPUS, 300, factory.mktemp("tokenizer")))
    return _TRAINED[0]


def test_training_without_text(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        train_tokenizer([" "], 300, tmp_path)


BASE_CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}


def base_tokenizer(drop: int = 0, **config: object) -> Tokenizer:
    """A language model's tokenizer without added tokens; `drop` of its reserved pieces get another name."""
    model = sentencepiece_model_pb2.ModelProto.FromString((PROMPTS / "tokenizer" / "tokenizer.model").read_bytes())
    for piece in model.pieces[len(model.pieces) - drop :]:
        piece.piece = f"[OTHER_{piece.piece}]"
    files = {"tokenizer.model": model.SerializeToString()}
    return tokenizer_from_files(files | {"tokenizer_config.json": json.dumps(BASE_CONFIG | config).encode()})


def test_a_base_model_s_tokenizer_grows_like_the_releases() -> None:
    """The markers of the chat template get the ids that the table keeps for them, the special tokens new ones."""
    plain, released = base_tokenizer(), load_tokenizer(PROMPTS / "tokenizer")
    assert (plain.vocab_size, plain.pad_id) == (546, 2)
    with pytest.raises(UserError, match="</box>"):
        _ = plain.special_token_ids
    grown = with_special_tokens(plain)
    assert grown.special_token_ids == tuple(range(546, 558))
    assert [grown.token_id(token) for token in CHAT_MARKERS] == [released.token_id(token) for token in CHAT_MARKERS]
    assert json.loads(grown.files()["added_tokens.json"]) == dict(zip(SPECIAL_TOKENS, range(546, 558), strict=True))
    text = "<|im_start|>user\nWhat is this?<|im_end|>"
    ids = grown.encode(text, allow_special=True)
    assert ids == released.encode(text, allow_special=True)
    assert grown.decode(ids) == released.decode(ids)
    assert grown.decode(ids, skip_special=True) == released.decode(ids, skip_special=True)
    assert grown.encode(text, allow_special=False) == released.encode(text, allow_special=False)
    assert tokenizer_from_files(grown.files()).files() == grown.files()
    assert with_special_tokens(grown) is grown


def test_markers_without_a_reserved_piece_come_before_the_special_tokens() -> None:
    grown = with_special_tokens(base_tokenizer(drop=2))
    assert [grown.token_id(token) for token in CHAT_MARKERS] == [540, 541, 542, 543, 546, 547]
    assert grown.special_token_ids == tuple(range(548, 560))


def test_growing_keeps_the_ids_that_are_there() -> None:
    released = load_tokenizer(PROMPTS / "tokenizer")
    assert with_special_tokens(released) is released
    files = released.files()
    config, added = json.loads(files["tokenizer_config.json"]), json.loads(files["added_tokens.json"])
    config["added_tokens_decoder"].pop("546")
    added.pop("<img>")
    files |= {"tokenizer_config.json": json.dumps(config).encode(), "added_tokens.json": json.dumps(added).encode()}
    grown = with_special_tokens(tokenizer_from_files(files))
    ids = dict(zip(SPECIAL_TOKENS, released.special_token_ids, strict=True)) | {"<img>": 558}
    assert dict(zip(SPECIAL_TOKENS, grown.special_token_ids, strict=True)) == ids
    table = json.loads(grown.files()["special_tokens_map.json"])["additional_special_tokens"]
    assert table[-1]["content"] == "<img>"


def test_a_vocabulary_larger_than_the_model_s() -> None:
    tokenizer = load_tokenizer(PROMPTS / "tokenizer")
    check_vocabulary(tokenizer, 558, "model")
    with pytest.raises(UserError, match=r"here: the tokenizer in .* has 558 ids, the model 557"):
        check_vocabulary(tokenizer, 557, "here")


def test_too_few_pieces_are_named_by_their_key() -> None:
    with pytest.raises(
        UserError, match=r"config.data.tokenizer_size: 10 pieces are too few, .* alone are \d+; raise it"
    ):
        train_tokenizer(["hello you"], 10, None)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        *(("added_tokens.json", {"<img>": i}, "<img>: must be an id") for i in (1.5, True, "5", None, -1, [])),
        ("added_tokens.json", {"<img>": 5}, "<img> has the id 5, and [0-9]+ in tokenizer_config.json"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "added_tokens_decoder: must be an object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<img>"}}}, "'x' is no id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"330": {}}}, "added_tokens_decoder.330: must be an object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"330": "<img>"}}, "added_tokens_decoder.330: must be"),
        *(("tokenizer_config.json", {"bos_token": token}, "bos_token: must be a text") for token in ({"a": 1}, 5, [])),
        ("tokenizer_config.json", {"eos_token": 5}, "eos_token: must be a text"),
        ("tokenizer_config.json", {"additional_special_tokens": [5]}, "additional_special_tokens.0: must be a text"),
        ("tokenizer_config.json", {"additional_special_tokens": "x"}, "additional_special_tokens: must be a list"),
    ],
)
def test_what_is_no_token_or_id_is_named_by_file_and_key(file, change, said):
    files = load_tokenizer(PROMPTS / "tokenizer").files()
    content = json.loads(files[file]) | change
    with pytest.raises(UserError, match=f"tokenizer/{file}: .*{said}"):
        tokenizer_from_files(files | {file: json.dumps(content).encode()})
