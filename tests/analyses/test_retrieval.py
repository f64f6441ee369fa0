"""Retrieval scores by the definition: whole forward passes, dense maps, sets."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import attnlens as al
from attnlens.analyses.needle_runs import copied_tokens, retrieval_score, rouge_recall, words_of
from attnlens.analyses.retrieval import RetrievalSettings, retrieval_heads
from attnlens.errors import InputError, TaskError
from attnlens.hooks.rows import Rows
from attnlens.lens import Lens
from attnlens.tasks import Needle, NeedlePrompt, hidden_tokens, needle, repeated_tokens, words
from attnlens.zoo import retrieval_model, small_path
from attnlens.zoo.retrieval import RETRIEVAL_HEAD
from tests.architectures import ARCHITECTURES

STEPS = 6


@pytest.fixture(scope="module")
def wired() -> Lens:
    return al.load(retrieval_model(), check=False)


@pytest.fixture(scope="module")
def small() -> Lens:
    return al.load(small_path(), check=False)


def test_a_head_copies_where_its_key_is_in_the_needle_and_is_what_is_written() -> None:
    ids, span, written = [5, 7, 8, 7, 9, 6], (1, 4), [7, 8, 7, 6]
    largest = torch.tensor([[1, 3, 0], [2, 3, 1], [0, 1, 6], [5, 5, 7]])
    copied = copied_tokens(largest, written, ids, span)
    assert copied.tolist() == [
        [True, True, False],  # 7 at 1 and at 3; the last head looks at the 5
        [True, False, False],
        [False, True, False],  # the third head looks past the prompt
        [False, False, False],  # 6 is written and looked at, outside the needle
    ]
    needle_ids = ids[slice(*span)]
    assert retrieval_score(copied, written, needle_ids).tolist() == [1, 0.5, 0]
    repeated = retrieval_score(copied, written, needle_ids, repeat=True)
    assert repeated.tolist() == pytest.approx([2 / 3, 2 / 3, 0])


def test_recall_counts_each_word_as_often_as_it_is_said() -> None:
    assert rouge_recall(list("abac"), list("cax")) == 0.5
    assert rouge_recall(list("ab"), list("baba")) == 1
    assert rouge_recall([1, 1], []) == 0


def test_recall_of_scripts_without_spaces_counts_characters() -> None:
    assert words_of("The Red-Cat!") == ["the", "red", "cat"]
    assert words_of("最好的 cat") == ["最", "好", "的", "cat"]


def by_definition(
    lens: Lens, prompt: NeedlePrompt, repeat: bool
) -> tuple[list[int], dict[str, float]]:
    """Greedy answer by whole forward passes, and each head's score from dense maps."""
    ids = list(prompt.ids)
    first, last = prompt.span
    for _ in range(STEPS):
        with torch.no_grad():
            logits = lens.model(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    answer = ids[len(prompt.ids) :]
    dense = lens.run([ids[:-1]], keep=("pattern",)).pattern
    scores: dict[str, float] = {}
    for site in lens.anatomy.sites:
        for head in range(site.heads):
            copies: list[int] = []
            for step, token in enumerate(answer):
                row = dense[site.name][0, head, len(prompt.ids) - 1 + step]
                key = max(range(len(row)), key=lambda s: float(row[s]))
                if first <= key < last and ids[key] == token:
                    copies.append(token)
            needle_ids = prompt.ids[first:last]
            scores[str(site.head(head))] = (
                len(copies) / len(needle_ids) if repeat else len(set(copies)) / len(set(needle_ids))
            )
    return answer, scores


def prompts_of(ids: torch.Tensor, lengths: Sequence[int]) -> list[NeedlePrompt]:
    rows = [tuple(row[:n].tolist()) for row, n in zip(ids.repeat(2, 1), lengths, strict=True)]
    return [NeedlePrompt(row, (1, len(row)), len(row), 0.5) for row in rows]


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gpt_oss", "qwen3", "gemma2"])
def test_scores_are_those_of_the_definition(name: str, repeat: bool) -> None:
    """Four prompts of different lengths in one batch, windows of 5 among the models."""
    made = ARCHITECTURES[name]
    model = made.build() if name == "gemma2" else made.build().double()
    unembedding = model.get_output_embeddings()
    few = torch.zeros_like(unembedding.weight)
    few[4:8] = unembedding.weight[4:8].detach()
    unembedding.weight = torch.nn.Parameter(few)  # what is written is one of four tokens
    lens = al.load(model, check=False)
    prompts = prompts_of(made.inputs(model)["input_ids"] % 4 + 4, (16, 13, 11, 16))
    settings = RetrievalSettings(steps=STEPS, repeat=repeat, stop=(), recall=0)
    found = retrieval_heads(lens, prompts, settings=settings, batch_size=4)
    some = 0.0
    for number, (run, prompt) in enumerate(zip(found.runs, prompts, strict=True)):
        answer, scores = by_definition(lens, prompt, repeat)
        assert list(run.answer) == answer
        own = dict(zip(map(str, found.heads), found.scores[number].tolist(), strict=True))
        assert own == pytest.approx(scores)
        some += sum(scores.values())
    assert some > 0


def test_only_runs_that_recall_more_than_half_count(wired: Lens) -> None:
    good = hidden_tokens(wired, (16,), (0.5,), prompts=3)
    bad = [  # nothing in the text follows the last token, so the answer is the start token
        NeedlePrompt((*one.ids[:-1], next(iter({*range(1, 32)} - {*one.ids}))), one.span, 16, 0.5)
        for one in good[:2]
    ]
    found = retrieval_heads(wired, [*good, *bad], settings=RetrievalSettings(steps=5))
    assert found.prompts == 3
    assert found.counted.tolist() == [[3]]
    assert found.asked.tolist() == [[5]]
    assert found.recall.tolist() == [[0.6]]
    assert float(found["score"].mean.max()) == 1
    assert "3 of 5 runs count" in found.notes[0]
    none = retrieval_heads(wired, bad, settings=RetrievalSettings(steps=5))
    assert none["score"].mean.isnan().all()
    assert none.strong == ()
    assert "does not answer" in none.notes[1]
    half = NeedlePrompt(good[0].ids, (good[0].span[0], good[0].span[1]), 16, 0.5)
    exactly = retrieval_heads(wired, half, settings=RetrievalSettings(steps=2))
    assert exactly.runs[0].recall == 0.5
    assert exactly.prompts == 0  # more than half, not half


def test_copies_that_repeat_may_pass_1_in_the_code_s_form(wired: Lens) -> None:
    # At depth 1 the cue follows the needle, so the answer says it again and again.
    prompts = hidden_tokens(wired, (18,), (1.0,), prompts=1)
    once, often = (
        retrieval_heads(wired, prompts, settings=RetrievalSettings(steps=14, repeat=repeat))
        for repeat in (False, True)
    )
    place = [str(head) for head in once.heads].index(RETRIEVAL_HEAD)
    assert once["score"].mean[place] == 1
    assert once["score"].mean.sum() == 1
    assert often["score"].mean[place] > 1


def test_the_built_in_needles_of_a_model_without_a_tokenizer(wired: Lens) -> None:
    found = retrieval_heads(
        wired, None, (14, 20), (0, 1), prompts=2, settings=RetrievalSettings(steps=5), batch_size=3
    )
    assert found.recall.shape == (2, 2)
    assert found.asked.tolist() == [[2, 2], [2, 2]]
    assert [str(head) for head in found.strong] == [RETRIEVAL_HEAD]
    frame = found.to_frame().set_index("head")
    assert frame.loc[RETRIEVAL_HEAD, ["score", "score_low", "active"]].tolist() == [1, 1, 1]
    assert found.by_place()["runs"].tolist() == [2, 2, 2, 2]
    default = retrieval_heads(wired, prompts=1, depths=(0.5,), settings=RetrievalSettings(steps=4))
    assert default.lengths == (7, 14, 21, 28)


def test_the_shipped_model_retrieves_in_its_last_layer(small: Lens) -> None:
    settings = RetrievalSettings(steps=8)
    places = ((96, 192), (0.0, 0.5, 1.0), 2)
    found = retrieval_heads(small, None, *places, settings=settings)
    assert float(found.recall.mean()) > 0.9
    assert {head.layer for head in found.strong} == {2}
    assert found["score"].mean.max() > 0.9
    with small.edit(al.Uniform(found.strong)):
        without = retrieval_heads(small, None, *places, settings=settings)
    assert float(without.recall.mean()) < 0.2
    with small.edit(al.Uniform("L0H0,L0H5,L1H4,L1H7")):
        other = retrieval_heads(small, None, *places, settings=settings)
    assert float(other.recall.mean()) > float(without.recall.mean()) + 0.5


def test_a_user_s_text_needle_and_question(small: Lens) -> None:
    what = Needle(
        " ".join(words.FILLER),
        "The secret words are gold red old.",
        "What are the secret words? The secret words are",
        "gold red old",
    )
    found = retrieval_heads(small, what, (64, 128), (0.3, 0.9), settings=RetrievalSettings(steps=6))
    assert found.lengths == (64, 128)
    assert found.depths == (0.3, 0.9)
    assert all(len(run.prompt.ids) <= run.prompt.length for run in found.runs)
    assert found.runs[0].text.startswith(" gold red old.")
    assert found.runs[0].recall == 1
    with pytest.raises(TaskError, match="the haystack has"):
        retrieval_heads(small, what, (500,), (0.5,), settings=RetrievalSettings(steps=6))
    with pytest.raises(InputError, match="pass the context of 512"):
        retrieval_heads(small, [what], (300,), (0.5,), settings=RetrievalSettings(steps=300))


def test_a_task_with_spans_is_a_set_of_needles(small: Lens) -> None:
    task = needle(small, prompts=3, length=80, depth=0.2)
    found = retrieval_heads(small, task, settings=RetrievalSettings(steps=5))
    assert len(found.runs) == 3
    assert int(found.asked.sum()) == 3
    assert all(run.prompt.answer.count(" ") == 2 for run in found.runs)
    with pytest.raises(TaskError, match="no spans"):
        retrieval_heads(small, repeated_tokens(small, 2))


def test_rows_are_computed_for_written_tokens_alone(
    wired: Lens, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, ...]] = []
    whole = Rows.dense

    def dense(self: Rows, *arguments: object) -> torch.Tensor:
        sizes.append(self.shape)
        return whole(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Rows, "dense", dense)
    settings = RetrievalSettings(steps=5)
    retrieval_heads(wired, hidden_tokens(wired, (20,), (0.5,)), settings=settings)
    assert len(sizes) == 5 * len(wired.anatomy.sites)
    assert {shape[2] for shape in sizes} == {1}


def test_settings_out_of_range_are_refused(wired: Lens) -> None:
    with pytest.raises(InputError, match="recall=1"):
        RetrievalSettings(recall=1)
    with pytest.raises(InputError, match="steps=0"):
        RetrievalSettings(steps=0)
    with pytest.raises(InputError, match="thresholds="):
        RetrievalSettings(thresholds=(0.1, 5))
    with pytest.raises(InputError, match="Cannot bootstrap"):
        RetrievalSettings(confidence=95)
    with pytest.raises(InputError, match="no needle"):
        retrieval_heads(wired, [])
    with pytest.raises(InputError, match="batch_size=0"):
        retrieval_heads(wired, batch_size=0, lengths=(14,))


def test_a_model_without_room_for_an_answer_is_told(wired: Lens) -> None:
    with pytest.raises(InputError, match=r"context of 32 .* answer of 50"):
        retrieval_heads(wired)


def test_what_does_not_fit_is_told_before_anything_runs(wired: Lens) -> None:
    prompts = hidden_tokens(wired, (14, 32), (0.5,), prompts=1)
    with pytest.raises(InputError, match="pass the context of 32"):
        retrieval_heads(
            wired, prompts, settings=RetrievalSettings(steps=4), batch_size=1,
            progress=lambda *_: pytest.fail("a prompt ran"),
        )  # fmt: skip


@pytest.mark.parametrize("places", [{"lengths": 20}, {"lengths": (14,), "depths": 0.5}])
def test_one_place_is_not_several(wired: Lens, places: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="several"):
        retrieval_heads(wired, **places)


def test_progress_counts_runs(wired: Lens) -> None:
    seen: list[tuple[int, int]] = []
    retrieval_heads(
        wired, None, (14,), (0, 1), 1, RetrievalSettings(steps=4), 1,
        lambda done, all_: seen.append((done, all_)),
    )  # fmt: skip
    assert seen == [(1, 2), (2, 2)]


def test_one_counted_run_has_no_interval(wired: Lens) -> None:
    prompts = hidden_tokens(wired, (16,), (0.5,), prompts=1)
    found = retrieval_heads(wired, prompts, settings=RetrievalSettings(steps=4))
    assert found["score"].mean.max() == 1
    assert math.isnan(float(found["score"].low[0]))
    assert "no interval" in found.notes[1]
