"""Drafters that are made of the target's own matrices, and where they are kept: with the target, and on disk.

On disk a drafter is a folder: `meta.json`, written last, says which model it is of, by which recipe, and what its
layers consist of; `NNN.safetensors` has those matrices of a layer that are not the target's own. `decodathlon draft
build` writes it, one layer at a time. A drafter that is no more than a choice of the target's parts has no other file,
and is written when it is first made for a model that has a revision.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from decodathlon.decoders.speculative.matrices import Int4, Int8
from decodathlon.harness import embedded, progress
from decodathlon.harness.errors import MissingError, SpecError, StoreError
from decodathlon.harness.lazy import torch
from decodathlon.harness.locks import file_lock

if TYPE_CHECKING:
    from torch import Tensor

#: Raise it when files change, or what is made of a recipe, so that older ones are not read.
VERSION = 2
Say = Callable[[str], None]
#: What to do about a drafter that is refused.
REMEDY = (
    "Build it anew (decodathlon draft build) or remove that folder; without it the drafter is made when it is needed."
)
#: Numbers of each parameter that tell one revision of a model from another.
SAMPLED = 512


class Made(ABC):
    """A decoder whose drafter is the target's forward with other matrices, made once per model."""

    #: Whether making it takes so long, and its file is so small, that it is written without being asked for.
    small: ClassVar[bool] = False
    #: A folder with this drafter as training has changed it (`decodathlon draft train`); decoders with a parameter of
    #: that name have such.
    weights: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # of the decoder that this is mixed into
        if self.weights and not (Path(self.weights) / "meta.json").is_file():
            raise MissingError(
                f"weights={self.weights} is no folder with a drafter; decodathlon draft train --method "
                "self-distillation makes one"
            )

    def sources(self) -> list[Path]:
        found: list[Path] = super().sources()  # type: ignore[misc]
        return sorted({*found, *self._files()})

    def _files(self) -> list[Path]:
        """What a trained drafter consists of."""
        folder = Path(self.weights)
        return [folder / "meta.json", *sorted(folder.glob("*.safetensors"))] if self.weights else []

    def remarks(self, target: Any) -> list[str]:
        found: list[str] = super().remarks(target)  # type: ignore[misc]
        if not self.weights:
            return found
        told = json.loads((Path(self.weights) / "meta.json").read_text()).get("trained", {})
        return [*found, f"drafter: changed by training, {told.get('told', 'of which nothing is known')}"]

    @property
    @abstractmethod
    def recipe(self) -> Mapping[str, Any]:
        """`kind`, and all parameters that the drafter depends on; numbers, words and truths."""

    @abstractmethod
    def layers(self, target: Any) -> Iterator[Any]:
        """The drafter's layers (`targets.lean.Layer`), in order."""

    def output(self, target: Any) -> Any:
        """Its output matrix."""
        return target.lean.head

    def made(self, target: Any) -> Any:
        """The drafter's forward: what the target keeps, what lies on disk, or made now.

        Raises:
            SpecError: what lies on disk is of another revision of this model.
        """
        files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in self._files()]
        key = ("made", self.weights, *files, *sorted(self.recipe.items()))
        if key not in target.kept:
            if self.weights:
                target.kept[key] = trained(self, target)
            else:
                target.kept[key] = self._small(target) if self.small else stored(self, target) or self._now(target)
        return target.kept[key]

    def _now(self, target: Any) -> Any:
        return target.lean.replaced(list(self.layers(target)), self.output(target))

    def _small(self, target: Any) -> Any:
        """As it lies on disk; what was written unasked, and is of other weights or damaged, is written anew."""
        try:
            found = stored(self, target)
        except SpecError:
            found = None
        if found is None and target.revision:
            try:
                build(self, target, lambda text: None)
                found = stored(self, target)
            except (MissingError, StoreError) as error:
                warnings.warn(f"{error}; it is made anew in every run", stacklevel=2)
        return found or self._now(target)


def folder_of(decoder: Made, target: Any) -> Path:
    """Where the drafter lies, or would."""
    recipe = dict(decoder.recipe)
    text = json.dumps([recipe, *_computed_by(recipe, torch.device(target.device).type)], sort_keys=True)
    dtype = str(target.dtype).removeprefix("torch.")
    name = "".join(c if c.isalnum() or c in "-._" else "-" for c in target.name)
    short = hashlib.sha256(text.encode()).hexdigest()[:10]
    return embedded.cache_folder() / "drafters" / name / f"{recipe['kind']}-{dtype}-{short}"


def _computed_by(recipe: Mapping[str, Any], device: str) -> list[str]:
    """What lays numbers out in its own way, where that is so: packed 4-bit weights are read by the kernel that packed
    them, and other devices have none."""
    if recipe["kind"] != "quantised":
        return []
    return [device, torch.version.__version__, torch.backends.cpu.get_cpu_capability()]


def fingerprint(target: Any) -> str:
    """A hash of numbers from every parameter of the model: other weights, another fingerprint."""
    found = hashlib.sha256()
    for name, weight in sorted(target.model.named_parameters()):
        flat = weight.detach().flatten()
        some = flat[:: max(1, flat.numel() // SAMPLED)][:SAMPLED].float().cpu()
        found.update(f"{name} {tuple(weight.shape)}".encode())
        found.update(some.numpy().tobytes())
    return found.hexdigest()[:16]


def build(decoder: Made, target: Any, say: Say) -> Path:
    """Make the drafter and write it; of the matrices made, one layer's are held at a time.

    Raises:
        MissingError: it cannot be written; the message says where.
        StoreError: somebody else has been building it for ten minutes.
    """
    kind = decoder.recipe["kind"]
    told = progress.told(range(len(target.lean.layers)), f"{kind}: layers", say)
    return write(folder_of(decoder, target), decoder, target, decoder.layers(target), told=told)


def write(place: Path, decoder: Made, target: Any, layers: Iterator[Any], *, told: Iterable[int], **more: Any) -> Path:
    """Write a drafter's layers into the folder `place`, which is replaced as a whole; `more` goes into its meta.json.

    Raises:
        MissingError, StoreError: as `build`.
    """
    try:
        with file_lock(place.parent / f".{place.name}.lock"):
            return _write_all(place, decoder, target, layers, told, more)
    except OSError as error:
        raise MissingError(f"the drafter cannot be written to {place}: {error.strerror or error}") from error


def _write_all(
    place: Path, decoder: Made, target: Any, layers: Iterator[Any], told: Iterable[int], more: Mapping[str, Any]
) -> Path:
    for stale in place.parent.glob(f".{place.name}-*"):  # of somebody who was killed, for we have the lock
        shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}-"))
    try:
        head, own = decoder.output(target), target.lean
        parts = [_write(next(layers), own.layers[i], work / f"{i:03}.safetensors") for i in told]
        meta = {
            "version": VERSION,
            "model": target.name,
            "revision": target.revision,
            "fingerprint": fingerprint(target),
            "recipe": dict(decoder.recipe),
            "computed_by": _computed_by(decoder.recipe, torch.device(target.device).type),
            "layers": parts,
            "head": _write_matrices({"head": head}, {"head": own.head}, work / "head.safetensors")["head"],
            **more,
        }
        (work / "meta.json").write_text(json.dumps(meta))
        shutil.rmtree(place, ignore_errors=True)
        os.replace(work, place)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return place


def is_stored(decoder: Made, target: Any) -> bool:
    """Whether the drafter of this very model lies on disk, sound."""
    try:
        return stored(decoder, target) is not None
    except SpecError:
        return False


def stored(decoder: Made, target: Any) -> Any:
    """The drafter as it lies on disk, or None.

    Raises:
        SpecError: it was made of other weights than the target's, or is damaged.
    """
    return _stored(folder_of(decoder, target), target)


def trained(decoder: Made, target: Any) -> Any:
    """The drafter in the folder that `weights` names.

    Raises:
        SpecError: it is of another decoder, or was made of other weights than the target's, or is damaged.
    """
    place = Path(decoder.weights)
    try:
        meta = json.loads((place / "meta.json").read_text())
    except (OSError, ValueError) as error:
        raise SpecError(f"the drafter in {place} cannot be read ({error}); train it anew") from error
    here = _computed_by(decoder.recipe, torch.device(target.device).type)
    if meta.get("computed_by") != here:
        raise SpecError(
            f"the numbers of the drafter in {place} are laid out for {meta.get('computed_by')}, and here is {here}; "
            "train it here"
        )
    found = _stored(place, target, "Train it anew (decodathlon draft train --method self-distillation).")
    if found is None:
        raise SpecError(f"the drafter in {place} is of another version of this program; train it anew")
    recipe = meta.get("recipe")
    if recipe != dict(decoder.recipe):
        raise SpecError(
            f"the drafter in {place} is a {_told(recipe)}, and this decoder drafts with {_told(decoder.recipe)}"
        )
    return found


def _told(recipe: Any) -> str:
    return " ".join(f"{k}={v}" for k, v in recipe.items()) if isinstance(recipe, Mapping) else str(recipe)


def _stored(place: Path, target: Any, remedy: str = REMEDY) -> Any:
    try:
        meta = json.loads((place / "meta.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _refused(place, f"cannot be read ({error.strerror or error})", remedy) from error
    except ValueError as error:
        raise _refused(place, f"cannot be read ({error})", remedy) from error
    if not isinstance(meta, dict) or not {"version", "model", "fingerprint", "layers", "head"} <= set(meta):
        raise _refused(place, "is damaged (meta.json lacks parts)", remedy)
    if meta["version"] != VERSION:
        return None
    if meta["fingerprint"] != fingerprint(target):
        raise _refused(
            place,
            f"was made of {_shown(meta['model'], meta['revision'], meta['fingerprint'])}, and the model now is "
            f"{_shown(target.name, target.revision, fingerprint(target))}",
            remedy,
        )
    from safetensors import SafetensorError

    own = target.lean
    try:
        layers = [
            _read(parts, own.layers[i], place / f"{i:03}.safetensors", target.device)
            for i, parts in enumerate(meta["layers"])
        ]
        head = _read_matrices({"head": meta["head"]}, {"head": own.head}, place / "head.safetensors", target.device)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _refused(place, f"is damaged ({str(error).splitlines()[0]})", remedy) from error
    return own.replaced(layers, head["head"])


def _shown(name: str, revision: str, print_: str) -> str:
    return f"{name} ({', '.join(filter(None, [revision and f'revision {revision}', f'weights {print_}']))})"


def _refused(place: Path, why: str, remedy: str) -> SpecError:
    return SpecError(f"the drafter in {place} {why}. {remedy}")


def _kinds() -> dict[str, tuple[Any, Sequence[str]]]:
    """Matrices that have a form on disk, and the tensors that each consists of."""
    from decodathlon.harness.targets.lean import Dense

    return {
        "dense": (Dense, ("weight", "bias")),
        "int4": (Int4, ("packed", "scales", "bias")),
        "int8": (Int8, ("weight", "scale", "bias")),
    }


def _matrices(layer: Any) -> dict[str, Any]:
    a, m = layer.attention, layer.mlp
    found = {} if a is None else {"qkv": a.qkv, "out": a.out}
    return found if m is None else {**found, "gate_up": m.gate_up, "down": m.down}


def _write(layer: Any, own: Any, path: Path) -> dict[str, Any]:
    """Write what is not the target's own; returns what the layer consists of."""
    a = layer.attention
    heads = {} if a is None or a.heads is None else {"heads": a.heads, "key_heads": a.key_heads}
    return {**_write_matrices(_matrices(layer), _matrices(own), path), **heads}


def _write_matrices(matrices: Mapping[str, Any], own: Mapping[str, Any], path: Path) -> dict[str, str]:
    from safetensors.torch import save_file

    parts: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for name, matrix in matrices.items():
        if matrix is own[name]:
            parts[name] = "target"
            continue
        kind, names = next((k, n) for k, (form, n) in _kinds().items() if type(matrix) is form)
        parts[name] = kind
        for part in names:
            if (tensor := getattr(matrix, part)) is not None:
                tensors[f"{name}.{part}"] = tensor.detach().cpu().contiguous()
    if tensors:
        save_file(tensors, str(path))
    return parts


def _read(parts: Mapping[str, Any], own: Any, path: Path, device: Any) -> Any:
    from dataclasses import replace

    found = _read_matrices({k: v for k, v in parts.items() if k not in ("heads", "key_heads")}, _matrices(own), path,
                           device)  # fmt: skip
    heads = {k: parts[k] for k in ("heads", "key_heads") if k in parts}
    a, m = own.attention, own.mlp
    return replace(
        own,
        attention=replace(a, qkv=found["qkv"], out=found["out"], **heads) if "qkv" in found else None,
        mlp=replace(m, gate_up=found["gate_up"], down=found["down"]) if "down" in found else None,
    )


def _read_matrices(parts: Mapping[str, str], own: Mapping[str, Any], path: Path, device: Any) -> dict[str, Any]:
    from safetensors.torch import load_file

    tensors = load_file(str(path), device=str(device)) if any(p != "target" for p in parts.values()) else {}
    found = {}
    for name, kind in parts.items():
        if kind == "target":
            found[name] = own[name]
            continue
        form, names = _kinds()[kind]
        found[name] = form.__new__(form)  # its constructor would make the numbers anew
        for part in names:
            setattr(found[name], part, tensors.get(f"{name}.{part}"))
    return found
