"""Tokenizers of GGUF files: ids are those of the tokenizer that the file was made from, and those of transformers."""

import unicodedata

import pytest
import tokenizers
import transformers
from support.gguf_cases import (
    PUBLISHED_CUTS,
    documents,
    drawn,
    fields_of_tokenizer,
    trained_tokenizer,
    write_gguf,
)

from jetkernels.model import StreamDecoder, Tokenizer
from jetkernels.model.gguf_tokenizer import tokenizer_files

TEXTS = [
    "",
    " ",
    "The capital of France is Paris.",
    "I'm here, they'll see; WE'RE LATE and I'VE 2 o'clock's",
    "def f(x):\n\treturn [x ** 2  for  x in range(10)]  # squares\n\n\n",
    "In 2024 there were 1234567 of them, 3.14159 each,v1.2-rc3",
    "naïve café, Straße, Ελλάδα, Привет мир, 中文字符, 日本語, हिन्दी, 🎉👩‍👩‍👧 ☃",
    "tabs\tand\r\nlines\r\n   \n  and spaces   at the end   ",
    "<|im_start|>user\nHello<|im_end|>\n<|endoftext|>more",
    "\x00\x07 control \x7f\xa0\xad",
    "a" * 70 + "!!!...???---___" * 3,
    "<|not_special|> <|im_start |> </s>",
]
# Two spaces in front of a digit: transformers cuts a `smollm` file in GPT-2's way, without parting its digits first.
BEFORE_DIGITS = ["a  1", "n =   27;\n    0"]
DECOMPOSED = unicodedata.normalize("NFD", "naïve café")


def keys(fields: dict) -> dict:
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def transformers_tokenizer(path):
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.parametrize("cut", PUBLISHED_CUTS)
def test_byte_level_ids_are_those_of_the_published_tokenizer_and_of_transformers(cut, tmp_path):
    backend = trained_tokenizer(cut)
    fields = fields_of_tokenizer(backend, cut)
    path = write_gguf(tmp_path / "model.gguf", drawn("llama", vocab_size=len(fields["tokens"])), tokenizer=fields)
    ours, theirs = Tokenizer.from_pretrained(path), transformers_tokenizer(path)
    assert ours.vocab_size == len(fields["tokens"]) and ours.end_of_text_id == 0
    for text in TEXTS + BEFORE_DIGITS + [DECOMPOSED, *documents()]:
        ids = ours.encode(text)
        assert ids == backend.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ids) == backend.decode(ids), text
        if text not in BEFORE_DIGITS and text != DECOMPOSED and (cut != "smollm" or text in TEXTS):
            assert ids == theirs(text, add_special_tokens=False).input_ids, text


def test_digits_of_smollm_are_parted_before_all_else():
    """GPT-2 leaves the last space to the number."""
    backend = trained_tokenizer("smollm")
    files = tokenizer_files(keys(fields_of_tokenizer(backend, "smollm")))
    found = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
    assert found.encode("a  10").tokens == backend.encode("a  10").tokens == ["a", "ĠĠ", "1", "0"]


def test_a_word_of_the_vocabulary_is_a_token_in_llama_3():
    """Though no merges lead to it."""
    fields = fields_of_tokenizer(trained_tokenizer("llama-bpe"), "llama-bpe")
    fields["tokens"] = [*fields["tokens"], "xyzzy"]
    fields["token_type"] = [*fields["token_type"], 1]
    for cut, tokens in (("llama-bpe", ["xyzzy"]), ("qwen2", ["x", "y", "z", "z", "y"])):
        found = tokenizers.Tokenizer.from_buffer(tokenizer_files(keys(fields | {"pre": cut}))["tokenizer.json"])
        assert found.encode("xyzzy").tokens == tokens


@pytest.mark.parametrize("cut", PUBLISHED_CUTS)
def test_llama_3s_texts_begin_with_a_token_unless_the_file_says_no(cut):
    fields = fields_of_tokenizer(trained_tokenizer(cut), cut)
    for says, begins in ((None, cut == "llama-bpe"), (False, False), (True, True)):
        told = keys(fields | {"add_bos_token": says})
        if says is None:
            del told["tokenizer.ggml.add_bos_token"]
        files = tokenizer_files(told)
        found = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        assert (found.encode("the").ids[0] == fields["bos_token_id"]) is begins


def test_tokens_of_the_user_are_cut_out_and_shown():
    fields = fields_of_tokenizer(trained_tokenizer("qwen2"), "qwen2")
    fields["tokens"] = [*fields["tokens"], "<think>"]
    fields["token_type"] = [*fields["token_type"], 4]
    found = tokenizers.Tokenizer.from_buffer(tokenizer_files(keys(fields))["tokenizer.json"])
    ids = found.encode("a<think>b<|im_end|>").ids
    assert ids[1] == len(fields["tokens"]) - 1 and found.decode(ids) == "a<think>b"


# ---- SentencePiece

WORDS = ["the", "cat", "sat", "on", "mat", "and", "then"]


def sentencepiece_fields(**changes) -> dict:
    """A vocabulary as SentencePiece's BPE leaves it: control, bytes, merged pieces with falling scores, letters."""
    pieces: list[str] = []
    for word in WORDS:
        spelled = "\u2581" + word
        pieces += [spelled[:i] for i in range(2, len(spelled) + 1)] + [word[-2:]]
    merged = sorted(dict.fromkeys(pieces), key=len)
    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyz.,é"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *merged, *letters]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(merged) + len(letters))]
    scores = [0.0] * 259 + [-float(i) for i in range(len(merged) + len(letters))]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return {"model": "llama", "pre": "default", "tokens": tokens, "scores": scores, "token_type": kinds} | ids | changes


SENTENCES = [
    "the cat sat on the mat",
    "The cat, and then.",
    "cats atop the mats é ü 中 🎉",
    "the\n\ncat\tsat",
    "on  the   mat  ",
    "the cat</s>sat",
    "",
]


def test_sentencepiece_ids_are_those_of_transformers(tmp_path):
    fields = sentencepiece_fields()
    path = write_gguf(tmp_path / "model.gguf", drawn("llama", vocab_size=len(fields["tokens"])), tokenizer=fields)
    ours, theirs = Tokenizer.from_pretrained(path), transformers_tokenizer(path)
    assert ours.end_of_text_id == 2 and ours.vocab_size == len(fields["tokens"])
    for text in SENTENCES:
        if "</s>" not in text:
            assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids, text
        assert ours.decode(ours.encode(text)) == text.replace("</s>", " "), text
    tokens = [ours.backend.id_to_token(i) for i in ours.encode("the cat ü")]
    assert tokens == ["\u2581the", "\u2581cat", "\u2581", "<0xC3>", "<0xBC>"]
    # As the published tokenizer.json and llama.cpp: a space stands in front of any text, one of spaces too.
    assert [ours.backend.id_to_token(i) for i in ours.encode("  on")] == ["\u2581", "\u2581", "\u2581on"]


def test_sentencepiece_without_the_space_in_front():
    files = tokenizer_files(keys(sentencepiece_fields(add_space_prefix=False)))
    found = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
    assert found.encode("on the", add_special_tokens=False).tokens == ["on", "\u2581the"]
    assert found.decode(found.encode(" the").ids) == " the"


def test_merges_of_a_sentencepiece_file_go_before_its_scores():
    merges = ["t h", "\u2581 th", "\u2581th e"]
    fields = sentencepiece_fields(merges=merges)
    fields["tokens"] = [*fields["tokens"], "th"]
    fields["scores"], fields["token_type"] = [*fields["scores"], -999.0], [*fields["token_type"], 1]
    found = tokenizers.Tokenizer.from_buffer(tokenizer_files(keys(fields))["tokenizer.json"])
    assert found.encode("the cat", add_special_tokens=False).tokens == ["\u2581the", "\u2581", "c", "a", "t"]


def test_streamed_text_is_the_text(tmp_path):
    fields = sentencepiece_fields()
    path = write_gguf(tmp_path / "model.gguf", drawn("llama", vocab_size=len(fields["tokens"])), tokenizer=fields)
    tokenizer = Tokenizer.from_pretrained(path)
    for text in ("the cat sat on the mat", "and ü 中 then"):
        decoder = StreamDecoder(tokenizer)
        assert "".join(map(decoder.push, tokenizer.encode(text))) + decoder.finish() == text


def test_behind_other_text_sentencepiece_puts_no_space(tmp_path):
    """Neither when it is encoded nor is one lost when it is decoded; byte-level BPE has none to leave out."""
    backend = tokenizers.Tokenizer.from_buffer(tokenizer_files(keys(sentencepiece_fields()))["tokenizer.json"])
    tokenizer = Tokenizer(backend)
    for text, tokens in (
        (" the cat", ["\u2581the", "\u2581cat"]),
        ("\nthe", ["<0x0A>", "t", "he"]),
        (".", ["."]),
        ("", []),
    ):
        ids = tokenizer.encode_continuation(text)
        assert [backend.id_to_token(i) for i in ids] == tokens
        assert tokenizer.decode_continuation(ids) == text
        decoder = StreamDecoder(tokenizer, is_continuation=True)
        assert "".join(map(decoder.push, ids)) + decoder.finish() == text
    assert tokenizer.decode_continuation(tokenizer.encode_continuation("ü")[:1]) == "\ufffd"
    assert tokenizer.encode("on") + tokenizer.encode_continuation(" the mat") == tokenizer.encode("on the mat")
    plain = Tokenizer(trained_tokenizer("smollm"))
    for text in TEXTS:
        ids = plain.encode(text)
        assert plain.encode_continuation(text) == ids and plain.decode_continuation(ids) == plain.decode(ids)


# ---- files


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_saved_files_are_a_tokenizer_of_transformers(kind, tmp_path):
    """With the tokens that begin and end a text, the former where the file asks for it, and the chat template."""
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fields = fields_of_tokenizer(trained_tokenizer("smollm"), "smollm") if kind == "gpt2" else sentencepiece_fields()
    fields |= {"chat_template": template}
    path = write_gguf(tmp_path / "model.gguf", drawn("llama", vocab_size=len(fields["tokens"])), tokenizer=fields)
    ours = Tokenizer.from_pretrained(path)
    ours.save_pretrained(tmp_path / "saved")
    again = Tokenizer.from_pretrained(tmp_path / "saved")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    begins = [fields["bos_token_id"]] if kind == "llama" else []
    for text in ("the cat sat", "on the mat."):
        assert again.encode(text) == ours.encode(text)
        assert theirs(text).input_ids == begins + ours.encode(text)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2) and theirs.chat_template == template


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model must be gpt2 or llama, got 'bert'"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre must be one of gpt-2, smollm, .*, got 'tekken'"),
        ({"pre": ["qwen2"]}, r"tokenizer.ggml.pre must be one of .*, got \['qwen2'\]"),
        ({"pre": None}, "tokenizer.ggml.pre must be one of .*, got None"),
        ({"merges": ["ab"]}, "tokenizer.ggml.merges must be pairs with a space between, got 'ab'"),
        ({"merges": ["a nosuchtoken"]}, "tokenizer.ggml.merges must be of tokenizer.ggml.tokens"),
        ({"merges": None}, "tokenizer.ggml.merges must be a list of texts, got None"),
        ({"tokens": ["a", "b", "a"]}, "tokenizer.ggml.tokens must be different, got 'a' twice"),
        ({"tokens": []}, r"tokenizer.ggml.tokens must be a list of texts, got \[\]"),
        ({"token_type": [1, 2]}, "tokenizer.ggml.token_type must have an entry for each of the"),
        ({"eos_token_id": 10**6}, "tokenizer.ggml.eos_token_id must be the id of one of"),
    ],
)
def test_tokenizers_of_another_kind_are_refused(changes, sentence):
    fields = fields_of_tokenizer(trained_tokenizer("smollm"), "smollm") | changes
    if "tokens" in changes:
        fields = {"model": "gpt2", "pre": "smollm", "merges": ["a b"], **changes}
    with pytest.raises(ValueError, match=f"gguf: {sentence}"):
        tokenizer_files(keys(fields))


def test_scores_or_merges_are_needed():
    for scores in ([1.0], ["a"] * len(sentencepiece_fields()["tokens"])):
        with pytest.raises(ValueError, match="must have tokenizer.ggml.merges, or tokenizer.ggml.scores with a number"):
            tokenizer_files(keys(sentencepiece_fields(scores=scores)))
    assert tokenizer_files({}) == {}
