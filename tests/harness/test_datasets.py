"""Text comes from the folder, the hub cache, the hub or the stand-in, in this order, and every row says from where."""

import hashlib
import json

import pytest

from decodathlon.harness import datasets
from decodathlon.harness.datasets import base, wikitext2
from decodathlon.harness.errors import MissingError, SpecError

NAME = "wikitext-2-raw-v1"
PAGES = " \n = Title = \n \n A first paragraph . \n \n A second one . \n"


@pytest.fixture
def folder(tmp_path):
    for split in ("test", "valid"):
        (tmp_path / f"{NAME}.{split}.txt").write_bytes(PAGES.encode())
    return tmp_path


def test_file_lines_become_the_hubs_rows(folder):
    text = datasets.find(NAME, "test", str(folder))
    assert text.rows == ("", " = Title = \n", "", " A first paragraph . \n", "", " A second one . \n")
    assert text.joined.startswith("\n\n = Title = \n\n\n\n\n A first")
    assert text.record() == {
        "dataset": f"unverified-{NAME}-{text.sha256[:8]}", "revision": text.revision, "split": "test",
        "source": "folder", "sha256": hashlib.sha256(text.joined.encode()).hexdigest(), "rows": 6,
    }  # fmt: skip


def test_windows_line_ends_give_the_same_rows(folder):
    before = datasets.find(NAME, "test", str(folder))
    (folder / f"{NAME}.test.txt").write_bytes(PAGES.replace("\n", "\r\n").encode())
    assert datasets.find(NAME, "test", str(folder)).rows == before.rows


def test_the_real_files_join_to_the_hubs_bytes(data_folder):
    """The hashes of "\\n\\n".join(rows) over the hub's parquet files."""
    expected = {
        "test": ("696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83", 4358),
        "validation": ("b44fb967f92b525731216a507d1fbc44b97446b7ef0a2b4d1a893f81f1bbc29e", 3760),
    }
    for split, (sha256, rows) in expected.items():
        text = datasets.find(NAME, split, str(data_folder))
        assert (text.name, text.sha256, len(text.rows)) == (NAME, sha256, rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "has no wikitext-2-raw-v1.test.txt"), (b"\xff\xfe\x00", "is not UTF-8"), (b" \n \n", "has no text")],
)
def test_a_folder_that_was_named_must_have_the_text(folder, content, message):
    file = folder / f"{NAME}.test.txt"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(MissingError, match=message):
        datasets.find(NAME, "test", str(folder))


def test_json_lines_are_read_and_torn_ones_named(folder):
    whole = datasets.find("wikitext-2-raw-v1", "test", str(folder))
    for split in ("test", "valid"):
        (folder / f"wikitext-2-raw-v1.{split}.txt").unlink()
        rows = [json.dumps({"text": row}) for row in whole.rows]
        (folder / f"wikitext-2-raw-v1.{split}.jsonl").write_text("\n".join(rows) + "\n")
    assert datasets.find("wikitext-2-raw-v1", "test", str(folder)).rows == whole.rows
    path = folder / "wikitext-2-raw-v1.test.jsonl"
    for line, message in [
        ('{"text": "torn', "line 2 is torn"),
        ('{"page": "x"}', "line 2 has no field 'text'"),
        ("3", "line 2"),
    ]:
        path.write_text(rows[0] + "\n" + line + "\n")
        with pytest.raises(MissingError, match=message):
            datasets.find("wikitext-2-raw-v1", "test", str(folder))


def test_the_order_is_cache_then_hub_then_stand_in(monkeypatch):
    asked = []

    def hub(fails):
        def read(split, offline):
            asked.append("hub-cache" if offline else "hub")
            if asked[-1] in fails:
                raise MissingError("not there")
            return (" row \n",), "abc"

        return read

    data = base.registry.get("dataset", NAME)
    said = []
    for fails, source in ((set(), "hub-cache"), ({"hub-cache"}, "hub"), ({"hub-cache", "hub"}, "stand-in")):
        changed = base.DataSet(**{**vars(data), "hub": hub(fails)})
        monkeypatch.setattr(base.registry, "get", lambda kind, name, changed=changed: changed)
        found = datasets.find(NAME, "test", None, said.append)
        assert found.source == source
        assert (NAME in found.name) == (source != "stand-in")
    assert len(said) == 1
    assert "stand-in text instead" in said[0]
    assert asked == ["hub-cache", "hub-cache", "hub", "hub-cache", "hub"]


def test_the_hub_reader_says_missing_when_there_is_no_hub():
    with pytest.raises(MissingError):
        wikitext2.rows_of_hub("test", offline=True)
    with pytest.raises(MissingError):
        wikitext2.rows_of_hub("test", offline=False)


def test_the_stand_in_has_its_own_name_and_disjoint_splits():
    test, validation = (base.registry.get("dataset", NAME).stand_in(s) for s in ("test", "validation"))
    assert test.name == "python-topics"
    assert test.revision.startswith("python-3.")
    assert len(test.joined) > 200_000
    assert len(validation.joined) > 10_000
    assert not set(test.rows) & set(validation.rows)
    assert len(set(test.rows)) == len(test.rows)


def test_an_unknown_data_set_is_named():
    with pytest.raises(SpecError, match="no dataset 'wikitext-2'; did you mean 'wikitext-2-raw-v1'"):
        datasets.find("wikitext-2", "test", None)
