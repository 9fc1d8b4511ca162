"""`decodathlon draft`: make or train drafters before a run, and see which there are."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from decodathlon.decoders.speculative import made
from decodathlon.harness import decoder as decoders
from decodathlon.harness import embedded, models
from decodathlon.harness.commands.command import Command, say
from decodathlon.harness.errors import SpecError
from decodathlon.harness.registry import registry

#: What --method means: a decoder, parameters that the name settles, and options that it takes.
METHODS: dict[str, tuple[str, dict[str, str], tuple[str, ...]]] = {
    **{
        name: ("sparse-self", {"method": name}, ("sparsity", "pattern")) for name in ("magnitude", "wanda", "sparsegpt")
    },
    **{name: ("structured-self", {"method": name}, ("share",)) for name in ("flap", "gradient")},
    "codebook": ("codebook-self", {}, ("bits",)),
    "mixed-precision": ("mixed-precision-self", {}, ("budget-bits",)),
    "quantised": ("quantised-self", {}, ("bits",)),
    "layer-skip": ("layer-skip", {}, ()),
}
OPTIONS = {
    "sparsity": "share of the weights that go",
    "pattern": "2:4 or 4:8 instead of a share",
    "share": "share of the layers' weights that go with their heads and channels",
    "bits": "bits per weight",
    "budget-bits": "bits per weight, on average",
}


class Trainable(NamedTuple):
    """A way to train drafters: its options, what is wrong with them (told before a model is loaded), and what runs with
    them and the model."""

    arguments: Callable[[argparse.ArgumentParser], None]
    check: Callable[[argparse.Namespace], None]
    run: Callable[[argparse.Namespace, Any], int]


#: By --method of `draft train`; the decoders whose drafters these are put them here.
trainers: dict[str, Trainable] = {}


def _arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    one = actions.add_parser("build", help="make the drafter of a decoder and keep it on disk; runs find it there")
    what = one.add_mutually_exclusive_group(required=True)
    what.add_argument("--method", choices=list(METHODS))
    what.add_argument("--decoder", metavar="SPEC", help="the decoder whose drafter is made, instead of --method")
    for name, text in OPTIONS.items():
        able = ", ".join(m for m, (_, _, takes) in METHODS.items() if name in takes)
        one.add_argument(f"--{name}", metavar="X", help=f"{text} ({able})")
    one.add_argument("--force", action="store_true", help="make it anew where there is one")
    _of_model(one)
    two = actions.add_parser("train", help="train a drafter on what the model itself writes; can be left and taken up")
    two.add_argument("--method", choices=sorted(trainers), required=True)
    two.add_argument("--out", required=True, metavar="FOLDER", help="for the drafter, and all that it was made of")
    two.add_argument(
        "--hours", type=float, default=math.inf, metavar="H", help="stop after so many; run again to go on"
    )
    two.add_argument("--seed", type=int, default=0, metavar="N")
    two.add_argument("--shards", type=int, metavar="N", help="of 32 texts each that the model writes (default 60)")
    two.add_argument(
        "--about", type=_about, action="append", default=[], metavar="N:TEXT",
        help="so many shards more, before whose turns the model is told TEXT, which steers what is asked; repeatable",
    )  # fmt: skip
    two.add_argument(
        "--behind", default="", metavar="TEXT", help="a line behind the turns of these shards, as suites ask"
    )
    two.add_argument("--answer-tokens", type=int, metavar="N", help="of the longest answer (default 192)")
    two.add_argument(
        "--steps", type=int, metavar="N", help="of the optimiser; this and what follows: default by method"
    )
    two.add_argument("--rate", type=float, metavar="X", help="the greatest learning rate")
    two.add_argument(
        "--classes", type=int, metavar="N", help="compare with so many frequent and so many random tokens; 0: with all"
    )
    two.add_argument(
        "--soft", type=float, metavar="X", help="share of the model's law, not its token, in what is learnt"
    )
    two.add_argument("--data", default=None, metavar="DIR", help="folder with the data sets, for the look at overlaps")
    _of_model(two)
    for trainable in trainers.values():
        trainable.arguments(two)
    actions.add_parser("list", help="the drafters on disk")


def _about(text: str) -> tuple[int, str]:
    count, colon, about = text.partition(":")
    if not colon or not count.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not N:TEXT")
    return int(count), about


def _of_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=embedded.NAME, metavar="SPEC")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")


def _run(options: argparse.Namespace) -> int:
    return {"list": _list, "train": _train, "build": _build}[options.action](options)


def _loaded(options: argparse.Namespace) -> Any:
    model = models.resolve(options.model)
    models.check(model, models.pick_device(options.device))
    say(f"loading {model.name}")
    return models.load(model, device=options.device, dtype=options.dtype, say=say)


def _train(options: argparse.Namespace) -> int:
    if not options.hours > 0:
        raise SpecError(f"--hours {options.hours}: there is no time to train")
    trainers[options.method].check(options)
    return trainers[options.method].run(options, _loaded(options))


def _build(options: argparse.Namespace) -> int:
    given = {name: getattr(options, name.replace("-", "_")) for name in OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    decoder = decoders.build(options.decoder if options.decoder else _spec(options.method, given))
    if options.decoder and given:
        raise SpecError(f"--{next(iter(given))} goes with --method; with --decoder write it into the brackets")
    if not isinstance(decoder, made.Made):
        able = sorted({name for name, _, _ in METHODS.values()})
        raise SpecError(f"{decoder.spec} has no drafter to be made; one of {', '.join(able)} has")
    target = _loaded(options)
    decoder.check(target)
    if not options.force and made.is_stored(decoder, target):
        say(f"{decoder.spec}: is there already, in {made.folder_of(decoder, target)} (--force makes it anew)")
        return 0
    begin = time.monotonic()
    place = made.build(decoder, target, say)
    mib = sum(f.stat().st_size for f in place.iterdir()) / 2**20
    say(f"{decoder.spec}: made in {time.monotonic() - begin:.0f} s, {mib:.1f} MiB in {place}")
    return 0


def _spec(method: str, given: dict[str, str]) -> str:
    name, settled, takes = METHODS[method]
    if {"sparsity", "pattern"} <= set(given):
        raise SpecError("--sparsity is a share, --pattern so many of each few neighbours: give one of them")
    for option in given:
        if option not in takes:
            able = " and ".join(f"--{t}" for t in takes) or "nothing more"
            raise SpecError(f"--method {method} takes {able}, not --{option}")
    params = {**settled, **{option.replace("-", "_"): value for option, value in given.items()}}
    return name + (f"[{','.join(f'{k}={v}' for k, v in params.items())}]" if params else "")


def _list(options: argparse.Namespace) -> int:
    root = embedded.cache_folder() / "drafters"
    for path in sorted(p for p in root.glob("*/*/meta.json") if not p.parent.name.startswith(".")):
        mib = sum(f.stat().st_size for f in path.parent.iterdir()) / 2**20
        try:
            meta: dict[str, Any] = json.loads(path.read_text())
            params = ", ".join(f"{k}={v}" for k, v in meta["recipe"].items() if k != "kind") or "no parameters"
        except (ValueError, KeyError, TypeError, AttributeError):
            say(f"damaged: {path.parent} ({mib:.1f} MiB); remove it")
            continue
        say(f"{meta['model']}  {meta['recipe']['kind']}: {params}  {mib:.1f} MiB  {path.parent}")
    say(f"drafters are kept in {root}; remove a folder to be rid of one")
    return 0


registry.add("command", "draft", Command("make a drafter before a run", _arguments, _run), __file__)
