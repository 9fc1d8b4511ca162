"""Cells: the unit of work. What identifies one, and what became of it; plain values that travel as JSON.

The controller makes `CellSpec`s without torch; `bench.py` turns one into an `Outcome` in the process that measures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from decodathlon.harness.errors import StoreError

Status = Literal["ok", "partial", "failed", "oom", "timeout", "crashed", "cancelled", "unsupported"]
#: What a resumed run does not measure again.
FINAL: tuple[Status, ...] = ("ok", "unsupported")
#: What stands for decoder and model in the rows of the harness's own operations.
HARNESS = "harness"
#: What the rows of suites with targets of their own call their model.
TOY = "toy"
#: Raised when the shape of a shard changes.
SHARD_SCHEMA = 2


#: Fields of a `CellSpec` that say where something lies or what is looked at besides, not what is measured.
_PLACES = ("data", "decoder_files", "model_spec", "model_url", "judge_url", "broken", "profile", "cycle_trace")
#: Fields that came later: where they say what every cell did before, its id stays what it was.
_LATER = {"judge": "none", "split": "test", "limit": 0, "sizes": (), "workload": ""}


@dataclass(frozen=True)
class CellSpec:
    """Everything that decides what a cell measures; plain values, so that it travels as JSON."""

    suite: str
    suite_version: int
    slice: str
    decoder: str
    model: str
    scale: str
    seed: int
    #: What --size states in place of the sizes of the scale: pairs of a name and a number (None: all).
    sizes: Sequence[tuple[str, int | None]] = ()
    device: str = "auto"
    dtype: str = "auto"
    baseline: str = "greedy"
    data: str | None = None
    decoder_files: Sequence[str] = ()
    #: How the user named the model, where that is more than its name: a path.
    model_spec: str = ""
    #: Where the server of a remote model is reached.
    model_url: str = ""
    #: Who grades open answers, and where it is reached.
    judge: str = "none"
    judge_url: str = ""
    #: Which questions: those that are reported, or those that are kept for tuning; and how many (0: as the scale says).
    split: str = "test"
    limit: int = 0
    #: Which prompts, of a suite that has several kinds; empty for its usual ones.
    workload: str = ""
    #: Whether to look where time and memory go, and to keep every cycle of a decoder that drafts.
    profile: bool = False
    cycle_trace: bool = False
    #: Traceback of a plugin that could not be imported: the cell fails with it, without a measurement.
    broken: str | None = None

    @property
    def cell_id(self) -> str:
        """Stable over runs and folders: a hash of what is measured, not of where its files lie."""
        identity = {k: v for k, v in self._values().items() if k not in _PLACES and _LATER.get(k, ...) != v}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        return f"{self.suite}-{digest}"

    @property
    def sized(self) -> str:
        """The scale with the sizes that are not its own: what rows of one setting share."""
        own = ",".join(f"{name}={'all' if count is None else count}" for name, count in sorted(self.sizes))
        return f"{self.scale}[{own}]" if own else self.scale

    def _values(self) -> dict[str, Any]:
        """What `asdict` says; that copies the values as well, which is felt where there are very many cells."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> CellSpec:
        """The inverse of `asdict`."""
        sizes = tuple((name, count) for name, count in stored.get("sizes", ()))
        return cls(**stored | {"decoder_files": tuple(stored.get("decoder_files", ())), "sizes": sizes})

    @property
    def label(self) -> str:
        """How progress lines and pytest ids call it."""
        return "-".join([self.decoder, *([] if self.slice == "all" else [self.slice])])


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass
class Outcome:
    """What became of a cell. `as_shard` is what is stored."""

    spec: CellSpec
    run_id: str
    status: Status = "ok"
    reason: str = ""
    error: str = ""
    #: What the worker wrote to stdout and stderr, its end; kept for cells that were not measured.
    log: str = ""
    started: str = field(default_factory=now)
    seconds: dict[str, float] = field(default_factory=dict)
    decoder: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    #: Where it was measured: node, hardware, GPU (UUID, driver, clocks); the run's record has the rest of its machine.
    place: dict[str, Any] = field(default_factory=dict)
    #: How it was measured: the suite's source, the order of runs, warm-up, clock.
    protocol: dict[str, Any] = field(default_factory=dict)
    #: What else the machine did meanwhile (measure/conditions.py), and the switches of the libraries.
    conditions: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    arrays: dict[str, Any] = field(default_factory=dict)
    #: How it ended the earlier times, in a run that was resumed; oldest first.
    attempts: list[dict[str, Any]] = field(default_factory=list)

    def as_attempt(self) -> dict[str, Any]:
        """What a later attempt remembers of this one."""
        return {k: getattr(self, k) for k in ("status", "reason", "error", "started", "seconds")}

    def as_shard(self) -> dict[str, Any]:
        """What is stored. Of the user's folders only the last name: rows are published."""
        spec = self.spec._values()
        spec["data"] = Path(self.spec.data).name if self.spec.data else None
        spec["model_spec"] = spec["judge_url"] = ""
        del spec["model_url"]
        for part in ("sizes", "workload", "cycle_trace"):
            if not spec[part]:  # as in the shards from before there was such a thing: their hashes stay what they are
                del spec[part]
        spec["decoder_files"] = [Path(p).name for p in self.spec.decoder_files]
        shard = {k: v for k, v in vars(self).items() if k != "spec" and (k != "place" or v)}
        return {"schema": SHARD_SCHEMA, "cell_id": self.spec.cell_id, "spec": spec, **shard}

    @classmethod
    def from_shard(cls, shard: dict[str, Any]) -> Outcome:
        """The inverse of `as_shard`; older shards lack the newer parts.

        Raises:
            StoreError: it was written by newer code, or is no shard of a cell.
        """
        if shard.get("schema", 0) > SHARD_SCHEMA:
            raise StoreError(f"shard {shard.get('cell_id')} was written by newer code; update Decodathlon")
        try:
            spec = CellSpec.from_json(shard["spec"])
            known = cls.__dataclass_fields__
            return cls(spec=spec, **{k: v for k, v in shard.items() if k in known and k != "spec"})
        except (KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{shard.get('cell_id', 'a file')} is not the shard of a cell: {error}") from error
