import json
import random
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import attnlens as al
from attnlens.analyses import running, saved, streaming
from attnlens.analyses.per_head import side_by_side, table_of
from attnlens.analyses.profile import profile
from attnlens.analyses.running import RunningMean
from attnlens.analyses.saved import Consumed
from attnlens.analyses.sinks import SinkSettings, sinks
from attnlens.analyses.uncertainty import Interval, bootstrap_mean
from attnlens.errors import FileError, InputError
from attnlens.hooks.reducers import Entropy, FirstTokenMass, MeanDistance, OffsetMass, TokenMass
from attnlens.lens import Lens
from tests.analyses.conftest import tiny_gpt2

SPECIAL = ["<s>", "<e>", "<x>", "<y>"]
MARKS = [".", ","]


def words_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, `<s>` before and `<e>` behind every text."""
    vocabulary = [*SPECIAL, *MARKS, *(f"w{i}" for i in range(6, 40))]
    tokenizer = Tokenizer(models.WordLevel(dict(zip(vocabulary, range(40), strict=True)), "<x>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <e>", special_tokens=[("<s>", 0), ("<e>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<e>", pad_token="<y>",
        unk_token="<x>",
    )  # fmt: skip


@pytest.fixture(scope="module")
def lens() -> Lens:
    """A random float64 model of 3 layers that reads up to 48 words."""
    return al.load(tiny_gpt2(), tokenizer=words_tokenizer())


def make_texts(count: int, longest: int = 14, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = [*MARKS, *(f"w{i}" for i in range(6, 40))]
    return [
        " ".join(rng.choices(words, k=rng.randint(1, longest)) if i else words[:longest])
        for i in range(count)
    ]


TEXTS = make_texts(45)


def run_profile(lens: Lens, texts: Any, batch_size: int = 2, **more: Any) -> Any:
    return profile(lens, texts, batch_size=batch_size, resamples=60, **more)


def run_sinks(lens: Lens, texts: Any, batch_size: int = 2, **more: Any) -> Any:
    settings = SinkSettings(epsilon=0.2, rule="code", most=30, resamples=60)
    return sinks(lens, texts, settings, batch_size, **more)


METHODS: dict[str, Callable[..., Any]] = {"profile": run_profile, "sinks": run_sinks}
both = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


def same(a: object, b: object) -> bool:
    """Whether two results are the same, bit for bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
    if isinstance(a, Interval) and isinstance(b, Interval):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def assert_same(a: object, b: object, but: tuple[str, ...] = ()) -> None:
    assert type(a) is type(b)
    names = [field.name for field in fields(a) if field.name not in but]  # type: ignore[arg-type]
    assert [n for n in names if not same(getattr(a, n), getattr(b, n))] == []


def close(a: object, b: object) -> bool:
    if isinstance(a, Interval) and isinstance(b, Interval):
        return all(close(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.allclose(a, b, rtol=0, atol=1e-12, equal_nan=True)
    return True


class Stop(Exception):
    pass


def broken_off(texts: list[str], after: int, how: type[BaseException] = Stop) -> Iterator[str]:
    yield from texts[:after]
    raise how


@pytest.fixture
def save_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of two batches, each saved; values are held up to 12 texts."""
    monkeypatch.setattr(streaming, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(streaming, "WINDOW", 2)
    monkeypatch.setattr(running, "EXACT_PROMPTS", 12)
    monkeypatch.setattr(streaming.time, "monotonic", lambda: 0.0)


# What streams is what was measured before


@both
def test_an_iterator_gives_what_a_list_gives(lens: Lens, method: Callable[..., Any]) -> None:
    assert_same(method(lens, TEXTS), method(lens, iter(TEXTS)))
    assert_same(method(lens, TEXTS), method(lens, dict.fromkeys(TEXTS, 0).keys()))
    assert_same(method(lens, TEXTS[0]), method(lens, [TEXTS[0]]))


@both
def test_texts_are_the_ids_they_are_made_of(lens: Lens, method: Callable[..., Any]) -> None:
    batch = lens.encode(TEXTS[:20])
    ids = {"input_ids": batch.ids, "attention_mask": batch.inputs["attention_mask"]}
    assert_same(method(lens, TEXTS[:20]), method(lens, ids))


def test_a_profile_of_few_texts_is_the_bootstrap_of_its_statistics(lens: Lens) -> None:
    found = run_profile(lens, TEXTS[:20])
    assert found.names == ("entropy", "distance", "offset_0", "offset_1", "offset_2", "first_token",
                           "special", "special_<s>", "special_<e>", "punctuation")  # fmt: skip
    kinds = {
        "special": frozenset({0, 1}),
        "special_<s>": frozenset({0}),
        "special_<e>": frozenset({1}),
        "punctuation": frozenset({4, 5}),
    }
    reducers = [
        Entropy(),
        MeanDistance(),
        *(OffsetMass((offset,), f"offset_{offset}") for offset in (0, 1, 2)),
        FirstTokenMass(),
        *(TokenMass(ids, name) for name, ids in kinds.items()),
    ]
    measured = lens.measure(TEXTS[:20], reducers, batch_size=2)
    values = {name: side_by_side(measured, name) for name in found.names}
    values |= {name: values[name][..., 0] for name in ("offset_0", "offset_1", "offset_2")}
    names, wanted = table_of(values, 60, 0.95, 0)
    assert names == found.names
    assert same(Interval(found.mean, found.low, found.high), wanted)
    assert found.prompts == 20
    assert found.special == ("<s>", "<e>")
    assert found.method == "bootstrap"


@pytest.mark.parametrize("batch_size", [2, 20])
def test_sinks_of_few_texts_are_those_of_all_patterns(lens: Lens, batch_size: int) -> None:
    found = run_sinks(lens, TEXTS[:20], batch_size)
    trace = lens.run(TEXTS[:20], keep="pattern")
    pattern = trace.pattern.stack().flatten(1, 2)
    longest = max(trace.lengths)
    alpha = torch.full((20, 12, longest), torch.nan, dtype=torch.float64)
    share, first = alpha.clone(), torch.zeros(20, 12, dtype=torch.float64)
    for prompt, length in enumerate(trace.lengths):
        own = pattern[prompt, :, :length, :length]
        alpha[prompt, :, :length] = own.sum(1) / torch.arange(length, 0, -1)
        share[prompt, :, :length] = own.sum(1) / length
        first[prompt] = own[..., 0].mean(-1)
    sunk = (alpha > 0.2).double().masked_fill(alpha.isnan(), torch.nan)
    assert torch.allclose(found.column_mass, alpha.nanmean(0), atol=1e-7)
    assert torch.allclose(found.share, share.nanmean(0), atol=1e-7)
    assert torch.allclose(found.sink_rate, sunk.nanmean(0), atol=1e-12)
    for a, b in zip(found.rate, bootstrap_mean(sunk.nanmean(1), 60), strict=True):
        assert torch.allclose(a, b, atol=1e-12, equal_nan=True)
    for a, b in zip(found.first_token, bootstrap_mean(first, 60), strict=True):
        assert torch.allclose(a, b, atol=1e-7)
    assert found.prompts == tuple((~alpha.isnan())[:, 0].sum(0).tolist())
    over = (share > 0.1).nonzero().tolist()
    largest = sorted(over, key=lambda at: -float(share[tuple(at)]))[:30]
    assert found.calibration_total == len(over) > 30
    places = [[s.prompt, found.heads.index(s.head), s.position] for s in found.calibration]
    assert places == largest
    assert all(s.token == trace.tokens[s.prompt][s.position] for s in found.calibration)
    assert found.token_at(1) == trace.tokens[0][1] or [t[1] for t in trace.tokens].count(
        found.token_at(1)
    ) == max([t[1] for t in trace.tokens].count(w) for w in {t[1] for t in trace.tokens})


@both
@pytest.mark.parametrize("exact", [12, 2048])
def test_batches_and_windows_change_no_number(
    lens: Lens, method: Callable[..., Any], exact: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "EXACT_PROMPTS", exact)
    whole = method(lens, TEXTS)
    assert whole.method == ("bootstrap" if exact > 45 else "poisson bootstrap")
    monkeypatch.setattr(streaming, "WINDOW", 3)
    parts = method(lens, TEXTS)
    assert [f.name for f in fields(whole)
            if not close(getattr(whole, f.name), getattr(parts, f.name))] == []  # fmt: skip
    assert any("Poisson" in note for note in whole.notes) == (exact == 12)


@both
def test_a_special_token_that_comes_late_counted_as_nothing_until_then(
    lens: Lens, method: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [*TEXTS[:14], "w7 <x> w8", *TEXTS[14:20]]
    lone = al.load(lens.model, tokenizer=_one_special(lens))
    for opened, names in ((lens, ("<s>", "<e>", "<x>")), (lone, ("<s>", "<x>"))):
        whole = method(opened, texts)
        with monkeypatch.context() as patch:
            patch.setattr(streaming, "WINDOW", 2)
            parts = method(opened, texts)
        for field in fields(whole):
            assert close(getattr(whole, field.name), getattr(parts, field.name))
        if method is run_profile:
            assert parts.special == names
            assert parts.names == whole.names
            assert float(parts["special_<x>"].mean.max()) > 0


def _one_special(lens: Lens) -> PreTrainedTokenizerFast:
    """The same tokenizer without an end token, so that texts hold one special token."""
    tokenizer = words_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return tokenizer


# Memory


@both
def test_what_is_kept_does_not_grow_with_the_texts(
    lens: Lens, method: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "EXACT_PROMPTS", 10)
    monkeypatch.setattr(saved, "MARKS", 8)

    def kept(count: int) -> tuple[int, int]:
        """Bytes of all tensors that are kept, and characters of all else."""
        path = tmp_path / f"{count}.state"
        method(lens, (TEXTS[i % 15] for i in range(count)), batch_size=15, state=path)
        tensors, facts = saved.read_state(path)
        return sum(tensor.nbytes for tensor in tensors.values()), len(json.dumps(facts))

    few, many = kept(30), kept(30 * 20)
    assert few[0] == many[0]
    assert many[1] < few[1] + 200  # numbers have more digits


def test_no_more_than_a_window_is_read_ahead(lens: Lens) -> None:
    given = 0

    def counting() -> Iterator[str]:
        nonlocal given
        for text in TEXTS * 3:
            given += 1
            yield text

    seen: list[tuple[int, int | None]] = []

    def progress(done: int, total: int | None) -> None:
        seen.append((done, total))
        assert given - done <= 2 * streaming.WINDOW

    run_profile(lens, counting(), progress=progress)
    assert seen[-1] == (135, None)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    run_profile(lens, TEXTS, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (45, 45)
    run_sinks(lens, lens.encode(TEXTS).ids, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (45, 45)


# Stop and go on


@both
@pytest.mark.parametrize("after", [3, 4, 13, 30, 45])
@pytest.mark.usefixtures("save_often")
def test_going_on_gives_the_same_bits(
    lens: Lens, method: Callable[..., Any], after: int, tmp_path: Path
) -> None:
    path = tmp_path / "one.state"
    with pytest.raises(Stop):
        method(lens, broken_off(TEXTS, after), state=path)
    counted = saved.read_state(path)[1]["counted"]["prompts"]
    assert counted == after // 4 * 4  # whole windows
    seen: list[int] = []
    again = method(lens, iter(TEXTS), state=path, progress=lambda done, total: seen.append(done))
    assert seen[0] == counted
    assert_same(again, method(lens, TEXTS))
    assert_same(again, method(lens, TEXTS, state=path))  # all of it was counted


@both
@pytest.mark.parametrize(("seconds", "kept"), [(0.0, 8), (1000.0, 0)])
def test_a_keyboard_interrupt_in_the_middle_of_a_window(
    lens: Lens,
    method: Callable[..., Any],
    seconds: float,
    kept: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streaming, "WINDOW", 2)
    monkeypatch.setattr(streaming, "SAVE_SECONDS", seconds)
    monkeypatch.setattr(streaming.time, "monotonic", lambda: 0.0)
    path = tmp_path / "one.state"

    def interrupt(done: int, total: int | None) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        method(lens, TEXTS, state=path, progress=interrupt)
    assert saved.read_state(path)[1]["counted"]["prompts"] == kept
    assert_same(method(lens, TEXTS, state=path), method(lens, TEXTS))
    assert [file.name for file in tmp_path.iterdir()] == ["one.state"]


@both
def test_what_was_not_due_is_saved_when_the_texts_break_off(
    lens: Lens, method: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "WINDOW", 2)
    path = tmp_path / "one.state"
    with pytest.raises(Stop):
        method(lens, broken_off(TEXTS, 30), state=path)
    assert saved.read_state(path)[1]["counted"]["prompts"] == 28
    assert_same(method(lens, TEXTS, state=path), method(lens, TEXTS))


@pytest.mark.usefixtures("save_often")
def test_more_texts_may_follow(lens: Lens, tmp_path: Path) -> None:
    path = tmp_path / "one.state"
    run_profile(lens, TEXTS[:22], state=path)
    more, whole = run_profile(lens, TEXTS, state=path), run_profile(lens, TEXTS)
    assert more.prompts == 45
    assert torch.allclose(more.mean, whole.mean, atol=1e-12, equal_nan=True)


@pytest.mark.usefixtures("save_often")
def test_a_state_of_something_else_is_refused(lens: Lens, tmp_path: Path) -> None:
    path = tmp_path / "one.state"
    run_profile(lens, TEXTS[:20], state=path)
    before = path.read_bytes()
    other = [*TEXTS[:7], "w9 w9 w9", *TEXTS[8:]]
    with pytest.raises(InputError, match=r"Text 7 is not the one that .*one\.state has counted"):
        run_profile(lens, other, state=path)
    with pytest.raises(InputError, match="counted 20 texts and only 6 are given"):
        run_profile(lens, TEXTS[:6], state=path)
    with pytest.raises(InputError, match="another max_tokens: None there, 9 here"):
        run_profile(lens, TEXTS, state=path, max_tokens=9)
    with pytest.raises(InputError, match="another seed: 0 there, 5 here"):
        run_profile(lens, TEXTS, state=path, seed=5)
    with pytest.raises(InputError, match=r"another layers: \['L0', 'L1', 'L2'\] there, \['L1'\]"):
        run_profile(lens, TEXTS, state=path, layers="L1")
    with pytest.raises(InputError, match="another method: profile there, sinks here"):
        run_sinks(lens, TEXTS, state=path)
    changed = tiny_gpt2()
    with torch.no_grad():
        changed.transformer.h[1].attn.c_attn.weight += 1e-3
    with pytest.raises(InputError, match="another model: GPT2LMHeadModel"):
        run_profile(al.load(changed, tokenizer=lens.tokenizer), TEXTS, state=path)
    words = words_tokenizer()
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    with pytest.raises(InputError, match="another tokenizer"):
        run_profile(al.load(lens.model, tokenizer=words), TEXTS, state=path)
    assert path.read_bytes() == before
    sunk = tmp_path / "two.state"
    run_sinks(lens, TEXTS, state=sunk)
    with pytest.raises(InputError, match=r"another epsilon: 0\.2 there, 0\.3 here"):
        sinks(lens, TEXTS, SinkSettings(0.3, "code", most=30, resamples=60), state=sunk)


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "weights", "old"])
def test_a_damaged_state_is_told(lens: Lens, damage: str, tmp_path: Path) -> None:
    path = tmp_path / "one.state"
    run_profile(lens, TEXTS[:20], state=path)
    whole = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(whole[:-100])
    elif damage == "flipped":
        whole[-50] ^= 1
        path.write_bytes(whole)
    elif damage == "text":
        path.write_text("no tensors")
    elif damage == "weights":
        save_file({"a": torch.zeros(2)}, path)
    elif damage == "old":
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
        del facts["counted"]
        saved.write_state(path, {}, facts)
    with pytest.raises(FileError, match=r"one\.state is damaged.* delete it"):
        run_profile(lens, TEXTS, state=path)


def test_a_folder_is_no_state_and_nobody_is_told_to_delete_it(lens: Lens, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="is a folder") as caught:
        run_profile(lens, TEXTS, state=tmp_path)
    assert "delete" not in str(caught.value)


def test_a_state_cannot_tell_edits_apart(lens: Lens, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="inside lens"), lens.edit(al.Zero("L0H0")):
        run_profile(lens, TEXTS, state=tmp_path / "state")
    with pytest.raises(Stop), lens.edit(al.Zero("L0H0")):
        raise Stop
    run_profile(lens, TEXTS, state=tmp_path / "state")


def test_a_text_without_a_token_is_told_by_its_number(lens: Lens) -> None:
    words = words_tokenizer()
    words.backend_tokenizer.normalizer = normalizers.Replace("z", "")
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    with pytest.raises(InputError, match="Text 1 has no token"):
        run_profile(al.load(lens.model, tokenizer=words), ["w7", "z", "w8"])


def test_a_place_that_cannot_be_written_is_told_at_once(lens: Lens, tmp_path: Path) -> None:
    seen: list[int] = []
    with pytest.raises(FileError, match="its folder does not exist"):
        run_profile(
            lens,
            TEXTS,
            state=tmp_path / "none" / "one.state",
            progress=lambda done, total: seen.append(done),
        )
    assert seen == []


@pytest.mark.parametrize("count", [1, 7, 8, 21, 64])
def test_another_text_is_found_to_within_a_stride(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved, "MARKS", 8)
    texts = [str(number // 3) for number in range(count)]
    log, again = Consumed(), Consumed()
    for text in texts:
        log.add(text)
    again.restore(json.loads(json.dumps(log.facts())))
    again.skip(iter(texts), Path("x"))
    assert again.stride <= max(1, count // 4)
    for place in range(count):
        other = [*texts[:place], texts[place] + "!", *texts[place + 1 :]]
        with pytest.raises(InputError, match=r"^(Text|One of texts) \d+") as found:
            again.skip(iter(other), Path("x"))
        numbers = [int(n) for n in str(found.value).split(" is not")[0].split() if n.isdigit()]
        assert numbers[0] <= place <= numbers[-1] < numbers[0] + again.stride


# What is refused, and what is cut


def test_a_text_over_the_context_is_refused_by_its_number_or_cut(lens: Lens) -> None:
    long = " ".join(["w8"] * 60)
    texts = [*TEXTS, long]
    with pytest.raises(
        InputError, match=r"Text 45 has 62 tokens .* at most 48\. Give max_tokens=48"
    ):
        run_profile(lens, texts)
    found = run_profile(lens, texts, max_tokens=48)
    assert "1 of 46 texts were cut to their first 48 tokens." in found.notes
    cut = [*TEXTS, " ".join(["w8"] * 46)]
    assert_same(found, run_profile(lens, cut), but=("notes",))  # the end token is kept
    short = run_sinks(lens, texts, max_tokens=5)
    wanted = run_sinks(lens, [" ".join(text.split()[:3]) for text in texts])
    assert_same(short, wanted, but=("notes",))
    assert len(short.prompts) == 5
    assert run_sinks(lens, texts, max_tokens=1).prompts == (46,)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (lambda: iter(()), "it gives no text"),
        (list, "is empty"),
        (lambda: iter(["w7", " "]), "Text 1 is empty"),
        (lambda: iter(["w7", [3, 4]]), "Text 1 is of type list"),
        (lambda: ["w7", 5], "Text 1 is of type int"),
        (lambda: 7, "Cannot read int"),
    ],
)
@both
def test_what_is_no_text_is_refused(
    lens: Lens, method: Callable[..., Any], texts: Callable[[], Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        method(lens, texts())


def test_settings_that_make_no_sense_are_refused(lens: Lens, ids: Tensor) -> None:
    with pytest.raises(InputError, match="over the model's context of 48"):
        run_profile(lens, TEXTS, max_tokens=49)
    with pytest.raises(InputError, match="max_tokens=0"):
        run_profile(lens, TEXTS, max_tokens=0)
    with pytest.raises(InputError, match="batch_size=0"):
        profile(lens, TEXTS, batch_size=0)
    for more in ({"state": "x"}, {"max_tokens": 4}):
        with pytest.raises(InputError, match="is for texts"):
            run_profile(lens, ids, **more)
    with pytest.raises(InputError, match="no tokenizer"):
        run_profile(al.load(lens.model), iter(TEXTS))


@both
def test_texts_of_which_the_model_makes_nan_are_counted_in_the_notes(
    method: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_gpt2()
    broken = al.load(model, tokenizer=words_tokenizer(), check=False)
    with torch.no_grad():
        model.transformer.wte.weight[20] = torch.nan
    texts = ["w7 w8", "w9 w20", "w10 w11 w12"]
    found = method(broken, texts, batch_size=1, state=tmp_path / "state")
    assert any(note.startswith("1 of 3 texts gave NaN") for note in found.notes)
    again = method(broken, texts, batch_size=1, state=tmp_path / "state")
    assert again.notes == found.notes
    assert not any("NaN" in note for note in method(broken, texts[::2]).notes)


def _unread() -> Iterator[str]:
    raise AssertionError("a text was read")
    yield ""


@pytest.mark.parametrize("wrong", [{"confidence": 95}, {"resamples": 0}])
def test_a_bootstrap_that_makes_no_sense_is_refused_before_a_text_is_read(
    lens: Lens, wrong: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match="Cannot bootstrap"):
        profile(lens, _unread(), **wrong)
    with pytest.raises(InputError, match="Cannot bootstrap"):
        sinks(lens, _unread(), SinkSettings(**wrong))


def test_files_stream(lens: Lens, tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(TEXTS))
    assert_same(run_sinks(lens, al.open_texts(path)), run_sinks(lens, TEXTS))


def test_layers_may_be_an_iterator_too(lens: Lens) -> None:
    assert_same(
        run_profile(lens, TEXTS[:9], layers=iter(["L0", "L2"])),
        run_profile(lens, TEXTS[:9], layers="L0,L2"),
    )


def test_a_dataset_in_memory_streams(lens: Lens) -> None:
    datasets = pytest.importorskip("datasets")
    column = datasets.Dataset.from_dict({"text": TEXTS})["text"]
    assert_same(run_profile(lens, column), run_profile(lens, TEXTS))


def test_held_means_are_those_of_the_settings(lens: Lens) -> None:
    assert RunningMean().exact == running.EXACT_PROMPTS == 2048
