import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from attnlens.errors import HeadError, InputError
from attnlens.views import show
from tests.views.models import REPEATED, hand_wired, three_stacks


def _values(figure: go.Figure, number: int = 0) -> np.ndarray:
    return np.array(figure.data[number].z, dtype=float)


def test_the_previous_token_head_is_drawn_as_the_diagonal_below():
    trace = hand_wired().run(REPEATED, keep=("pattern",))
    figure = show(trace, "L0H1")
    values = _values(figure)
    assert values.shape == (9, 9)
    assert np.allclose(np.diag(values, -1), 1, atol=1e-6)
    assert np.isnan(values[0, 1])  # the future is blank, not 0
    assert not np.isnan(np.tril(values)).any()


def test_rows_are_queries_from_the_top():
    figure = show(hand_wired().run(REPEATED, keep=("pattern",)), "L0H1")
    assert figure.layout.yaxis.autorange == "reversed"
    assert figure.data[0].y[1].startswith("5")  # token id 5 at position 1
    assert list(figure.data[0].x) == list(figure.data[0].y)


def test_several_heads_are_panels_named_by_head():
    figure = show(hand_wired().run(REPEATED, keep=("pattern",)), "L0H1,L1H2")
    assert [note.text for note in figure.layout.annotations] == ["L0H1", "L1H2"]
    assert len(figure.data) == 2


def test_all_kept_heads_are_drawn_where_none_is_named():
    trace = hand_wired().run(REPEATED, keep=("pattern",), heads="L1H2,L1H3")
    assert len(show(trace).data) == 2


def test_chosen_rows_keep_their_own_labels():
    trace = hand_wired().run(REPEATED, keep=("pattern",), rows=[3, 8])
    figure = show(trace, "L0H1")
    values = _values(figure)
    assert values.shape == (2, 9)
    assert values[0, 2] == pytest.approx(1, abs=1e-6)
    assert values[1, 7] == pytest.approx(1, abs=1e-6)
    assert np.isnan(values[0, 4:]).all()
    assert figure.data[0].y[1].startswith("3")


def test_padding_is_not_drawn():
    import torch

    inputs = {
        "input_ids": torch.tensor([REPEATED, [0, 5, 9, 7, 0, 0, 0, 0, 0]]),
        "attention_mask": torch.tensor([[1] * 9, [1] * 4 + [0] * 5]),
    }
    trace = hand_wired().run(inputs, keep=("pattern",))
    assert _values(show(trace, "L0H1", prompt=1)).shape == (4, 4)


@pytest.mark.parametrize("rows", [None, -2])
def test_padding_on_the_left_is_not_drawn_either(rows):
    ids = torch.tensor([[0, 0, 0, *REPEATED[:6]], REPEATED])
    mask = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    padded = hand_wired().run(
        {"input_ids": ids, "attention_mask": mask}, keep=("pattern",), rows=rows
    )
    alone = hand_wired().run([REPEATED[:6]], keep=("pattern",), rows=rows)
    drawn, wanted = show(padded, "L0H1").data[0], show(alone, "L0H1").data[0]
    assert np.allclose(_z(drawn), _z(wanted), atol=1e-6, equal_nan=True)
    assert list(drawn.x) == list(wanted.x)
    assert list(drawn.y) == list(wanted.y)


def _z(trace: go.Heatmap) -> np.ndarray:
    return np.array(trace.z, dtype=float)


def test_cross_attention_has_decoder_rows_and_text_columns():
    import torch

    ids = torch.randint(1, 40, (1, 7))
    inputs = {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    trace = three_stacks().run(inputs, keep=("pattern",))
    figure = show(trace, "cross.L1H2")
    assert _values(figure).shape == (4, 7)
    assert not np.isnan(_values(figure)).any()
    assert _values(show(trace, "enc.L0H0")).shape == (7, 7)
    assert np.isnan(_values(show(trace, "dec.L0H0"))[0, 1])


def test_wrong_requests_say_what_is_there():
    trace = hand_wired().run(REPEATED, keep=("pattern",), heads="L0H1")
    with pytest.raises(InputError, match="L1H2 was not kept"):
        show(trace, "L1H2")
    with pytest.raises(HeadError, match="L7"):
        show(trace, "L7H0")
    with pytest.raises(InputError, match="no prompt 3"):
        show(trace, "L0H1", prompt=3)
    with pytest.raises(InputError, match="no figure of a str"):
        show("text")
    with pytest.raises(InputError, match="'pattern' was not kept"):
        show(hand_wired().run(REPEATED, keep=("z",)))
