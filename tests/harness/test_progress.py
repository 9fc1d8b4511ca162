"""Long work tells soon, now and then, and how long the rest will take."""

from decodathlon.harness import progress


def test_the_first_line_comes_soon_and_the_others_now_and_then(monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    for _ in progress.told(list(range(20)), "work", lambda line: said.append((now[0], line))):
        now[0] += 5.0
    assert [when for when, _ in said] == [10.0, 45.0, 80.0]
    assert said[0][1] == "  work: 2 of 20, about 90 s left"
    assert said[-1][1] == "  work: 16 of 20, about 20 s left"


def test_short_work_says_nothing(monkeypatch):
    said = []
    assert list(progress.told([1, 2, 3], "work", said.append)) == [1, 2, 3]
    assert said == []


def test_units_may_count_for_more(monkeypatch):
    """By hand: after the first, 100 of 200 are done in 50 s."""
    now, said = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    for unit in progress.told([100, 60, 40], "tensors", said.append, size=float):
        now[0] += unit / 2
    assert said[0] == "  tensors: 1 of 3, about 50 s left"
