"""The drafter that ships with the project: small enough, described, and worth having."""

import json

import pytest

from decodathlon.decoders.dflash import checkpoint
from decodathlon.harness import decoder as decoders
from decodathlon.harness import embedded, models
from decodathlon.harness.decoder import Limits
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.registry import load_builtins

load_builtins()
FOLDER = checkpoint.SHIPPED / embedded.NAME
#: Questions of the kind that its texts were about, in other words than those have.
QUESTIONS = (
    "How do I keep tomatoes on a balcony alive through a hot summer?",
    "Explain to a child why the moon changes its shape.",
    "I have three job offers. How should I choose between them?",
    "A shop sells pens at 3 dollars each. How much do 7 pens cost, and how much change is left of 50 dollars?",
    "Write a short letter to a neighbour whose dog barks at night.",
    "Solve the equation 4x - 7 = 21 and explain each step.",
)


def test_it_is_small_and_tells_what_it_is():
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) <= 18 * 2**20
    card = (FOLDER / "README.md").read_text()
    for heading in ("## Recipe", "## Data", "## Worth", "## What it is not good for"):
        assert heading in card
    told = json.loads((FOLDER / "training.json").read_text())
    assert told["model"] == embedded.NAME
    texts, recipe = told["texts"], told["recipe"]
    command = card.partition("```bash")[2].partition("```")[0]
    for name in ("steps", "rate", "classes", "soft", "short"):
        assert f"--{name} {recipe[name]}" in command
    assert f"--shards {texts['shards']} " in command
    assert [f"--about '{count}:{about}'" in command for count, about in texts["about"]] == [True] * 3
    assert f"--behind '{texts['behind']}'" in command
    assert f"Seed {recipe['seed']};" in card
    assert f"{texts['texts']:,} answers of {texts['tokens']:,} tokens" in card
    whole, steered = texts["shards"] + sum(n for n, _ in texts["about"]), sum(n for n, _ in texts["about"])
    assert f"Of {whole} shards {steered} were" in card
    for name, count in texts["left_out"].items():
        assert count == 0 or f"{count} of {name}" in card
    series = ", ".join(f"{h['tau']:.2f} after {h['step']:,} steps" for h in told["history"])
    assert series in card
    assert f"took {told['history'][-1]['minutes']:.0f} minutes" in card.replace("\n", " ")
    assert f"on {texts['held_out']} texts that were held out" in card


def test_the_embedded_model_gets_it_and_drafts_better_than_by_chance():
    if not embedded.is_ready():
        pytest.skip("the embedded model was not fetched yet; `pytest suites/ --benchmark` does it")
    target = models.load(models.resolve(embedded.NAME), device="cpu", dtype="auto", say=lambda text: None)
    decoder = decoders.build("dflash")
    assert decoder.remarks(target) == [f"drafter: shipped {embedded.NAME}"]
    assert set(decoder.sources()) >= {FOLDER / "config.json", FOLDER / "model.safetensors"}
    prompts = [target.chat([{"role": "user", "content": text}]) for text in QUESTIONS]
    answers = decoder.generate(
        target, prompts, Limits(48, ignore_eos=True, trace=True), RowRandom(0, range(len(prompts)))
    )
    cycles = sum(len(a.trace) for a in answers)
    made = sum(1 + c["accepted"] for a in answers for c in a.trace)
    assert made / cycles > 1.4, "tokens per cycle; a drafter at random makes 1.0"
