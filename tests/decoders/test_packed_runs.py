"""`pytest suites/ --benchmark` on a packed model: the same numbers, and what --weights and --memory say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers as hf

from decodathlon.decoders.jit_delta import pack
from decodathlon.harness import spec
from decodathlon.harness.errors import SpecError
from decodathlon.harness.results import store

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A random model in bfloat16, whose matrices are large enough to be packed."""
    folder = tmp_path_factory.mktemp("plain") / "plain"
    tiny_models.save_folder(folder, hidden_size=128, intermediate_size=192, head_dim=32)
    hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed(plain):
    pack.pack(plain, plain.with_name("packed"), "nested", [].append)
    return plain.with_name("packed")


def run(results, *options):
    words = [sys.executable, "-m", "pytest", "suites/", "--benchmark", "--gates", "none"]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("DECODATHLON_")}
    return subprocess.run(
        [*words, "--results", str(results), *map(str, options)], cwd=ROOT, capture_output=True, text=True, check=False,
        timeout=300, env=inherited | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def metrics(results, suite):
    with store.connect(results) as connection:
        rows = connection.execute(
            "SELECT cell.decoder, cell.model, metric, value FROM metric JOIN cell USING (run_id, cell_id) "
            "WHERE suite = ?",
            [suite],
        ).fetchall()
    return {(decoder, metric): value for decoder, _, metric, value in rows}, {model for _, model, _, _ in rows}


def test_a_packed_model_has_the_numbers_of_the_plain_one_and_stays_within_its_memory(plain, packed, tmp_path):
    chosen = [f"--suite={suite}" for suite in ("wikitext2", "throughput")]
    chosen += [f"--decoder={decoder}" for decoder in ("temperature", "self-delta[k=2]")]
    chosen += ["--dtype", "bfloat16", "--baseline", "greedy"]
    whole, disk = tmp_path / "whole.duckdb", tmp_path / "disk.duckdb"
    for results, model in ((whole, [plain]), (disk, [packed, "--weights", "disk", "--memory", "0.5MB"])):
        done = run(results, "--scale", "smoke", "--model", *model, *chosen)
        assert done.returncode == 0, done.stdout + done.stderr
    expected, _ = metrics(whole, "wikitext2")
    found, names = metrics(disk, "wikitext2")
    assert found == expected
    assert found
    assert names == {"packed[weights=disk,memory=0.5MB]"}
    speeds, _ = metrics(disk, "throughput")
    assert {"fetched_bytes_per_token", "weight_bytes_per_token", "weight_hit_share", "bits_per_weight"} <= {
        metric for decoder, metric in speeds if decoder == "self-delta[k=2]"
    }
    for results, folder in ((whole, plain), (disk, packed)):
        size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        assert metrics(results, "throughput")[0]["self-delta[k=2]", "weights_on_disk_bytes"] == size > 0
    run_file = next(iter(disk.with_suffix(".shards").glob("*/run.json")))
    assert json.loads(run_file.read_text())["options"]["model"].endswith("[weights=disk,memory=0.5MB]")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--weights", "nowhere"], "weights=nowhere is not one of auto, resident, host, disk"),
        (["--memory", "much"], "memory=much is no size; write a number and KB, MB or GB, such as 8GB"),
        (["--memory", "0.1MB"], "which needs memory="),
        (["--resume", "last", "--weights", "disk"], "leave --weights out"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_loaded(packed, tmp_path, options, words):
    model = [] if "--resume" in options else ["--model", packed, "--scale", "smoke"]
    done = run(tmp_path / "r.duckdb", *model, *options)
    assert done.returncode == 4
    assert words in done.stderr


def test_a_plain_model_has_no_such_options(plain, tmp_path):
    done = run(tmp_path / "r.duckdb", "--model", plain, "--weights", "disk")
    assert done.returncode == 4
    assert "has no parameter 'weights'" in done.stderr
    assert "decodathlon pack" in done.stderr


def test_parameters_are_added_to_a_spec():
    assert spec.also("m", "model", {"a": None}) == "m"
    assert spec.also("m[b=1]", "model", {"a": "2", "c": None}) == "m[b=1,a=2]"
    with pytest.raises(SpecError, match="'a' is given twice"):
        spec.also("m[a=1]", "model", {"a": "2"})
