"""The record of a run tells what code ran, and does not call its own output dirt."""

import subprocess

import pytest

from decodathlon.harness.results import environment


@pytest.fixture
def repository(tmp_path):
    def git(*words):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)

    git("init", "-q")
    (tmp_path / "code.py").write_text("x = 1\n")
    (tmp_path / "results.duckdb").write_bytes(b"old")
    git("add", "-A")
    git("commit", "-q", "-m", "first")
    return tmp_path


def test_a_changed_results_file_is_no_dirt_and_changed_code_is(repository):
    commit, dirty, change = environment.git_state(repository)
    assert len(commit) == 40
    assert (dirty, change) == (False, "")
    (repository / "results.duckdb").write_bytes(b"new")
    assert environment.git_state(repository) == (commit, False, "")
    (repository / "my_notes.py").write_text("untracked, beside the code")
    assert environment.git_state(repository) == (commit, False, "")
    (repository / "decoders").mkdir()
    (repository / "decoders" / "new.py").write_text("untracked, and it runs")
    assert environment.git_state(repository)[:2] == (commit, True)
    (repository / "decoders" / "new.py").unlink()
    (repository / "code.py").write_text("x = 2\n")
    assert environment.git_state(repository)[:2] == (commit, True)


def test_outside_a_repository_nothing_is_claimed(tmp_path):
    assert environment.git_state(tmp_path) == ("", None, "")


def test_the_description_has_versions_and_the_machine():
    found = environment.describe()
    assert found["packages"]["torch"]
    assert found["cores"] >= 1
    assert environment.hardware_name(found, {"threads": 1}) == f"{found['cpu']}, 1 threads"
    assert environment.hardware_name(found, {"processor": "a GPU"}) == "a GPU"


def test_run_ids_sort_by_time_and_differ():
    ids = [environment.run_id() for _ in range(50)]
    assert len(set(ids)) == 50
    assert ids[0][:15] <= ids[-1][:15]
