"""`--model FOLDER` of a packed model: what may stand in its brackets, and who loads it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from decodathlon.decoders.jit_delta import pack
from decodathlon.decoders.jit_delta.container import MANIFEST, Reader
from decodathlon.harness import models, spec
from decodathlon.harness.errors import SpecError
from decodathlon.harness.registry import registry

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a packed model runs.

    Args:
        weights: where the compressed bytes are. `resident`: on the device that computes. `host`: in the memory of the
            host, and two layers on the GPU. `disk`: in their files, and two layers in memory. `auto`: resident, or on
            disk where `memory` asks for it. `base`: the first bits of each weight alone, resident: a model that errs.
            `contextual`: those, and exactly the chunks of each MLP that matter most for a token: one that errs less.
        bits: of `base` and `contextual`: 4, 5 (0 is the same) or 6 of `nested`; `int4-delta` has a base of 4.
        share: of `contextual`: how much of each MLP is exact.
        memory: the most that weights may take while it runs, packed or rebuilt, such as 8GB.
        base: where the model lies now that this one was packed against (`pack --against`).
    """

    weights: Literal["auto", "resident", "host", "disk", "base", "contextual"] = "auto"
    bits: Literal[0, 4, 5, 6] = 0
    share: float = 0.0
    memory: str = ""
    base: str = ""

    def __post_init__(self) -> None:
        if self.bits and self.weights not in ("base", "contextual"):
            raise SpecError(
                f"bits={self.bits} is of weights=base or contextual; with weights={self.weights} all bits are read"
            )
        if bool(self.share) != (self.weights == "contextual") or not 0 <= self.share <= 1:
            raise SpecError(
                f"share={self.share:g} with weights={self.weights}: weights=contextual takes a share above 0 and at "
                "most 1 of each MLP, and the others none"
            )
        self.budget  # noqa: B018  # raises where it is no size

    @property
    def budget(self) -> int | None:
        """`memory` in bytes.

        Raises:
            SpecError: it is no size.
        """
        if not self.memory:
            return None
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]B)", self.memory.upper())
        if not found:
            raise SpecError(f"memory={self.memory} is no size; write a number and KB, MB or GB, such as 8GB")
        return int(float(found.group(1)) * UNITS[found.group(2)])


class PackedModels:
    """The loader of folders that `decodathlon pack` made."""

    #: A folder that has this file is one of them.
    marker = MANIFEST

    def named(self, parsed: spec.Spec) -> str:
        """What rows call the model: its folder's name, and how it runs; not where things lie.

        Raises:
            SpecError: a parameter that there is not, or that is no such value; first bits of weights that have none.
        """
        asked: Options = spec.fill(Options, parsed, "model", {})
        folder = Path(parsed.name).expanduser()
        if asked.weights in ("base", "contextual"):
            Reader(folder).first_bits(asked.bits)
        return spec.render(folder.resolve().name, replace(asked, base=""))

    def check(self, text: str, *, device: str, dtype: str) -> None:
        """What can be told before anything is loaded; of models that are to keep within bounds, all of it.

        Raises:
            MissingError, SpecError, UnsupportedError: as `target.planned`.
        """
        parsed = spec.parse(text, "model")
        asked: Options = spec.fill(Options, parsed, "model", {})
        reader = Reader(Path(parsed.name).expanduser(), _folder(asked.base))
        if reader.base is not None:
            pack.base_of(reader)
        if asked.budget is None and asked.weights in ("auto", "resident"):
            return
        from decodathlon.decoders.jit_delta.target import planned

        planned(
            Path(parsed.name).expanduser(), self.named(parsed), device=device, dtype=models.pick_dtype(dtype, device),
            where=asked.weights, bits=asked.bits, budget=asked.budget, base=_folder(asked.base),
        )  # fmt: skip

    def __call__(self, text: str, *, device: str, dtype: str) -> Any:
        from decodathlon.decoders.jit_delta.target import load

        parsed = spec.parse(text, "model")
        asked: Options = spec.fill(Options, parsed, "model", {})
        return load(
            Path(parsed.name).expanduser(), self.named(parsed), device=device, dtype=models.pick_dtype(dtype, device),
            where=asked.weights, bits=asked.bits, budget=asked.budget,
            base=_folder(asked.base), share=asked.share,
        )  # fmt: skip


def _folder(text: str) -> Path | None:
    return Path(text).expanduser() if text else None


registry.add("model-loader", "packed", PackedModels(), __file__)
