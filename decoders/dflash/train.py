"""`decodathlon draft train --method dflash`: from a model to a drafter for it, with nothing but the model."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decodathlon.decoders.dflash import corpus
from decodathlon.decoders.dflash.checkpoint import save, shape_for
from decodathlon.decoders.speculative.build import Trainable, trainers
from decodathlon.harness.commands.command import say
from decodathlon.harness.errors import SpecError

#: Shards of texts that are held out, of which so many texts are looked at.
HELD_OUT, LOOKED_AT = 1, 12


def _arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("dflash").add_argument
    add("--shards", type=int, default=60, metavar="N", help="of 32 texts each that the model writes (default 60)")
    add("--answer-tokens", type=int, default=192, metavar="N", help="of the longest answer (default 192)")
    add("--layers", type=int, default=2, metavar="N", help="of the drafter (default 2)")
    add("--fused", type=int, default=5, metavar="N", help="hidden states of the model that it sees (default 5)")
    add("--intermediate", type=int, default=0, metavar="N", help="width of its gated layers (default the model's)")
    add("--block", type=int, default=8, metavar="N", help="tokens of a block (default 8)")
    add("--steps", type=int, default=6000, metavar="N", help="of the optimiser (default 6000)")
    add("--anchors", type=int, default=16, metavar="N", help="of each of the 8 texts of a step (default 16)")
    add("--rate", type=float, default=6e-4, metavar="X", help="the greatest learning rate (default 6e-4)")
    add("--classes", type=int, default=0, metavar="N",
        help="compare with so many frequent and so many random tokens, not with all (default 0: all)")  # fmt: skip


def _run(options: argparse.Namespace, target: Any) -> int:
    import torch

    from decodathlon.decoders.dflash import features
    from decodathlon.decoders.dflash.drafter import seen_by
    from decodathlon.decoders.dflash.network import Network
    from decodathlon.decoders.dflash.training import Recipe, Trainer

    _check(options)
    folder = Path(options.out)
    config = shape_for(
        target, layers=options.layers, fused=options.fused, block=options.block, intermediate=options.intermediate
    )
    texts = folder / "texts"
    corpus.write(target, texts, options.shards, options.answer_tokens, options.seed, say)
    shards = [corpus.read(texts, number) for number in range(options.shards)]
    shards, report = _without_suites(target, shards, options.data)
    say(report["told"])
    torch.manual_seed(options.seed)
    network = Network(config).to(target.device)
    features.make(target, seen_by(network), shards, folder / "states", say)
    count = sum(p.numel() for p in network.parameters())
    say(f"training {count / 1e6:.1f} million weights on {report['tokens']} tokens of {report['texts']} answers")
    recipe = Recipe(
        steps=options.steps, anchors=options.anchors, rate=options.rate, classes=options.classes, seed=options.seed
    )
    full = [number for number in range(options.shards) if shards[number]]
    held_out = [s for number in full[:HELD_OUT] for s in features.load(folder / "states", number)][:LOOKED_AT]
    trainer = Trainer(
        network, target.model.get_input_embeddings().weight, target.model.get_output_embeddings().weight,
        folder / "states", full[HELD_OUT:], held_out, recipe,
    )  # fmt: skip
    try:
        done = trainer.run(folder / "state.pt", say, hours=options.hours)
    except ValueError as error:
        raise SpecError(str(error)) from error
    save(network, folder)
    (folder / "training.json").write_text(
        json.dumps({"recipe": vars(recipe), "texts": report, "history": trainer.history}, indent=2) + "\n"
    )
    what = (
        "the drafter"
        if done
        else f"the drafter so far (step {trainer.step} of {recipe.steps}; the same command goes on)"
    )
    say(f"{what} is in {folder}; --decoder 'dflash[checkpoint={folder}]' takes it")
    return 0


def _check(options: argparse.Namespace) -> None:
    """
    Raises:
        SpecError: an option has no meaning.
    """
    least = {"shards": HELD_OUT + 1, "answer_tokens": 2, "layers": 1, "fused": 1, "intermediate": 0, "block": 2,
             "steps": 1, "anchors": 1, "classes": 0}  # fmt: skip
    for name, low in least.items():
        if getattr(options, name) < low:
            raise SpecError(f"--{name.replace('_', '-')} {getattr(options, name)}: the least is {low}")
    if not 0 < options.rate <= 1:
        raise SpecError(f"--rate {options.rate} is no learning rate; it lies between 0 and 1")


def _without_suites(
    target: Any, shards: Sequence[Sequence[corpus.Written]], data: str | None
) -> tuple[list[list[corpus.Written]], dict[str, Any]]:
    """The texts that share nothing with the suites, and what became of the others."""
    known = corpus.suite_grams(data)
    every = [w for shard in shards for w in shard]
    shared = iter(corpus.overlaps(target, every, known))
    kept, counts = [], Counter[str]()
    for shard in shards:
        clean = []
        for text in shard:
            names = next(shared)
            counts.update(names)
            if not names:
                clean.append(text)
        kept.append(clean)
    left = [w for shard in kept for w in shard]
    tokens = sum(len(w.answer) for w in left)
    told = (
        f"{len(every)} texts; {len(every) - len(left)} left out that share {corpus.WORDS} words in a row with a suite"
    )
    if counts:
        told += f" ({', '.join(f'{name} {count}' for name, count in sorted(counts.items()))})"
    return kept, {"told": told, "texts": len(left), "tokens": tokens, "left_out": dict(counts), "suites": sorted(known)}


trainers["dflash"] = Trainable(_arguments, _run)
