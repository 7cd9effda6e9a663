"""The tokenizer: text to ids and back, and its files."""

import pytest
import torch
from support.model_cases import content, padded

from jetkernels import files
from jetkernels.model import StreamDecoder, Tokenizer


@pytest.mark.parametrize("text", ["", "plain", "def f(x):\n\treturn x  # ünï ☃ 🎉\r\n", "\x00\x7f\xa0\xad", "a" * 300])
def test_byte_tokenizer_round_trip(tmp_path, text):
    tokenizer = Tokenizer.byte_level()
    assert tokenizer.encode(text) == list(text.encode())
    tokenizer.save_pretrained(tmp_path / "new" / "folder")
    again = Tokenizer.from_pretrained(tmp_path / "new" / "folder")
    assert again.encode(text) == list(text.encode()) and again.decode(tokenizer.encode(text)) == text
    assert again.decode(torch.tensor(tokenizer.encode(text))) == text


def test_a_tokenizer_is_saved_in_one_step(tmp_path, monkeypatch):
    """A failure leaves the old file; a file that shares its bytes by link is not written through."""
    tokenizer = Tokenizer.byte_level()
    tokenizer.save_pretrained(tmp_path / "m")
    linked = tmp_path / "link"
    linked.hardlink_to(tmp_path / "m" / "tokenizer.json")
    before = linked.read_bytes()
    tokenizer.backend.add_tokens(["another"])
    with monkeypatch.context() as patch:
        patch.setattr(files, "_exchange", lambda *arguments: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            tokenizer.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / "tokenizer.json").read_bytes() == before
    tokenizer.save_pretrained(tmp_path / "m")
    assert linked.read_bytes() == before != (tmp_path / "m" / "tokenizer.json").read_bytes()
    assert Tokenizer.from_pretrained(tmp_path / "m").vocab_size == 258


def test_byte_tokenizer_special_token():
    tokenizer = Tokenizer.byte_level()
    assert tokenizer.vocab_size == 257 and tokenizer.end_of_text_id == 256
    assert tokenizer.encode("a<|endoftext|>b") == [97, 256, 98] and tokenizer.decode([97, 256, 98]) == "ab"
    assert tokenizer.decode([0xFF, 97]) == "\ufffda"


def test_batch_encoding_pads_on_the_left():
    ids, mask = Tokenizer.byte_level().encode_batch(["ab", "", "abcd"], pad_token_id=256)
    need, need_mask = padded(
        [torch.tensor(list(t.encode()), dtype=torch.int64) for t in ("ab", "", "abcd")], left=True, fill=256
    )
    assert torch.equal(ids, need) and torch.equal(mask, need_mask)


@pytest.mark.parametrize("text", ["plain", "ü☃🎉é", "a🎉"])
def test_streamed_text_is_whole(text):
    decoder = StreamDecoder(Tokenizer.byte_level())
    parts = [decoder.push(token) for token in text.encode()]
    assert "".join(parts) + decoder.finish() == text and not any("\ufffd" in part for part in parts)
    assert parts[0] == text[0] or parts[0] == ""


def test_streaming_does_not_wait_for_ever_on_broken_text():
    decoder = StreamDecoder(Tokenizer.byte_level())
    parts = [decoder.push(0xFF) for _ in range(20)]
    assert "\ufffd" in "".join(parts)
    decoder.push(0xE2)
    assert decoder.finish().endswith("\ufffd") and decoder.finish() == ""


def test_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no tokenizer.json"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_tokenizer_takes_its_files_along(tmp_path):
    Tokenizer.byte_level().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "tokenizer_config.json").write_text("{}")
    (tmp_path / "m" / "README.md").write_text("stays")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "tokenizer_config.json").write_text("of another tokenizer")
    Tokenizer.from_pretrained(tmp_path / "m").save_pretrained(tmp_path / "t")
    found = content(tmp_path / "t")
    assert found.keys() == {"tokenizer.json", "tokenizer_config.json"} and found["tokenizer_config.json"] == b"{}"


def test_texts_are_encoded_whole_whatever_the_file_says(tmp_path):
    tokenizer = Tokenizer.byte_level()
    tokenizer.backend.enable_truncation(4)
    tokenizer.backend.enable_padding(length=6)
    assert tokenizer.encode("abcdefg") == [*b"abcd", 0, 0]
    tokenizer.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.encode("abcdefg") == list(b"abcdefg") and again.encode("a") == list(b"a")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"model": 3}', '{"model": {"type": "BPE", "vocab": {}, "merges": ["a"]}}']
)
def test_damaged_tokenizers_are_named(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer: .*tokenizer\.json is damaged"):
        Tokenizer.from_pretrained(tmp_path)


def test_text_that_is_not_unicode_is_refused():
    with pytest.raises(ValueError, match=r"lone surrogate U\+DCFF at character 2"):
        Tokenizer.byte_level().encode("ab\udcff")
    with pytest.raises(TypeError, match="text must be a str, got int"):
        Tokenizer.byte_level().encode(3)
