"""The command faithfulness: what it prints, writes and refuses."""

import re
from dataclasses import replace

import pandas as pd
import pytest

import attnlens as al
from attnlens.cli import main
from attnlens.cli.faithfulness_job import measures_table
from attnlens.views.faithfulness import faithfulness_part, judged, ordered
from attnlens.zoo import small_path


@pytest.fixture
def run(capsys):
    """Run a command; gives its exit code, what it printed and what it said on the way."""

    def command(*arguments) -> tuple[int, str, str]:
        code = main([str(part) for part in arguments])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out, said.err

    return command


@pytest.fixture(scope="module")
def found():
    lens = al.load(small_path())
    task = al.tasks.key_value(lens, 4, seed=1)
    return al.faithfulness(lens, task, ["input_gradient", "leave_one_out"], seed=1)


def test_the_command_gives_what_the_function_gives(run, found, tmp_path):
    out = tmp_path / "judged"
    code, said, told = run(
        "faithfulness", small_path(), "--task", "key-value", "--prompts", 4, "--seed", 1,
        "--methods", "input_gradient, leave_one_out", "--out", out,
    )  # fmt: skip
    assert code == 0, told
    assert "Judging 2 methods on 4 prompts" in told
    assert "like LOO" in said
    assert "clearly better than random" in said
    assert said.strip().endswith(f"Written to {out}: open {out / 'index.html'}")
    table = pd.read_csv(out / "tables" / "faithfulness.csv").set_index("method")
    assert table.index.tolist() == [*ordered(found), "random"]
    wanted = found.to_frame().set_index("method").loc[table.index]
    pd.testing.assert_frame_equal(table, wanted, check_exact=False)
    typed = pd.read_parquet(out / "tables" / "faithfulness-curves.parquet")
    assert len(typed) == 3 * 21
    page = (out / "index.html").read_text(encoding="utf-8")
    links = re.findall(r'href="([^"#]+)"', page[page.index("<main") :])
    assert all((out / link).is_file() for link in links)
    assert {"tables/faithfulness.csv", "figures/faithfulness.html"} <= set(links)


def test_a_row_says_what_is_clearly_better(found):
    table = measures_table(found)
    cells = [list(column.cells) for column in table.columns]
    assert [cell.plain for cell in cells[0]] == [*ordered(found), "random"]
    column = [str(each.header) for each in table.columns].index("like LOO \u2191")
    verdicts = judged(found, "loo_spearman")
    assert verdicts["leave_one_out"] == 1
    assert verdicts["random"] == 0
    own = {name.plain: cell.plain for name, cell in zip(cells[0], cells[column], strict=True)}
    assert own["leave_one_out"] == "1.00*"
    assert own["random"].endswith(" ")
    turned = replace(found, by_prompt={"deletion": found.by_prompt["loo_spearman"]})
    assert judged(turned, "deletion")["leave_one_out"] == -1  # less is better there


def test_the_figure_has_a_panel_a_measure_and_both_curves(found):
    figure = al.show(found)
    titles = [note.text for note in figure.layout.annotations]
    assert len(titles) == 8 + 2
    assert titles[2].startswith("Deletion area<br><sub>less is better")
    dots = [trace for trace in figure.data if trace.mode == "markers"]
    assert len(dots) == 8
    at = dots[4].y.index(ordered(found)[0])
    best = found.methods.index(ordered(found)[0])
    assert dots[4].x[at] == pytest.approx(float(found["abpc"].mean[best]))
    chance = float(found["abpc"].mean[-1])
    assert any(shape.x0 == shape.x1 == pytest.approx(chance) for shape in figure.layout.shapes)
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    assert len(lines) == 2 * len(found.methods)
    part = faithfulness_part(found)
    assert part.lines[0].startswith("Judged: 2 methods on 4 prompts of key value")


def test_what_cannot_be_judged_is_said(run, tmp_path, encoder_model):
    out = ("--out", tmp_path / "judged")

    def refused(match, *more):
        code, _, told = run("faithfulness", small_path(), *out, *more)
        assert code == 2
        assert match in told
        assert not (tmp_path / "judged").exists()

    refused("no attribution method 'lrp'; there is attnlrp", "--methods", "lrp")
    refused("--methods is empty", "--methods", ", ")
    refused("give that too", "--token", "a")
    refused("write a number", "--replacement", "neutral", "--token", "id:x")
    (tmp_path / "file").write_text("x")
    code, _, told = run("faithfulness", small_path(), "--out", tmp_path / "file")
    assert code == 2
    assert "is a file" in told
    code, _, told = run("faithfulness", encoder_model, *out, "--methods", "random")
    assert code == 2
    assert "cannot be graded" in told


def test_a_model_without_a_tokenizer_is_judged_with_a_token_by_number(run, wired_model, tmp_path):
    given = ("faithfulness", wired_model, "--methods", "leave_one_out", "--prompts", 2,
             "--replacement", "neutral", "--out", tmp_path / "judged")  # fmt: skip
    code, _, told = run(*given)
    assert code == 2
    assert "no tokenizer to take a neutral token from" in told
    code, said, told = run(*given, "--token", "id:20")
    assert code == 0, told
    assert "(id 20)" in said
