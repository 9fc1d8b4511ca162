"""A run's record explains its decoders, suites and metrics to those who do not have its plugins."""

import json

import pytest

from decodathlon.harness import about
from decodathlon.harness.registry import load_builtins, registry
from decodathlon.harness.results import metrics


@pytest.fixture(autouse=True)
def _builtins():
    load_builtins()


def test_every_decoder_and_suite_is_described_in_plain_json():
    found = about.describe(registry.names("decoder"), registry.names("suite"))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found["decoders"]) == set(registry.names("decoder"))
    assert set(found["suites"]) == set(registry.names("suite"))
    for one in found["decoders"].values():
        assert one["summary"]
        assert " ".join(one["text"].split()).startswith(one["summary"])
    (p,) = [x for x in found["decoders"]["top-p"]["parameters"] if x["name"] == "p"]
    assert (p["type"], p["bounds"]) == ("float", "(0, 1]")
    assert p["sweep"]


def test_settings_of_one_decoder_share_a_description_and_broken_plugins_have_none():
    found = about.describe(["top-p[p=0.5]", "top-p", "a-broken-plugin"], [])
    assert list(found["decoders"]) == ["top-p"]


def test_only_metrics_of_plugins_travel_with_the_run(monkeypatch):
    monkeypatch.setattr(metrics, "METRICS", dict(metrics.METRICS))
    monkeypatch.setattr(registry, "entries", dict(registry.entries))
    assert about.describe([], [])["metrics"] == {}
    metrics.metric("puns", unit="1", better="higher", kind="quality", meaning="Puns per hundred words.")
    assert about.describe([], [])["metrics"] == {
        "puns": {"unit": "1", "better": "higher", "meaning": "Puns per hundred words.", "kind": "quality"}
    }
