"""The tokenizer of a GGUF file as the files of a published one: tokenizer.json and what lies beside it.

A GGUF file has the vocabulary, the merges and the kind of each token. How a text is cut before the merges it names only
(`tokenizer.ggml.pre`); what the names mean is in the published tokenizer.json files and in llama.cpp's list of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jetkernels._optional import optional
from jetkernels.modules import checks

_KEY = "tokenizer.ggml."
# Kinds of tokens, `tokenizer.ggml.token_type`.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
SPACE = "\u2581"  # how SentencePiece writes a space
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


class Cut(NamedTuple):
    """How byte-level BPE cuts a text before it merges.

    Attributes:
        split: pattern of the pieces; None: GPT-2's.
        single_digits: whether each digit is a piece of its own, before all else.
        whole_words: whether a piece that is in the vocabulary is a token, whatever the merges say.
        composed: whether the text becomes Unicode's composed form (NFC) first.
        begins: whether a text begins with a token for that where the file does not say (`add_bos_token`).
    """

    split: str | None = None
    single_digits: bool = False
    whole_words: bool = False
    composed: bool = False
    begins: bool = False


def _split(digits: str) -> str:
    """The pattern of Llama 3 and Qwen2, which differ in how many digits go together."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_LLAMA3 = Cut(_split(r"\p{N}{1,3}"), whole_words=True, begins=True)
# By `tokenizer.ggml.pre`.
CUTS = {
    "gpt-2": Cut(),
    "smollm": Cut(single_digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": Cut(_split(r"\p{N}"), composed=True),
}


def tokenizer_files(fields: Mapping[str, Any]) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja, by name; {} where a file has no tokenizer.

    Args:
        fields: the keys of a GGUF file and their values.

    Raises:
        ValueError: the tokenizer is neither byte-level BPE (`gpt2`) nor SentencePiece's BPE (`llama`), cuts a text in a
            way that CUTS does not name, or is damaged.
    """
    kind = fields.get(f"{_KEY}model")
    if kind is None:
        return {}
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"gguf: {_KEY}model must be gpt2 or llama, got {checks.shown(kind)}")
    tokens = _strings(fields, "tokens")
    special = {name: _token(tokens, fields, key) for name, key in _SPECIAL.items()}
    known = {name: token for name, token in special.items() if token is not None}
    if kind == "gpt2":
        cut = _cut(fields)
        backend, by_itself = _byte_level(fields, tokens, cut), cut.begins
    else:
        backend, by_itself = _sentencepiece(fields, tokens, known.get("unk_token")), True
    _add_tokens(backend, fields, tokens)
    begins = known.get("bos_token") if fields.get(f"{_KEY}add_bos_token", by_itself) else None
    if begins is not None:
        # For callers that ask for special tokens; `Tokenizer.encode` does not.
        backend.post_processor = _library().processors.TemplateProcessing(
            single=[begins, "$A"], pair=[begins, "$A", begins, "$B"], special_tokens=[(begins, tokens.index(begins))]
        )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **known}
    files = {"tokenizer.json": backend.to_str(pretty=True), "tokenizer_config.json": json.dumps(config, indent=2)}
    template = fields.get("tokenizer.chat_template")
    if isinstance(template, str):
        files["chat_template.jinja"] = template
    return {name: text.encode("utf-8") for name, text in files.items()}


def _cut(fields: Mapping[str, Any]) -> Cut:
    name = fields.get(f"{_KEY}pre")
    if not isinstance(name, str) or name not in CUTS:
        raise ValueError(f"gguf: {_KEY}pre must be one of {', '.join(CUTS)}, got {checks.shown(name)}")
    return CUTS[name]


def _byte_level(fields: Mapping[str, Any], tokens: Sequence[str], cut: Cut) -> Any:
    """Byte-level BPE; every text has tokens, so that the unknown one is not needed."""
    library = _library()
    merges = [_pair(merge) for merge in _strings(fields, "merges")]
    backend = _merging(_vocabulary(tokens), merges, ignore_merges=cut.whole_words)
    pre, pieces = library.pre_tokenizers, []
    if cut.single_digits:
        pieces.append(pre.Digits(individual_digits=True))
    if cut.split is not None:
        pieces.append(pre.Split(library.Regex(cut.split), behavior="isolated"))
    pieces.append(pre.ByteLevel(add_prefix_space=False, use_regex=cut.split is None))
    backend.pre_tokenizer = pre.Sequence(pieces)
    if cut.composed:
        backend.normalizer = library.normalizers.NFC()
    backend.decoder = library.decoders.ByteLevel()
    return backend


def _sentencepiece(fields: Mapping[str, Any], tokens: Sequence[str], unknown: str | None) -> Any:
    """SentencePiece's BPE: a space is U+2581, one stands in front of the text, what has no token is bytes."""
    library = _library()
    vocab = _vocabulary(tokens)
    if f"{_KEY}merges" in fields:
        merges = [_pair(merge) for merge in _strings(fields, "merges")]
    else:
        merges = _merges_of_scores(fields, tokens, vocab)
    backend = _merging(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    prefix = fields.get(f"{_KEY}add_space_prefix", True)
    normalize, decode = library.normalizers, library.decoders
    backend.normalizer = normalize.Sequence(
        [*([normalize.Prepend(SPACE)] if prefix else []), normalize.Replace(" ", SPACE)]
    )
    steps = [decode.Replace(SPACE, " "), decode.ByteFallback(), decode.Fuse()]
    backend.decoder = decode.Sequence([*steps, *([decode.Strip(" ", 1, 0)] if prefix else [])])
    return backend


def _merging(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], **options: Any) -> Any:
    """The library's tokenizer that merges so, with its options."""
    library = _library()
    try:
        return library.Tokenizer(library.models.BPE(vocab=vocab, merges=merges, **options))
    except Exception as error:  # the library's errors are bare ones
        raise ValueError(f"gguf: {_KEY}merges must be of {_KEY}tokens: {error}") from None


def _merges_of_scores(
    fields: Mapping[str, Any], tokens: Sequence[str], vocab: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, those that make the token of the highest score first."""
    scores = fields.get(f"{_KEY}scores")
    if not isinstance(scores, list) or len(scores) != len(tokens) or not isinstance(scores[0], (int, float)):
        raise ValueError(f"gguf: the file must have {_KEY}merges, or {_KEY}scores with a number for each token")
    found = []
    for token, score in zip(tokens, scores):
        for i in range(1, len(token)):
            left, right = token[:i], token[i:]
            if left in vocab and right in vocab:
                found.append((-score, -i, left, right))
    return [(left, right) for _, _, left, right in sorted(found)]


def _add_tokens(backend: Any, fields: Mapping[str, Any], tokens: Sequence[str]) -> None:
    """Tokens that a text is cut at before all else; those of control are left out when it is decoded."""
    kinds = fields.get(f"{_KEY}token_type")
    if kinds is None:
        return
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise ValueError(f"gguf: {_KEY}token_type must have an entry for each of the {len(tokens)} tokens")
    added = _library().AddedToken
    special = [token for token, kind in zip(tokens, kinds) if kind in (_UNKNOWN, _CONTROL)]
    own = [token for token, kind in zip(tokens, kinds) if kind == _USER_DEFINED]
    backend.add_special_tokens([added(token, special=True, normalized=False) for token in special])
    backend.add_tokens([added(token, special=False, normalized=False) for token in own])


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise ValueError(f"gguf: {_KEY}tokens must be different, got {checks.shown(twice)} twice")
    return vocab


def _strings(fields: Mapping[str, Any], name: str) -> list[str]:
    values = fields.get(f"{_KEY}{name}")
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise ValueError(f"gguf: {_KEY}{name} must be a list of texts, got {checks.shown(values)}")
    return values


def _pair(merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not space or not left or not right:
        raise ValueError(f"gguf: {_KEY}merges must be pairs with a space between, got {checks.shown(merge)}")
    return left, right


def _token(tokens: Sequence[str], fields: Mapping[str, Any], name: str) -> str | None:
    """The token whose id a key names."""
    i = fields.get(f"{_KEY}{name}")
    if i is None:
        return None
    if not isinstance(i, int) or not 0 <= i < len(tokens):
        raise ValueError(f"gguf: {_KEY}{name} must be the id of one of {len(tokens)} tokens, got {checks.shown(i)}")
    return tokens[i]


def _library() -> Any:
    return optional("tokenizers", "model", "reading and writing text")
