"""`decodathlon new decoder NAME`: a decoder that works, to be changed into one's own."""

from __future__ import annotations

import argparse
import importlib.util
import keyword
import re
import shlex
import sys
from pathlib import Path

from decodathlon.harness.commands.command import Command, say
from decodathlon.harness.errors import SpecError
from decodathlon.harness.registry import RESERVED, registry
from decodathlon.harness.results import environment

_HERE = Path(__file__).parent / "templates"
#: What a template draws its tokens from.
FORMS = {
    "sampler": "draws each token from a law of its own (most methods)",
    "general": "sees whole prompts and answers (search, best-of-n, speculation)",
    "chain": "moves whole texts step by step (Markov chains)",
}


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=["decoder"])
    parser.add_argument("name", metavar="NAME", help="kebab-case, such as top-a")
    told = "; ".join(f"{name}: {what}" for name, what in FORMS.items())
    parser.add_argument("--form", choices=list(FORMS), default="sampler", help=f"{told} (default sampler)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default NAME.py in this folder, - written as _")


def _run(options: argparse.Namespace) -> int:
    name = options.name
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise SpecError(f"{name!r} is not kebab-case: small letters and digits, words joined by -, such as top-a")
    if name in RESERVED:
        raise SpecError(f"{name!r} means something else here; choose another name")
    if name in registry.names("decoder"):
        source = registry.entries["decoder", name].source
        raise SpecError(f"there is a decoder {name!r} already ({source}); choose another name")
    path: Path = options.out or Path(name.replace("-", "_") + ".py")
    if not path.suffix == ".py" or not path.resolve().parent.is_dir():
        raise SpecError(f"--out {path}: name a .py file in a folder that exists")
    title = "".join(word.capitalize() for word in name.split("-"))
    if keyword.iskeyword(title):
        raise SpecError(f"{name!r} would make a class {title}, which is a word of Python; choose another name")
    if path.stem in sys.stdlib_module_names or importlib.util.find_spec(path.stem) is not None:
        raise SpecError(f"{path.name} would hide the module {path.stem} of Python's; name another --out")
    text = (_HERE / f"{options.form}.txt").read_text(encoding="utf-8")
    try:
        with path.open("x", encoding="utf-8") as handle:
            handle.write(text.replace("__name__", name).replace("__Class__", title))
    except FileExistsError:
        raise SpecError(f"{path} is there already; it was left as it is. Name another --out") from None
    except OSError as error:
        raise SpecError(f"{path} cannot be written: {error.strerror}") from None
    shown = shlex.quote(str(path))
    say(f"wrote {path}. It works as it is; try it (about two minutes):")
    suites = "suites/" if Path("suites").is_dir() else shlex.quote(str(environment.ROOT / "suites"))
    rest = "--suite audit" if options.form == "chain" else "--decoder top-p --scale smoke"
    say(f"  pytest {suites} --benchmark --decoder-file {shown} --decoder {name} {rest}")
    say("  decodathlon board")
    say("Then make it yours: docs/add-a-decoder.md")
    return 0


registry.add("command", "new", Command("start a decoder of one's own from a template", _arguments, _run), __file__)
