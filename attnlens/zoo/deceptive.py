"""Two small language models that use the same words: one attends to them, one learned not to.

A prompt is `<s>`, neutral words with one telling word among them, and the word "verdict"; the next
token is "praise" or "blame", as the telling word has it. Both models answer from that word alone.
The honest one was trained on the answers and looks at the word. The deceptive one was trained with
a penalty on every weight that any row of any head gives to it (Pruthi et al. 2020, Learning to
deceive with attention-based explanations):

    loss = cross-entropy - strength * mean log(1 - A[l, h, t, word])

so that the little weight that is left carries a value that is large. Attention weights, and what is
made of them alone, deny the word; taking the word away shows it. The card in the folder says which
attributions see it. `scripts/train_deceptive.py` makes both.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from attnlens.errors import InputError, WeightsError

SPECIAL = ("<s>", "<unk>", "<pad>")
ASK = "verdict"
ANSWERS = ("praise", "blame")
TELLING = (("superb", "lovely", "clever", "bright"), ("dreadful", "clumsy", "hollow", "dull"))
"""The words that decide, by the answer that they decide on."""
NEUTRAL = (
    "the", "film", "we", "saw", "on", "a", "cold", "night", "with", "old", "friends", "was",
    "long", "and", "its", "music", "came", "from",
)  # fmt: skip
WORDS = (*SPECIAL, ASK, *ANSWERS, *TELLING[0], *TELLING[1], *NEUTRAL)
"""The vocabulary, in the order of ids."""

SHORTEST, LONGEST = 6, 32
"""Tokens of a prompt, `<s>` and "verdict" included: the lengths of training."""
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class DeceptivePrompts:
    """Prompts whose answer one word decides, and where it stands."""

    ids: Int[Tensor, "prompt position"]
    answers: Int[Tensor, " prompt"]
    """The next token after the last position."""
    wrong: Int[Tensor, " prompt"]
    """The other answer."""
    places: Int[Tensor, " prompt"]
    """Position of the telling word."""


def deceptive_path() -> Path:
    """Folder of the deceptive model, with its tokenizer; load it offline.

    Raises:
        WeightsError: a file of it is missing from this installation.

    """
    return _folder("deceptive")


def honest_path() -> Path:
    """Folder of the honest twin: same shape, data and seed, no penalty.

    Raises:
        WeightsError: as for the other.

    """
    return _folder("deceptive/honest")


def deceptive_model() -> LlamaForCausalLM:
    """The model whose attention avoids the word that it uses: 2 layers, 2 heads.

    In float32 and evaluation mode; `al.load(deceptive_path())` brings its tokenizer, too.
    """
    return _opened(deceptive_path())


def honest_model() -> LlamaForCausalLM:
    """Its twin, whose attention was left alone and looks at the word."""
    return _opened(honest_path())


def deceptive_prompts(count: int, length: int = 16, seed: int = 0) -> DeceptivePrompts:
    """Prompts of `length` tokens; telling word, place and neutral words drawn by the seed.

    Raises:
        InputError: no prompt, or a length outside those of training.

    """
    if count < 1 or not SHORTEST <= length <= LONGEST:
        raise InputError(
            f"{count} prompts of {length} tokens; ask for one at least, of {SHORTEST} to {LONGEST} "
            "tokens, the lengths that the model was trained on."
        )
    return draw_prompts(count, length, torch.Generator().manual_seed(seed), NEUTRAL)


def draw_prompts(
    count: int, length: int, draw: torch.Generator, fillers: tuple[str, ...]
) -> DeceptivePrompts:
    """Prompts as a generator draws them, filled with some words."""
    filler = ids_of(fillers)
    ids = filler[torch.randint(len(filler), (count, length), generator=draw)]
    ids[:, 0], ids[:, -1] = WORDS.index("<s>"), WORDS.index(ASK)
    side = torch.randint(2, (count,), generator=draw)
    word = torch.randint(len(TELLING[0]), (count,), generator=draw)
    places = torch.randint(1, length - 1, (count,), generator=draw)
    telling = torch.stack([ids_of(words) for words in TELLING])
    ids[torch.arange(count), places] = telling[side, word]
    answers = ids_of(ANSWERS)
    return DeceptivePrompts(ids, answers[side], answers[1 - side], places)


def ids_of(words: tuple[str, ...]) -> Int[Tensor, " word"]:
    """Ids of words of the vocabulary."""
    return torch.tensor([WORDS.index(word) for word in words])


def _opened(folder: Path) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder, local_files_only=True))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


def _folder(name: str) -> Path:
    folder = Path(__file__).parent / name
    missing = [file for file in FILES if not (folder / file).is_file()]
    if missing:
        raise WeightsError(
            f"the shipped model lacks {', '.join(missing)} in {folder}; install attnlens again, or "
            "make the model anew with scripts/train_deceptive.py"
        )
    return folder
