"""The small model's tokenizer: byte-level BPE whose task words are single tokens."""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from attnlens.tasks import words

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
TASK_WORDS = words.NAMES + words.PLACES + words.OBJECTS + words.KEYS + words.VALUES


def task_corpus(count: int, seed: int) -> list[str]:
    """Task words in random order: each frequent enough to be merged into one token."""
    draw = random.Random(seed)
    lines = [" " + " ".join(draw.sample(TASK_WORDS, 20)) for _ in range(count)]
    return lines + [" ".join(words.FILLER)] * (count // 50)


def train_tokenizer(text: str, vocab_size: int, context: int, seed: int) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly `vocab_size` tokens that puts `<s>` before every text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([text, *task_corpus(2000, seed)], trainer)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, core.token_to_id(BOS))],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    split = [w for w in TASK_WORDS if len(core.encode(" " + w, add_special_tokens=False)) != 1]
    if split:
        raise SystemExit(f"these task words are not single tokens, raise the vocabulary: {split}")
    if len(tokenizer) != vocab_size:
        raise SystemExit(f"the tokenizer has {len(tokenizer)} tokens instead of {vocab_size}")
    return tokenizer


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that `train_tokenizer` saved in `folder`."""
    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
