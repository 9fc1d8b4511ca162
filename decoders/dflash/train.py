"""`decodathlon draft train --method dflash`: from a model to a drafter for it, with nothing but the model."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from decodathlon.decoders.dflash.checkpoint import save, shape_for
from decodathlon.decoders.dflash.config import LARGEST
from decodathlon.decoders.speculative.build import Trainable, trainers
from decodathlon.decoders.training import prepare
from decodathlon.harness.commands.command import say
from decodathlon.harness.errors import SpecError


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("--method dflash").add_argument
    add("--layers", type=int, metavar="N", help="of the drafter (default 2)")
    add("--fused", type=int, metavar="N", help="hidden states of the model that it sees (default 5)")
    add("--intermediate", type=int, metavar="N", help="width of its gated layers (default the model's)")
    add("--block", type=int, metavar="N", help="tokens of a block (default 8)")
    add("--short", type=float, metavar="X", help="share of the steps with blocks half as long (default 0)")
    add("--anchors", type=int, metavar="N", help="of each of the 8 texts of a step (default 16)")


def _check(options: argparse.Namespace) -> None:
    prepare.refuse(options, "self-distillation")
    prepare.check(options, {"layers": 1, "fused": 1, "intermediate": 0, "block": 2, "anchors": 1})
    if options.block is not None and options.block > LARGEST:
        raise SpecError(f"--block {options.block}: the most is {LARGEST}")
    if options.short is not None and not 0 <= options.short <= 1:
        raise SpecError(f"--short {options.short} is no share; it lies between 0 and 1")


def _run(options: argparse.Namespace, target: Any) -> int:
    with prepare.held(Path(options.out)):
        return _trained(options, target)


def _trained(options: argparse.Namespace, target: Any) -> int:
    import torch

    from decodathlon.decoders.dflash.drafter import seen_by
    from decodathlon.decoders.dflash.network import Network
    from decodathlon.decoders.dflash.training import Recipe, Trainer, begin_as

    until = time.monotonic() + options.hours * 3600
    folder = Path(options.out)
    shape = {"layers": 2, "fused": 5, "block": 8} | prepare.given(options, "layers", "fused", "block", "intermediate")
    config = shape_for(target, **shape)
    torch.manual_seed(options.seed)
    network = Network(config)
    begin_as(network, target)
    network.to(target.device)
    made = prepare.made_by(options, target, layers=list(config.target_layer_ids))
    prepare.claim(folder, made)
    if (ready := prepare.ready(options, target, seen_by(network), made, until)) is None:
        return 0
    say(f"training {sum(p.numel() for p in network.parameters()) / 1e6:.1f} million weights")
    own = prepare.given(options, "steps", "rate", "classes", "soft", "anchors", "short")
    recipe = Recipe(seed=options.seed, **own)
    trainer = Trainer(
        network, target.model.get_input_embeddings().weight, target.model.get_output_embeddings().weight,
        ready.states, ready.shards, ready.held_out, recipe, ready.report["hash"],
    )  # fmt: skip
    try:
        done = trainer.run(folder / "state.pt", say, until=until)
    except ValueError as error:
        raise SpecError(str(error)) from error
    save(network, folder)
    texts = ready.report | {"about": options.about, "behind": options.behind, "held_out": len(ready.held_out)}
    told = {"recipe": vars(recipe), "texts": texts, "history": trainer.history, **made}
    (folder / "training.json").write_text(json.dumps(told, indent=2) + "\n")
    what = "the drafter" if done else f"the drafter so far (step {trainer.step} of {recipe.steps}; run again to go on)"
    say(f"{what} is in {folder}; --decoder 'dflash[checkpoint={folder}]' takes it")
    return 0


trainers["dflash"] = Trainable(_arguments, _check, _run)
