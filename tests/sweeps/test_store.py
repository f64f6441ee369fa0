"""The store keeps what it was given, refuses what belongs elsewhere, and outlives bad disks."""

import copy
import json
import multiprocessing
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnlens.errors import FileError, InputError
from attnlens.sweeps.manifest import Manifest
from attnlens.sweeps.store import Store

PROMPTS, TRIALS = 3, 4


def manifest(**changed: Any) -> Manifest:
    given: dict[str, Any] = {
        "model": {"name": "GPT2LMHeadModel", "weights": "sha256 12", "config": {"eps": 1e-5}},
        "task": {"name": "repeated", "metric": "loss", "tensors": "sha256 34"},
        "prompts": PROMPTS,
        "trials": [(f"L0H{head}", [{"edit": "Zero", "heads": [head]}]) for head in range(TRIALS)],
        "seed": 5,
        "settings": {"mode": "zero", "scale": 0.1},
        "versions": {"attnlens": "0.1.0", "torch": "2.10"},
    }
    return Manifest.of(**(given | changed))


def value(prompt: int, trial: int) -> float:
    return 100 * trial + prompt + 1 / 3


def fill(store: Store, trials: range = range(-1, TRIALS)) -> None:
    for trial in trials:
        prompts = np.arange(PROMPTS)
        store.append(prompts, trial, 100 * trial + prompts + 1 / 3)


def expected(trials: range = range(-1, TRIALS)) -> pd.DataFrame:
    places = [(prompt, trial) for trial in trials for prompt in range(PROMPTS)]
    names = ["clean", *(f"L0H{head}" for head in range(TRIALS))]
    return pd.DataFrame(
        {
            "prompt": [prompt for prompt, _ in places],
            "trial": [trial for _, trial in places],
            "name": pd.Categorical([names[trial + 1] for _, trial in places], names),
            "value": [value(prompt, trial) for prompt, trial in places],
        }
    )


def only_part(folder: Path) -> Path:
    (part,) = (folder / "rows").glob("part-*.parquet")
    return part


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "sweep"


# What was put in comes out


def test_rows_come_back_by_attnlens_and_by_pandas_alone(folder: Path) -> None:
    with Store.create(folder, manifest()) as store:
        fill(store)
    read = Store.open(folder)
    pd.testing.assert_frame_equal(read.table(), expected())
    assert read.done().all()
    assert read.done().shape == (TRIALS + 1, PROMPTS)
    assert read.values()[-1].tolist() == [value(prompt, -1) for prompt in range(PROMPTS)]
    assert read.values()[2].tolist() == [value(prompt, 2) for prompt in range(PROMPTS)]
    alone = pd.read_parquet(folder / "rows").sort_values(["trial", "prompt"], ignore_index=True)
    assert alone.columns.tolist() == ["prompt", "trial", "name", "value"]
    assert alone["name"].astype(str).tolist() == expected()["name"].astype(str).tolist()
    pd.testing.assert_frame_equal(alone.drop(columns="name"), expected().drop(columns="name"))


def test_rows_in_any_order_and_shape(folder: Path) -> None:
    with Store.create(folder, manifest()) as store:
        store.append([[2], [0]], [[3, 1]], [[1.0, 2.0], [3.0, 4.0]])
        store.append(1, 0, 5)
        store.append([], [], [])
    frame = Store.open(folder).table()
    assert frame[["trial", "prompt", "value"]].to_numpy().tolist() == [
        [0, 1, 5.0],
        [1, 0, 4.0],
        [1, 2, 2.0],
        [3, 0, 3.0],
        [3, 2, 1.0],
    ]


def test_a_store_that_holds_nothing(folder: Path) -> None:
    Store.create(folder, manifest()).flush()
    read = Store.open(folder)
    assert not read.done().any()
    assert read.table().dtypes.equals(expected().dtypes)
    assert len(read.table()) == 0
    assert (folder / "rows").is_dir()
    shutil.rmtree(folder / "rows")
    assert not Store.open(folder).done().any()


def test_what_the_caller_changes_later_is_not_stored(folder: Path) -> None:
    values = np.zeros(PROMPTS)
    with Store.create(folder, manifest(), seconds=1e9) as store:
        store.append(0, 0, 0)
        store.append(np.arange(PROMPTS), 1, values)
        values += 9
    assert Store.open(folder).values()[1].tolist() == [0, 0, 0]


def test_rows_wait_for_seconds_but_never_longer(folder: Path) -> None:
    slow = Store.create(folder / "slow", manifest(), seconds=1e9)
    slow.append(0, 0, 1.0)
    assert Store.open(folder / "slow").done().sum() == 1  # the first at once
    slow.append(1, 0, 1.0)
    assert Store.open(folder / "slow").done().sum() == 1
    slow.flush()
    assert Store.open(folder / "slow").done().sum() == 2
    quick = Store.create(folder / "quick", manifest(), seconds=0)
    for prompt in range(PROMPTS):
        quick.append(prompt, 0, 1.0)
        assert Store.open(folder / "quick").done().sum() == prompt + 1


def test_large_sweeps_have_few_parts_and_many_rows_do_not_wait(folder: Path) -> None:
    whole = manifest(prompts=30_000)
    store = Store.create(folder, whole, seconds=1e9)
    for trial in range(3):
        store.append(np.arange(30_000), trial, np.arange(30_000) / 7)
        assert store.done()[trial].all()
    store.append(0, 3, 1.0)
    store.flush()
    assert len(list((folder / "rows").iterdir())) == 4
    assert len(pd.read_parquet(folder / "rows")) == 90_001
    read = Store.open(folder).values()
    assert np.array_equal(read[:3], np.tile(np.arange(30_000) / 7, (3, 1)))


def test_rows_are_kept_when_the_block_raises(folder: Path) -> None:
    def stopped() -> None:
        with Store.create(folder, manifest(), seconds=1e9) as store:
            fill(store, range(-1, 2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    pd.testing.assert_frame_equal(Store.open(folder).table(), expected(range(-1, 2)))


def test_a_finished_sweep_resumed_stays_as_it_is(folder: Path) -> None:
    with Store.create(folder, manifest()) as store:
        fill(store)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with Store.resume(folder, manifest()) as again:
        assert again.done().all()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


# Several writers


def test_two_writers_never_overwrite_one_another(folder: Path) -> None:
    one = Store.create(folder, manifest(), seconds=0)
    other = Store.resume(folder, manifest(), seconds=0)
    copies = [copy.copy(one), pickle.loads(pickle.dumps(one))]  # noqa: S301 - written above
    for trial, store in enumerate((one, other, *copies)):
        fill(store, range(trial, trial + 1))
    fill(one, range(-1, 0))
    pd.testing.assert_frame_equal(Store.open(folder).table(), expected())
    assert len(list((folder / "rows").iterdir())) == 4


def test_a_forked_process_writes_to_a_part_of_its_own(folder: Path) -> None:
    store = Store.create(folder, manifest(), seconds=1e9)
    fill(store, range(-1, 1))  # of which some are waiting

    def go_on() -> None:
        with store:
            fill(store, range(1, TRIALS))

    forked = multiprocessing.get_context("fork").Process(target=go_on)
    forked.start()
    forked.join()
    assert forked.exitcode == 0
    store.flush()
    assert len(list((folder / "rows").iterdir())) == 2
    assert len(pd.read_parquet(folder / "rows")) == len(expected())
    pd.testing.assert_frame_equal(Store.open(folder).table(), expected())


def test_a_row_computed_twice_is_there_once(folder: Path) -> None:
    first = Store.create(folder, manifest(versions={}))
    second = Store.resume(folder, manifest())
    with second, first:  # the second ends later; its part is the younger one
        fill(first)
        fill(second)
        fill(second)
    read = Store.open(folder)
    pd.testing.assert_frame_equal(read.table(), expected())
    assert not any("twice" in note for note in read.notes)
    with Store.resume(folder, manifest()) as third:
        third.append([0, 1], 2, [value(0, 2), value(1, 2) + 0.25])
    pd.testing.assert_frame_equal(read.table(), expected())
    assert any(
        note == "1 rows were computed twice and differ, by 0.25 at most; those of the older part "
        "count."
        for note in read.notes
    )


def test_stores_of_one_sweep_are_joined_by_copying_their_parts(tmp_path: Path) -> None:
    for name, trials in (("one", range(-1, 2)), ("other", range(2, TRIALS))):
        with Store.create(tmp_path / name, manifest()) as store:
            fill(store, trials)
    shutil.copy(only_part(tmp_path / "other"), tmp_path / "one" / "rows")
    pd.testing.assert_frame_equal(Store.open(tmp_path / "one").table(), expected())


# What does not belong


CHANGES: list[tuple[dict[str, Any], str]] = [
    (
        {"model": {"name": "GPT2LMHeadModel", "weights": "sha256 13", "config": {}}},
        'model.weights is "sha256 12" there and "sha256 13" here',
    ),
    (
        {"model": {"name": "GPT2LMHeadModel", "weights": "sha256 12", "config": {"eps": 1e-6}}},
        "model.config.eps is 1e-05 there and 1e-06 here",
    ),
    (
        {"task": {"name": "repeated", "metric": "accuracy", "tensors": "sha256 34"}},
        'task.metric is "loss" there and "accuracy" here',
    ),
    ({"prompts": 4}, "prompts is 3 there and 4 here"),
    ({"seed": 6}, "seed is 5 there and 6 here"),
    ({"settings": {"mode": "mean", "scale": 0.1}}, 'settings.mode is "zero" there and "mean" here'),
    ({"settings": {"mode": "zero"}}, 'settings.scale is 0.1 there and "absent" here'),
    ({"settings": {"mode": "zero", "scale": 0.1, "a": 1}}, 'settings.a is "absent" there and 1'),
    ({"trials": [("L0H0", [])]}, "the number of trials is 4 there and 1 here"),
    (
        {"trials": [(f"L0H{n + (n == 3)}", [{"edit": "Zero", "heads": [n]}]) for n in range(4)]},
        'trials[3].name is "L0H3" there and "L0H4" here',
    ),
    (
        {"trials": [(f"L0H{n}", [{"edit": "Zero", "heads": [3 - n]}]) for n in range(4)]},
        "trials[0].edits[0].heads[0] is 0 there and 3 here",
    ),
]


@pytest.mark.parametrize(("changed", "told"), CHANGES)
def test_another_sweep_is_refused_by_what_differs(
    folder: Path, changed: dict[str, Any], told: str
) -> None:
    Store.create(folder, manifest())
    with pytest.raises(FileError) as refused:
        Store.resume(folder, manifest(**changed))
    assert str(refused.value).startswith(f"{folder} holds another sweep: {told}")
    assert str(refused.value).endswith("Give the same as before, or choose another folder.")


def test_config_keys_that_one_version_lacks_do_not_matter(folder: Path) -> None:
    Store.create(folder, manifest())
    model = {"name": "GPT2LMHeadModel", "weights": "sha256 12", "config": {"new": 1}}
    with Store.resume(folder, manifest(model=model)) as store:
        fill(store)
    assert Store.open(folder).done().all()


def test_other_versions_are_told(folder: Path) -> None:
    old = manifest(versions={"torch": "1.13", "attnlens": "0.0.1"})
    Store.create(folder, old)
    with Store.resume(folder, manifest()) as store:
        assert store.done().sum() == 0
        assert [note.split(":")[0] for note in store.notes] == [
            "The rows are of several versions of torch",
            "The rows are of several versions of attnlens",
        ]
        fill(store)
    read = Store.open(folder)
    assert read.done().all()
    assert read.notes == store.notes
    assert "1.13" in read.notes[0]


def test_a_store_is_not_taken_by_accident(folder: Path) -> None:
    Store.create(folder, manifest())
    with pytest.raises(FileError, match=r"holds a sweep already: add --resume \(resume=True\)"):
        Store.create(folder, manifest())
    Store.resume(folder, manifest())


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    for make in (Store.create, Store.resume):
        with pytest.raises(FileError, match=r"holds 'thesis.tex' and no manifest"):
            make(tmp_path, manifest())
        with pytest.raises(FileError, match=r"thesis.tex cannot be made a folder"):
            make(tmp_path / "thesis.tex", manifest())
    for wrong in (tmp_path, tmp_path / "thesis.tex", tmp_path / "none"):
        with pytest.raises(FileError, match=r"holds no sweep: it has no manifest.json"):
            Store.open(wrong)


def test_a_folder_that_cannot_be_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        FileError, match=r"cannot be made a folder for a sweep \(File name too long"
    ):
        Store.resume(tmp_path / ("x" * 300), manifest())
    with pytest.raises(FileError, match=r"manifest.json cannot be read \(File name too long"):
        Store.open(tmp_path / ("x" * 300))


def test_parts_without_their_manifest_are_not_taken_for_new(folder: Path) -> None:
    with Store.create(folder, manifest()) as store:
        fill(store)
    (folder / "manifest.json").unlink()
    with pytest.raises(FileError, match=r"holds 'part-.*' and no manifest"):
        Store.resume(folder, manifest())


def test_a_folder_left_by_a_kill_before_the_manifest_is_new(folder: Path) -> None:
    (folder / "rows").mkdir(parents=True)
    (folder / ".attnlens-0123456789abcdef.json").write_text("{")
    with Store.resume(folder, manifest()) as store:
        fill(store)
    assert Store.open(folder).done().all()


def test_a_reader_does_not_write(folder: Path) -> None:
    Store.create(folder, manifest())
    with pytest.raises(FileError, match="opened for reading: resume it"):
        Store.open(folder).append(0, 0, 1.0)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ((PROMPTS, 0, 1.0), "no prompt 3 under trial 0: prompts go from 0 to 2"),
        ((-1, 0, 1.0), "no prompt -1 under trial 0"),
        ((0, TRIALS, 1.0), "no prompt 0 under trial 4.* trials from -1 .clean. to 3"),
        ((0, -2, 1.0), "no prompt 0 under trial -2"),
        (([0, 1], 2, [1.0, np.nan]), "prompt 1 under trial L0H2 is NaN: the model's logits"),
        ((0, -1, np.nan), "prompt 0 under trial clean is NaN"),
        ((0.5, 0, 1.0), "give integers"),
    ],
)
def test_rows_that_cannot_be(folder: Path, rows: Any, told: str) -> None:
    with Store.create(folder, manifest()) as store:
        fill(store, range(-1, 0))
        with pytest.raises(InputError, match=told):
            store.append(*rows)
    pd.testing.assert_frame_equal(Store.open(folder).table(), expected(range(-1, 0)))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"trials": [("a", 1), ("a", 2)]}, "'a' names two trials"),
        ({"trials": [("clean", 1)]}, "'clean' is the name of the unedited run"),
        ({"trials": [("a", {1, 2})]}, "trial a cannot be written as JSON"),
        ({"settings": {"scale": float("nan")}}, "settings cannot be written as JSON"),
        ({"prompts": 0}, "0 prompts: give one at least"),
    ],
)
def test_manifests_that_cannot_be(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        manifest(**changed)


# Damage


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    for written in (
        manifest(),
        manifest(trials=[]),
        manifest(settings={"ä\ud800": [None, 1e-300]}),
    ):
        text = written.to_json()
        assert Manifest.from_json(text, tmp_path) == written
        assert json.loads(text)["prompts"] == PROMPTS


def test_large_descriptions_become_digests_that_still_tell_them_apart(folder: Path) -> None:
    def large(last: float) -> Manifest:
        texts = ["x" * 500_000, "y" * 500_000]
        return manifest(trials=[("L0H0", texts[0]), ("L0H1", texts[1]), ("L0H2", last)])

    Store.create(folder, large(1.0))
    assert (folder / "manifest.json").stat().st_size < 2000
    Store.resume(folder, large(1.0))
    with pytest.raises(FileError, match=r'trials\[2\].edits is "sha256 \w{16}" there and "sha256'):
        Store.resume(folder, large(2.0))


DAMAGES: list[Callable[[bytes], bytes]] = [
    lambda text: text[: len(text) // 2],
    lambda text: b"",
    lambda text: b"[]",
    lambda text: text.replace(b'"prompts"', b'"promptz"'),
    lambda text: text.replace(b'"trials": [', b'"trials": 3, "x": ['),
    lambda text: text.replace(b'"prompts": 3', b'"prompts": "many"'),
    lambda text: text.replace(b"GPT2", b"\xff\xfe"),
    lambda text: b"[" * 100_000,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_is_said(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    Store.create(folder, manifest())
    path = folder / "manifest.json"
    path.write_bytes(damage(path.read_bytes()))
    for attempt in (lambda: Store.open(folder), lambda: Store.resume(folder, manifest())):
        with pytest.raises(FileError, match=r"manifest.json is damaged"):
            attempt()


def test_a_later_format_is_said(folder: Path) -> None:
    Store.create(folder, manifest())
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(FileError, match=r"written by a later attnlens .*update"):
        Store.open(folder)


@pytest.fixture(scope="module")
def whole_part(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("whole") / "sweep"
    with Store.create(folder, manifest(), seconds=1e9) as store:
        store.append(0, 0, value(0, 0))
        fill(store)
    return only_part(folder).read_bytes()


numbers = count()


@given(data=st.data())
def test_a_damaged_part_counts_as_not_done_and_is_never_believed(
    data: st.DataObject, whole_part: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(whole_part)
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    folder = tmp_path_factory.getbasetemp() / f"damaged-{next(numbers)}"
    with Store.create(folder, manifest()) as store:
        fill(store, range(-1, 1))
    (folder / "rows" / "part-0.parquet").write_bytes(content)
    read = Store.open(folder)
    table = read.table()
    left_out = any("part-0.parquet was left out" in note for note in read.notes)
    # A bit may be one that nothing depends on; then the rows are those that were written.
    pd.testing.assert_frame_equal(table, expected(range(-1, 1)) if left_out else expected())
    with Store.resume(folder, manifest()) as store:
        fill(store, range(1, TRIALS))
    pd.testing.assert_frame_equal(Store.open(folder).table(), expected())


def test_a_value_that_the_disk_changed_is_not_believed(folder: Path) -> None:
    values = np.random.default_rng(0).normal(size=PROMPTS)
    with Store.create(folder, manifest()) as store:
        store.append(np.arange(PROMPTS), 0, values)
    content = bytearray(only_part(folder).read_bytes())
    content[content.index(values[1].tobytes()) + 3] ^= 1
    only_part(folder).write_bytes(content)
    read = Store.open(folder)
    assert not read.done().any()
    assert "left out (its check sum is wrong)" in read.notes[0]


def test_foreign_and_unfinished_files_do_not_matter(folder: Path, tmp_path: Path) -> None:
    with Store.create(folder, manifest()) as store:
        fill(store)
    with Store.create(tmp_path / "other", manifest(seed=6)) as other:
        other.append(0, 0, 1e9)
    shutil.copy(only_part(tmp_path / "other"), folder / "rows" / "part-other.parquet")
    pd.DataFrame({"prompt": [0], "trial": [0], "value": [1e9]}).to_parquet(
        folder / "rows" / "foreign.parquet"
    )
    (folder / "rows" / "folder.parquet").mkdir()
    (folder / "rows" / "empty.parquet").touch()
    (folder / "rows" / ".attnlens-0123.parquet").write_bytes(b"PAR1")
    (folder / "rows" / "notes.txt").write_text("mine")
    read = Store.open(folder)
    pd.testing.assert_frame_equal(read.table(), expected())
    left_out = sorted(note for note in read.notes if "was left out" in note)
    assert [Path(note.split(" was left out")[0]).name for note in left_out] == [
        "empty.parquet",
        "folder.parquet",
        "foreign.parquet",
        "part-other.parquet",
    ]
    assert "it is of another sweep" in left_out[-1]
    assert all("count as not done. It may be deleted." in note for note in left_out)


# Disks


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_the_system_breaks_off_loses_nothing(folder: Path) -> None:
    store = Store.create(folder, manifest(prompts=3000), seconds=0)
    store.append(np.arange(10), 0, np.arange(10) / 3)
    with largest_file(8000), pytest.raises(FileError, match=r"larger than this system allows.*res"):
        store.append(np.arange(3000), 1, np.arange(3000) / 3)
    assert store.done().sum() == 10
    assert [path.name for path in (folder / "rows").iterdir()] == [only_part(folder).name]
    store.flush()  # there is room again
    assert Store.open(folder).done().sum() == 3010


ON_SMALL_DISK = """
import subprocess, sys
from pathlib import Path
import numpy as np
from attnlens.errors import FileError
from attnlens.sweeps.manifest import Manifest
from attnlens.sweeps.store import Store

disk = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "small", disk], check=True)
trials = [(f"L0H{n}", n) for n in range(100)]
known = Manifest.of(model={}, task={}, prompts=1000, trials=trials)
values = np.random.default_rng(0).normal(size=(100, 1000))
store = Store.create(disk / "sweep", known, seconds=0)
try:
    for full in range(100):
        store.append(np.arange(1000), full, values[full])
except FileError as error:
    print(str(error).replace(str(disk), "DISK"))
assert 2 < full < 90, full
assert Store.open(disk / "sweep").done().sum() == 1000 * full

subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
assert Store.open(disk / "sweep").done().sum() == 1000 * full
for attempt in (
    lambda: Store.resume(disk / "sweep", known).append(0, full, values[full, 0]),
    lambda: Store.create(disk / "new", known),
):
    try:
        attempt()
    except FileError as error:
        print(str(error).replace(str(disk), "DISK"))

subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
with Store.resume(disk / "sweep", known) as again:
    for trial in np.nonzero(~again.done().all(1))[0][:-1]:
        again.append(np.arange(1000), trial, values[trial])
assert np.array_equal(Store.open(disk / "sweep").values()[:-1], values)
"""


def test_a_full_disk_and_a_read_only_one_are_said_and_the_sweep_goes_on(tmp_path: Path) -> None:
    own_mounts = ["unshare", "--mount", "--map-root-user"]
    try:
        probe = ["mount", "-t", "tmpfs", "none", str(tmp_path)]
        subprocess.run([*own_mounts, *probe], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system lets nobody mount a small disk")
    done = subprocess.run(
        [*own_mounts, sys.executable, "-c", ON_SMALL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    full, read_only, no_folder = done.stdout.splitlines()
    assert full.startswith("DISK/sweep/rows/part-")
    assert "cannot be written; the disk is full: free some space" in full
    assert full.endswith("What was written before is safe: resume to go on from there.")
    assert "cannot be written; the file system is read-only" in read_only
    assert no_folder.startswith("DISK/new cannot be made a folder for a sweep (Read-only file")


def test_reading_needs_no_torch(folder: Path) -> None:
    Store.create(folder, manifest())
    code = (
        "import sys; from attnlens.sweeps.store import Store; Store.open(sys.argv[1]).table(); "
        "print(*sorted({'torch', 'transformers', 'plotly'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""


def test_versions_are_those_installed() -> None:
    here = manifest(versions=None).versions
    assert list(here) == ["attnlens", "torch", "transformers"]
    assert replace(manifest(), versions=here).identity == manifest().identity
