from attnlens.views import show
from attnlens.views.tables import ANATOMY_COLUMNS, CHECK_COLUMNS, anatomy_rows, check_rows
from tests.views.models import hand_wired, three_stacks


def test_the_anatomy_has_a_row_a_site():
    anatomy = three_stacks().anatomy
    rows = anatomy_rows(anatomy)
    assert [row[0] for row in rows] == [site.name for site in anatomy.sites]
    assert all(len(row) == len(ANATOMY_COLUMNS) for row in rows)
    figure = show(anatomy)
    assert list(figure.data[0].cells.values[0]) == [row[0] for row in rows]


def test_the_check_says_its_verdict():
    check = hand_wired().check()
    assert all(len(row) == len(CHECK_COLUMNS) for row in check_rows(check))
    assert ("passed" in show(check).layout.title.text) == check.passed
