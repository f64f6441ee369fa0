"""A sweep on Ray gives what it gives here, whatever befalls its workers."""

import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import attnlens as al
from attnlens.errors import BudgetError, FileError, InputError
from attnlens.hooks.edits import Scale, Zero
from attnlens.lens import Lens
from attnlens.sweeps.cluster import Pool, connected
from attnlens.sweeps.modes import Ablator, Mode
from attnlens.sweeps.run import run_trials
from attnlens.sweeps.sent import Sent
from attnlens.sweeps.spread import plan
from attnlens.sweeps.store import Store
from attnlens.sweeps.sweep import Sweep, SweepSettings
from attnlens.sweeps.trials import Trial
from tests.architectures import ARCHITECTURES
from tests.sweeps.dying import deadly
from tests.sweeps.naive import lens_of, task_of

LENGTHS = (14, 9, 12, 11, 8, 13)


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A Ray of two CPUs, as `ray="local"` starts it."""
    pytest.importorskip("ray")
    with connected("local") as ray:
        yield ray


@pytest.fixture
def small() -> Sweep:
    lens = lens_of("llama")
    settings = SweepSettings(batch_size=2)
    return Sweep(lens, task_of(lens, LENGTHS), trials_of(lens), settings=settings)


def trials_of(lens: Lens, mode: Mode = Mode.ZERO) -> list[Trial]:
    ablator = Ablator.of(lens, task_of(lens, LENGTHS), mode)
    return [ablator.trial([head]) for head in lens.anatomy.find("all")]


def test_each_missing_value_is_in_one_unit(small: Sweep) -> None:
    """Prompts 0 and 1 are whole but for a trial, 4 and 5 lack the clean run alone."""
    done = np.zeros((len(small.trials) + 1, len(small.task)), dtype=np.bool_)
    done[:, :2], done[:, 4:] = True, True
    done[3, 1] = done[-1, 4:] = False
    units = plan(small, done, workers=3)
    assert [unit.prompts for unit in units] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert [unit.trials for unit in units] == [(3,), (-1, *range(8)), (-1,)]


def test_units_keep_a_layer_together_and_are_enough_for_all(small: Sweep) -> None:
    heads = small.lens.anatomy.find("all")
    trials = [Trial(f"{head} {i}", [Zero(str(head))]) for i in range(20) for head in heads]
    job = Sweep(small.lens, small.task, trials, settings=small.settings)
    done = np.zeros((len(trials) + 1, len(small.task)), dtype=np.bool_)
    for workers, size in ((1, 64), (4, 30), (40, 8)):
        units = plan(job, done, workers)
        assert len(units) >= 4 * workers or size == 8
        for prompts in (slice(0, 2), slice(2, 4), slice(4, 6)):
            own = [unit.trials for unit in units if unit.prompts == prompts]
            assert sorted(trial for chunk in own for trial in chunk) == list(range(-1, 160))
            layers = [[trials[t].name[:2] for t in chunk if t >= 0] for chunk in own]
            flat = [layer for chunk in layers for layer in chunk]
            assert flat == sorted(flat)
            assert max(len(chunk) for chunk in layers) <= size
            assert sum(len(set(chunk)) > 1 for chunk in layers) == 0


def test_workers_and_their_shares() -> None:
    two = [{"CPU": 8.0}, {"CPU": 8.0}]
    assert Pool.on(two, None, 0) == Pool(1, 8.0, 0)
    assert Pool.on(two, 3, 0) == Pool(3, 4.0, 0)  # 5 would leave 3 of each machine, too few
    assert Pool.on([{"CPU": 2.0}], 5, 0) == Pool(5, 0.25, 0)
    cards = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 4.0}]
    assert Pool.on(cards, None, 0.5).workers == 4
    assert Pool.on(cards, None, 2).workers == 1
    assert Pool.on(cards, None, 0.5).options == {"num_gpus": 0.5}
    for nodes, workers, gpus in ((two, None, 0.5), (cards, None, 3), (two, 0, 0), (cards, 1, 1.5)):
        with pytest.raises(InputError):
            Pool.on(nodes, workers, gpus)


def test_nobody_at_the_address_is_told_at_once() -> None:
    pytest.importorskip("ray")
    with pytest.raises(InputError, match="cannot be reached"), connected("127.0.0.1:1"):
        pass


def test_a_model_made_here_travels_whole(small: Sweep) -> None:
    job = Sent.of(small).open("cpu")
    assert job.lens.model is not small.lens.model
    found, wanted = ({}, {})
    for sweep, values in ((job, found), (small, wanted)):
        sweep.run(lambda prompts, trial, v, values=values: values.update({(trial, *prompts): v}))
    assert found.keys() == wanted.keys()
    assert all((found[key] == wanted[key]).all() for key in wanted)


def test_a_model_of_a_folder_is_loaded_there_and_must_be_the_same(tmp_path: Path) -> None:
    model = ARCHITECTURES["gpt2"].build()
    model.save_pretrained(tmp_path / "model")
    lens = al.load(tmp_path / "model", dtype="float64")
    lens.model.set_attn_implementation("eager")
    job = Sweep(lens, task_of(lens), trials_of(lens))
    sent = Sent.of(job)
    assert len(sent.content) < sum(p.nbytes for p in lens.model.parameters())
    opened = sent.open("cpu").lens.model
    assert opened.dtype == torch.float64
    assert opened.config._attn_implementation == "eager"

    with torch.no_grad():
        lens.model.lm_head.weight[0, 0] += 1
    with pytest.raises(InputError, match="it was changed after it was loaded"):
        Sent.of(job).open("cpu")
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(FileError, match="on every machine"):
        sent.open("cpu")


def test_a_model_over_several_places_is_laid_out_anew(tmp_path: Path) -> None:
    model = ARCHITECTURES["llama"].build()
    model.save_pretrained(tmp_path)
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}
    lens = al.load(tmp_path, device_map=places)
    job = Sweep(lens, task_of(lens), trials_of(lens))
    assert Sent.of(job).open("cpu").lens.model is not lens.model
    lens.model.name_or_path = ""
    with pytest.raises(InputError, match="placed over several devices"):
        Sent.of(job)


def test_what_cannot_travel_is_told(small: Sweep) -> None:
    lock = threading.Lock()
    trial = Trial("locked", lambda lens, prompts: [Zero("L0H0")] if lock else [], {"zero": "L0H0"})
    with pytest.raises(InputError, match="cannot be sent"):
        Sent.of(Sweep(small.lens, small.task, [trial]))


def interrupt(done: int, total: int) -> None:
    if done > total // 2:
        raise KeyboardInterrupt


def test_half_a_sweep_is_resumed_on_ray_over_a_dead_worker(ray: Any, tmp_path: Path) -> None:
    lens = lens_of("llama")
    task = task_of(lens, LENGTHS)
    fatal = deadly(tmp_path / "graves", 1)
    trials = [*trials_of(lens, Mode.RESAMPLE), fatal]
    half = SweepSettings(batch_size=2, store=tmp_path / "store")
    with pytest.raises(KeyboardInterrupt):
        run_trials(lens, task, trials, settings=half, progress=interrupt)
    kept = Store.open(tmp_path / "store").done()
    assert 0 < kept.sum() < kept.size

    told: list[tuple[int, int]] = []
    rest = replace(half, resume=True, ray="local", workers=2)
    there = run_trials(
        lens, task, trials, settings=rest, progress=lambda *counts: told.append(counts)
    )
    assert fatal.edits.dead == 1
    assert told[0][0] > kept.sum()
    assert told[-1] == (kept.size, kept.size)
    here = run_trials(lens, task, trials, settings=SweepSettings(batch_size=3))
    torch.testing.assert_close(there.values, here.values, rtol=0, atol=1e-6)
    torch.testing.assert_close(there.clean, here.clean, rtol=0, atol=1e-6)
    table = pd.read_parquet(tmp_path / "store" / "rows")
    assert not table.duplicated(["prompt", "trial"]).any()
    assert len(table) == kept.size
    assert ray.is_initialized()  # it was there before


@pytest.mark.long
def test_interrupted_on_ray_what_came_is_kept_and_its_workers_go(ray: Any, tmp_path: Path) -> None:
    lens = lens_of("llama")
    trials = trials_of(lens)
    settings = SweepSettings(batch_size=1, store=tmp_path / "store", ray="local", workers=2)
    with pytest.raises(KeyboardInterrupt):
        run_trials(lens, task_of(lens, LENGTHS), trials, settings=settings, progress=interrupt)
    done = Store.open(tmp_path / "store").done()
    assert done.size // 2 < done.sum() < done.size
    free = ray.cluster_resources()["CPU"]
    until = time.monotonic() + 30
    while ray.available_resources().get("CPU") != free:
        assert time.monotonic() < until, "its workers are still there"
        time.sleep(0.2)


@pytest.mark.long
def test_a_trial_without_numbers_is_told_as_it_is_here(ray: Any, tmp_path: Path) -> None:
    lens = lens_of("gpt2")
    task = task_of(lens, LENGTHS)
    bad = Trial("bad", [Scale("L1H1", float("nan"))], {"scale": "nan"})
    trials = [Trial("fine", [Zero("L0H1")]), bad]
    told: list[str] = []
    for place, address in (("here", None), ("there", "local")):
        settings = SweepSettings(store=tmp_path / place, ray=address)
        with pytest.raises(InputError) as raised:
            run_trials(lens, task, trials, settings=settings)
        assert raised.value.__cause__ is None
        told.append(str(raised.value))
    assert told[0] == told[1]
    assert "'bad'" in told[0]
    tables = [Store.open(tmp_path / place).table() for place in ("here", "there")]
    pd.testing.assert_frame_equal(*tables)
    assert set(tables[1]["name"]) == {"clean", "fine"}


@pytest.mark.long
def test_a_unit_that_kills_every_worker_is_given_up(ray: Any, tmp_path: Path) -> None:
    lens = lens_of("llama")
    trials = [Trial("fine", [Zero("L0H1")]), deadly(tmp_path / "graves", 1000)]
    with pytest.raises(BudgetError, match="Workers died 4 times"):
        run_trials(
            lens, task_of(lens), trials, settings=SweepSettings(ray="local", store=tmp_path / "s")
        )
    assert len(list((tmp_path / "graves").iterdir())) == 4


def test_a_local_ray_listens_to_this_machine_alone(ray: Any) -> None:
    assert {node["NodeManagerAddress"] for node in ray.nodes()} == {"127.0.0.1"}
