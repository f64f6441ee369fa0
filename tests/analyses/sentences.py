"""Tokenizers and sentences whose words and pieces are known."""

from collections.abc import Sequence

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from attnlens.tasks import Sentence

LETTERS = "abcdefghijkl"


def word_tokenizer(size: int = 32) -> PreTrainedTokenizerFast:
    """One token a word, `w1` to `w31`, after a start token of id 0."""
    vocabulary = {"<s>": 0} | {f"w{i}": i for i in range(1, size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _finished(tokenizer, "<s> $A", {"<s>": 0})


def letter_tokenizer(first: int = 8) -> PreTrainedTokenizerFast:
    """One token a letter, `abc` in three; between [CLS] and [SEP]. A digit is nothing at all."""
    special = {"[CLS]": 2, "[SEP]": 3}
    vocabulary = special | {letter: first + i for i, letter in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _finished(tokenizer, "[CLS] $A [SEP]", special)


def _finished(
    tokenizer: Tokenizer, template: str, special: dict[str, int]
) -> PreTrainedTokenizerFast:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=list(special.items())
    )
    pad = next(iter(special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, cls_token=pad)


def chain(words: Sequence[str], relation: str = "next", step: int = 1) -> Sentence:
    """Every word hangs on the one `step` before it."""
    heads = tuple(max(i - step, -1) for i in range(len(words)))
    return Sentence(tuple(words), heads, tuple("root" if h < 0 else relation for h in heads))
