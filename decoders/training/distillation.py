"""`decodathlon draft train --method self-distillation`: a drafter made of the target's own matrices, repaired."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from decodathlon.decoders.speculative import made
from decodathlon.decoders.speculative.build import Trainable, trainers
from decodathlon.decoders.training import prepare
from decodathlon.harness import decoder as decoders
from decodathlon.harness.commands.command import say
from decodathlon.harness.errors import SpecError

#: Kinds of drafters that have something which may change, as their recipes name them.
REPAIRED = ("magnitude", "wanda", "sparsegpt", "flap", "gradient", "quantised")
#: Where its recipe differs from that of a drafter that begins with nothing.
DEFAULTS = {"steps": 300, "rate": 1e-4, "soft": 1.0}


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("--method self-distillation").add_argument
    add("--decoder", metavar="SPEC", help="whose drafter is repaired: a sparse-self, structured-self or quantised-self")


def _decoder(options: argparse.Namespace) -> Any:
    if not options.decoder:
        raise SpecError("--method self-distillation repairs the drafter of a decoder; name it with --decoder")
    found = decoders.build(options.decoder)
    if not isinstance(found, made.Made) or found.recipe["kind"] not in REPAIRED:
        raise SpecError(
            f"the drafter of {found.spec} has nothing that could be trained and it stay what it is; "
            "sparse-self, structured-self and quantised-self have"
        )
    if getattr(found, "form", "int") != "int":
        raise SpecError(f"{found.spec}: form=float has no scales that could be trained; form=int has")
    if found.weights:
        raise SpecError(f"{found.spec} is trained already; leave weights= out, and the training begins as it was made")
    return found


def _check(options: argparse.Namespace) -> None:
    prepare.refuse(options, "dflash")
    _decoder(options)
    prepare.check(options, {})


def _run(options: argparse.Namespace, target: Any) -> int:
    with prepare.held(Path(options.out)):
        return _repaired(options, target)


def _repaired(options: argparse.Namespace, target: Any) -> int:
    from decodathlon.decoders.training.repair import Repair, Repairable
    from decodathlon.decoders.training.trainer import Recipe

    until = time.monotonic() + options.hours * 3600
    folder, decoder = Path(options.out), _decoder(options)
    decoder.check(target)
    whose = prepare.made_by(options, target, drafter=json.loads(json.dumps(dict(decoder.recipe))))
    prepare.claim(folder, whose)
    say(f"making the drafter of {decoder.spec}")
    rounded = decoder.recipe["kind"] == "quantised"
    try:
        drafter = Repairable(decoder.made(target), target.lean, rounded=rounded)
    except ValueError as error:
        raise SpecError(f"{decoder.spec}: {error}") from error
    count = sum(p.numel() for p in drafter.parameters())
    # weights, their slopes and the optimiser's two moments, in float32
    say(f"{count / 1e6:.1f} million numbers to train, for which {16 * count / 2**30:.1f} GiB of memory are needed")
    if (ready := prepare.ready(options, target, [], whose, until)) is None:
        return 0
    recipe = Recipe(seed=options.seed, **DEFAULTS | prepare.given(options, "steps", "rate", "classes", "soft"))
    identity = {**decoder.recipe, "texts": ready.report["hash"]}
    trainer = Repair(drafter, target, ready.states, ready.shards, ready.held_out, recipe, identity)
    if not (folder / "state.pt").exists():
        trainer.note(say)
    try:
        done = trainer.run(folder / "state.pt", say, until=until)
    except ValueError as error:
        raise SpecError(str(error)) from error
    told = f"{trainer.step} steps of self-distillation on {ready.report['texts']} texts of its own"
    account = {"told": told, "recipe": vars(recipe), "texts": ready.report, "history": trainer.history, **whose}
    place = folder / "drafter"
    made.write(
        place, decoder, target, drafter.settled(target.dtype), told=range(len(target.lean.layers)), trained=account
    )
    what = "the drafter" if done else f"the drafter so far (step {trainer.step} of {recipe.steps}; run again to go on)"
    inner = decoder.spec.removesuffix("]") + ("," if decoder.spec.endswith("]") else "[")
    say(f"{what} is in {place}; --decoder '{inner}weights={place}]' takes it")
    return 0


trainers["self-distillation"] = Trainable(_arguments, _check, _run)
