"""The arena: blind sides, votes that count once, sets that may not change, and ratings against closed forms."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tiny_models

from decodathlon.harness.arena import pairs, ratings
from decodathlon.harness.arena.pairs import Pair, Vote
from decodathlon.harness.arena.ratings import Game
from decodathlon.harness.commands.command import main
from decodathlon.harness.errors import SpecError


@pytest.fixture
def arena(tmp_path):
    some = [Pair(f"p{i}", f"Why {i}?", "own", "stem", (f"first {i}", f"second {i}")) for i in range(40)]
    return pairs.save(tmp_path / "r.arena" / "mine", decoders=["top-p", "min-p"], model="m", pairs=some, more={})


def test_sides_are_random_by_annotator_and_pair_and_stay(arena):
    left = {who: [arena.shown(p, who)[0].startswith("first") for p in arena.pairs] for who in ("ann", "bob")}
    assert left["ann"] == [arena.shown(p, "ann")[0].startswith("first") for p in arena.pairs]
    assert left["ann"] != left["bob"]
    assert all(8 < sum(sides) < 32 for sides in left.values())


@pytest.mark.parametrize("said", ["left", "right", "tie", "bad"])
def test_a_vote_means_the_answer_that_was_seen(arena, said):
    for pair in arena.pairs:
        vote = arena.vote(pair.id, "ann", said)
        if said in ("tie", "bad"):
            assert vote.choice == said
        else:
            seen = arena.shown(pair, "ann")[0 if said == "left" else 1]
            assert seen.startswith(vote.choice)
    assert arena.left("ann") == []
    assert len(arena.left("bob")) == 40


def test_nobody_votes_twice_on_a_pair(arena):
    arena.vote("p3", "ann", "left")
    with pytest.raises(SpecError, match="ann has judged p3 already"):
        arena.vote("p3", "ann", "right")
    arena.vote("p3", "bob", "left")
    assert len(arena.votes()) == 2
    assert [p.id for p in arena.left("ann")] == [p.id for p in arena.pairs if p.id != "p3"]


def test_many_at_once_lose_nothing(arena):
    def one(i):
        try:
            arena.vote(f"p{i % 10}", f"a{i // 20}", "tie")
        except SpecError:
            return 0
        return 1

    with ThreadPoolExecutor(8) as pool:
        counted = sum(pool.map(one, range(60)))
    assert counted == len(arena.votes()) == 30, "each of three annotators once on each of ten pairs"


@pytest.mark.parametrize(
    ("pair", "who", "said", "message"),
    [
        ("p99", "ann", "left", "there is no pair 'p99'"),
        ("p1", " ", "left", "needs a name"),
        ("p1", "ann", "middle", "'middle' is none of left, right, tie, bad"),
    ],
)
def test_what_is_no_vote_is_refused(arena, pair, who, said, message):
    with pytest.raises(SpecError, match=message):
        arena.vote(pair, who, said)
    assert arena.votes() == []


def test_a_set_that_is_edited_while_it_is_open_takes_no_votes(arena):
    path = arena.folder / pairs.PAIRS
    before = path.read_text()
    path.write_text(before.replace("first 3", "better 3"))
    with pytest.raises(SpecError, match="was changed while it was open"):
        arena.vote("p3", "ann", "left")
    with pytest.raises(SpecError, match="is not what the set was made with"):
        pairs.load(arena.folder)
    path.write_text(before)
    arena.vote("p3", "ann", "left")


def test_votes_of_another_set_are_refused_and_a_torn_line_is_mended(arena):
    arena.vote("p1", "ann", "left")
    path = arena.folder / pairs.VOTES
    with path.open("a") as file:
        file.write('{"pair": "p2", "anno')  # killed
    assert len(arena.votes()) == 1
    arena.vote("p2", "ann", "left")
    assert len(arena.votes()) == 2
    path.write_text(json.dumps({"pair": "p1", "annotator": "x", "choice": "tie", "when": "", "set": "other"}) + "\n")
    with pytest.raises(SpecError, match="line 1: this vote is of another set"):
        arena.votes()


def test_sets_with_two_pairs_of_one_name_or_none_at_all_are_refused(tmp_path):
    twice = [Pair("p", "Why?", "own", "", ("a", "b"))] * 2
    with pytest.raises(SpecError, match="has two pairs 'p'"):
        pairs.save(tmp_path / "s", decoders=["a", "b"], model="m", pairs=twice, more={})
    with pytest.raises(SpecError, match="holds a set already"):
        pairs.save(tmp_path / "s", decoders=["a", "b"], model="m", pairs=twice, more={})
    with pytest.raises(SpecError, match="holds no set of pairs"):
        pairs.load(tmp_path / "nowhere")


def test_answers_may_hold_whatever_ends_a_line_in_unicode(tmp_path):
    odd = "one\u2028two\u0085three\u2029\x0bfour"
    some = [Pair("p", odd, "own", "", (odd, "\ud800"))]
    made = pairs.save(tmp_path / "s", decoders=["a", "b"], model="m", pairs=some, more={})
    assert made.pairs[0].answers == (odd, "\ud800")


def test_a_damaged_vote_is_named_and_takes_no_other_with_it(arena):
    arena.vote("p0", "ann", "left")
    arena.vote("p1", "ann ", "tie")
    assert [v.annotator for v in arena.votes()] == ["ann", "ann"], "a blank makes nobody else of him"
    path = arena.folder / pairs.VOTES
    whole = path.read_text()
    path.write_text(whole + whole)
    assert len(arena.votes()) == 2, "a line that stands there twice is one vote"
    path.write_text("{" + whole)
    with pytest.raises(SpecError, match="line 1 is no vote"):
        arena.vote("p2", "ann", "left")
    path.write_text(whole.replace('"tie"', '"both"'))
    with pytest.raises(SpecError, match="line 2: 'both' is none of"):
        arena.votes()


# --- What votes say ----------------------------------------------------------------------------------------------


def played(rate, prompts, rng, votes=1):
    return [Game(f"q{i}", "a", "b", float(rng.random() < rate)) for i in range(prompts) for _ in range(votes)]


def test_a_rating_of_two_is_the_logarithm_of_the_odds():
    games = [Game(f"q{i}", "a", "b", 1.0 if i < 75 else 0.0) for i in range(100)]
    found = ratings.ratings(games)
    odds = (75 + ratings.PRIOR) / (25 + ratings.PRIOR)
    assert found["a"].value - found["b"].value == pytest.approx(400 * math.log10(odds), abs=1e-3)
    assert found["a"].value + found["b"].value == pytest.approx(0, abs=1e-6)
    assert found["a"].low < found["a"].value < found["a"].high


def test_ratings_of_three_are_found_again():
    truth, rng = {"a": 300.0, "b": 0.0, "c": -300.0}, np.random.default_rng(0)
    games = []
    for i in range(3000):
        x, y = [("a", "b"), ("b", "c"), ("a", "c")][i % 3]
        p = 1 / (1 + 10 ** ((truth[y] - truth[x]) / 400))
        games.append(Game(f"q{i}", x, y, float(rng.random() < p)))
    found = ratings.ratings(games)
    for name, value in truth.items():
        assert found[name].value == pytest.approx(value, abs=30)
        assert found[name].low < value < found[name].high


def test_who_wins_all_has_a_finite_rating():
    found = ratings.ratings([Game(f"q{i}", "a", "b", 1.0) for i in range(20)])
    assert math.isfinite(found["a"].value)
    assert found["a"].low is None, "that all say the same tells little of the next one"
    assert ratings.ratings([]) == {}
    rate = ratings.win_rate([Game(f"q{i}", "a", "b", 1.0) for i in range(20)])
    assert (rate.value, rate.high) == (1.0, 1.0)
    assert 0.8 < rate.low < 0.9
    two = [Game(f"q{i}", "a", "b", 1.0) for i in range(2)]
    assert ratings.win_rate(two).low is None
    assert ratings.ratings(two)["a"].low is None


def test_the_interval_is_over_prompts_and_covers():
    """Ten people who all say the same of a prompt are one observation."""
    rng = np.random.default_rng(0)
    once = played(0.5, 60, rng)
    tenfold = [g for g in once for _ in range(10)]
    a, b = ratings.win_rate(once), ratings.win_rate(tenfold)
    assert (a.low, a.high) == pytest.approx((b.low, b.high))
    held = [found.low <= 0.6 <= found.high for found in (ratings.win_rate(played(0.6, 80, rng)) for _ in range(300))]
    assert np.mean(held) == pytest.approx(0.95, abs=0.04)
    assert math.isnan(ratings.win_rate([]).value)
    assert ratings.win_rate(once[:1]).low is None


def test_kappa_of_the_example_of_its_author():
    """Fleiss 1971: 10 subjects, 14 raters, five categories; kappa 0.21. The fifth stands for a second kind of bad."""
    table = [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]  # fmt: skip
    votes = [
        Vote(f"p{i}", f"r{n}", str(category), "")
        for i, row in enumerate(table)
        for n, category in enumerate(c for c, count in enumerate(row) for _ in range(count))
    ]
    assert ratings.kappa(votes).value == pytest.approx(0.21, abs=0.005)
    assert ratings.kappa(votes[:14]) is None, "all say the same"
    assert ratings.kappa([Vote("p", "r", "tie", "")]) is None


# --- The command -------------------------------------------------------------------------------------------------


def test_build_export_import_and_ratings(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DECODATHLON_DATA", "")
    monkeypatch.delenv("DECODATHLON_DATA")
    model = tiny_models.save_folder(tmp_path / "model")
    results = ["--results", str(tmp_path / "r.duckdb")]
    build = [
        "arena",
        "build",
        "--name",
        "mine",
        "--pairs",
        "6",
        "--tokens",
        "4",
        "--model",
        str(model),
        "--device",
        "cpu",
    ]
    assert main([*build, "--decoder", "top-p", "--decoder", "greedy", *results]) == 0
    assert "6 pairs in" in capsys.readouterr().out
    arena = pairs.load(tmp_path / "r.arena" / "mine")
    assert arena.decoders == ("top-p", "greedy")
    assert len({p.prompt for p in arena.pairs}) == 6, "no prompt twice before all came once"
    out = tmp_path / "out.jsonl"
    assert main(["arena", "export", "mine", "--out", str(out), *results]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert "top-p" not in out.read_text(), "it is blind"
    votes = tmp_path / "votes.jsonl"
    votes.write_text(
        "".join(json.dumps({"pair": r["pair"], "annotator": "kim", "choice": "left"}) + "\n" for r in rows)
    )
    assert main(["arena", "import", "mine", str(votes), *results]) == 0
    for vote, row in zip(arena.votes(), rows, strict=True):
        (pair,) = [p for p in arena.pairs if p.id == row["pair"]]
        meant = pair.answers[0 if vote.choice == "first" else 1]
        assert meant == row["left"], "left as the service saw it"
    assert main(["arena", "import", "mine", str(votes), *results]) == 2
    assert "line 1: kim has judged" in capsys.readouterr().err
    assert main(["arena", "ratings", *results]) == 0
    said = capsys.readouterr().out
    assert "top-p" in said
    assert "6" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build", "--name", "X y", "--decoder", "a", "--decoder", "b"], "--name X y"),
        (["build", "--name", "x", "--decoder", "top-p"], "given twice, not 1 times"),
        (["build", "--name", "x", "--decoder", "top-p", "--decoder", "min-p", "--pairs", "0"], "--pairs 0: at least 1"),
        (["build", "--name", "x", "--decoder", "top-p", "--decoder", "nope"], "there is no decoder 'nope'"),
        (["export", "nope"], "there is no set 'nope'"),
        (["ratings"], "there are no sets"),
    ],
)
def test_bad_words_are_refused_before_anything_is_loaded(tmp_path, capsys, words, message):
    assert main(["arena", *words, "--results", str(tmp_path / "r.duckdb")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is no vote"),
        ('{"pair": "p1"}', "line 1 is no vote"),
        ('{"pair": "p99", "choice": "left"}', "there is no pair 'p99'"),
        ('{"pair": "p1", "choice": "A"}', "choice 'A' is none of"),
        ('{"pair": "p1", "choice": "left", "sha256": "x"}', "is of another set"),
    ],
)
def test_a_wrong_import_adds_nothing(arena, capsys, tmp_path, line, message):
    file = tmp_path / "votes.jsonl"
    file.write_text('{"pair": "p2", "choice": "tie"}\n' * (line != "{") + line + "\n")
    assert main(["arena", "import", "mine", str(file), "--results", str(tmp_path / "r.duckdb")]) == 2
    assert message.replace("line 1", "line 2" if line != "{" else "line 1") in capsys.readouterr().err
    assert arena.votes() == []
