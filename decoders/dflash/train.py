"""`decodathlon draft train --method dflash`: from a model to a drafter for it, with nothing but the model."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from decodathlon.decoders.dflash import corpus
from decodathlon.decoders.dflash.checkpoint import save, shape_for
from decodathlon.decoders.dflash.config import LARGEST
from decodathlon.decoders.speculative.build import Trainable, trainers
from decodathlon.decoders.speculative.made import fingerprint
from decodathlon.harness.commands.command import say
from decodathlon.harness.errors import MissingError, SpecError

#: Shards of texts that are held out, of which so many texts are looked at.
HELD_OUT, LOOKED_AT = 1, 24


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
    add("--soft", type=float, default=0.0, metavar="X",
        help="share of the target's law, not its token, in what is learnt (default 0: none)")  # fmt: skip


def _run(options: argparse.Namespace, target: Any) -> int:
    import torch

    from decodathlon.decoders.dflash import features
    from decodathlon.decoders.dflash.drafter import seen_by
    from decodathlon.decoders.dflash.network import Network
    from decodathlon.decoders.dflash.training import Recipe, Trainer, begin_as

    until = time.monotonic() + options.hours * 3600
    folder = Path(options.out)
    config = shape_for(
        target, layers=options.layers, fused=options.fused, block=options.block, intermediate=options.intermediate
    )
    known = corpus.suite_grams(options.data, say)
    _claim(folder, _made_by(options, target, config))
    if not corpus.write(target, folder / "texts", options.shards, options.answer_tokens, options.seed, say, until):
        return _later("texts")
    shards, report = _fit(target, [corpus.read(folder / "texts", number) for number in range(options.shards)], known)
    say(report["told"])
    full = [number for number, texts in enumerate(shards) if texts]
    if len(full) <= HELD_OUT:
        raise SpecError(
            f"of {options.shards} shards of texts {len(full)} have any left to train on; give --shards more"
        )
    torch.manual_seed(options.seed)
    network = Network(config)
    begin_as(network, target)
    network.to(target.device)
    if not features.make(target, seen_by(network), shards, folder / "states", say, until):
        return _later("hidden states")
    count = sum(p.numel() for p in network.parameters())
    say(f"training {count / 1e6:.1f} million weights on {report['tokens']} tokens of {report['texts']} answers")
    recipe = Recipe(
        steps=options.steps, anchors=options.anchors, rate=options.rate, classes=options.classes,
        soft=options.soft, seed=options.seed,
    )  # fmt: skip
    held_out = [s for number in full[:HELD_OUT] for s in features.load(folder / "states", number)][:LOOKED_AT]
    trainer = Trainer(
        network, target.model.get_input_embeddings().weight, target.model.get_output_embeddings().weight,
        folder / "states", full[HELD_OUT:], held_out, recipe,
    )  # fmt: skip
    try:
        done = trainer.run(folder / "state.pt", say, until=until)
    except ValueError as error:
        raise SpecError(str(error)) from error
    save(network, folder)
    told = {"recipe": vars(recipe), "texts": report, "history": trainer.history, **_made_by(options, target, config)}
    (folder / "training.json").write_text(json.dumps(told, indent=2) + "\n")
    what = "the drafter" if done else f"the drafter so far (step {trainer.step} of {recipe.steps}; run again to go on)"
    say(f"{what} is in {folder}; --decoder 'dflash[checkpoint={folder}]' takes it")
    return 0


def _later(what: str) -> int:
    say(f"the time is over, and the {what} are not all there; the same command goes on")
    return 0


def _made_by(options: argparse.Namespace, target: Any, config: Any) -> dict[str, Any]:
    """What all that lies in the folder depends on."""
    return {
        "model": target.name,
        "weights": fingerprint(target),
        "dtype": str(target.dtype).removeprefix("torch."),
        "answer_tokens": options.answer_tokens,
        "seed": options.seed,
        "layers": list(config.target_layer_ids),
    }


def _claim(folder: Path, made_by: dict[str, Any]) -> None:
    """
    Raises:
        SpecError: the folder holds what was made of another model, or with other options.
        MissingError: it cannot be written.
    """
    file = folder / "made-by.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = json.loads(file.read_text()) if file.exists() else None
        if before is None:
            file.write_text(json.dumps(made_by, indent=2) + "\n")
    except ValueError as error:
        raise SpecError(f"{file} is torn; remove {folder} and begin anew") from error
    except OSError as error:
        raise MissingError(f"--out {folder} cannot be written: {error.strerror}") from error
    for name, value in made_by.items():
        if before is not None and before.get(name) != value:
            raise SpecError(
                f"--out {folder} holds what was made with {name} {before.get(name)}, not {value}; take another folder"
            )


def _check(options: argparse.Namespace) -> None:
    """
    Raises:
        SpecError: an option has no meaning.
    """
    least = {"shards": HELD_OUT + 1, "answer_tokens": 2, "layers": 1, "fused": 1, "intermediate": 0, "block": 2,
             "steps": 1, "anchors": 1, "classes": 0}  # fmt: skip
    if options.block > LARGEST:
        raise SpecError(f"--block {options.block}: the most is {LARGEST}")
    for name, low in least.items():
        if getattr(options, name) < low:
            raise SpecError(f"--{name.replace('_', '-')} {getattr(options, name)}: the least is {low}")
    if not 0 <= options.soft <= 1:
        raise SpecError(f"--soft {options.soft} is no share; it lies between 0 and 1")
    if not 0 < options.rate <= 1:
        raise SpecError(f"--rate {options.rate} is no learning rate; it lies between 0 and 1")


def _fit(
    target: Any, shards: Sequence[Sequence[corpus.Written]], known: dict[str, set[tuple[str, ...]]]
) -> tuple[list[list[corpus.Written]], dict[str, Any]]:
    """The texts that share nothing with the suites, each prompt once; and what became of the others."""
    every = [w for shard in shards for w in shard]
    shared = iter(corpus.overlaps(target, every, known))
    seen, counts, again = set(), Counter[str](), 0
    kept: list[list[corpus.Written]] = []
    for shard in shards:
        kept.append([])
        for text in shard:
            names, prompt = next(shared), tuple(text.prompt)
            counts.update(names)
            again += prompt in seen
            if not names and prompt not in seen:
                kept[-1].append(text)
            seen.add(prompt)
    left = [w for shard in kept for w in shard]
    looked = ", ".join(f"{name} {counts[name]}" for name in sorted(known)) or "none at hand"
    told = (
        f"{len(every)} texts, {again} of them a second time; left out, for they share {corpus.WORDS} words in a row "
        f"with a suite: {looked}"
    )
    tokens = sum(len(w.answer) for w in left)
    return kept, {"told": told, "texts": len(left), "tokens": tokens, "left_out": {n: counts[n] for n in sorted(known)}}


trainers["dflash"] = Trainable(_arguments, _check, _run)
