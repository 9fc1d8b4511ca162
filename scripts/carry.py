"""For a machine that is reachable only by copying files: pack what a run needs, and bring its shards back.

    python scripts/carry.py pack OUT --model-cache --data DIR    # here: the code, the embedded model, data, in parts
    python3 carry.py unpack OUT WHERE                            # there: joins, checks, unpacks, says what to run
    python scripts/carry.py results OUT.tar.gz RUN_FOLDER...     # there: the shards of runs
    python scripts/carry.py unpack OUT.tar.gz WHERE && decodathlon ingest WHERE      # here again

Needs nothing but Python's own library; `pack` puts a copy of this file beside the parts.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MANIFEST = "manifest.json"


def digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def pack(out: Path, *, model_cache: Path | None, data: Path | None, part_bytes: int) -> list[Path]:
    """One compressed archive of code, model and data, cut into parts, and a manifest of their hashes."""
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise SystemExit(f"{out} is not empty; name a new folder")
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True)
    with tempfile.TemporaryDirectory() as work:
        whole = Path(work) / "whole.tar.gz"
        with tarfile.open(whole, "w:gz", compresslevel=1) as archive:
            for name in filter(None, listed.stdout.split("\0")):
                if (ROOT / name).is_symlink() or (ROOT / name).exists():
                    archive.add(ROOT / name, f"code/{name}", recursive=False)
            if model_cache is not None:
                if not (model_cache / "models").is_dir():
                    raise SystemExit(f"{model_cache} holds no model; run `decodathlon models fetch` first")
                archive.add(model_cache / "models", "cache/models")
            if data is not None:
                archive.add(data, "data")
            state = Path(work) / "state.json"
            state.write_text(json.dumps(_state([n for n in listed.stdout.split("\0") if n])), encoding="utf-8")
            archive.add(state, "code/.packed.json")
        parts = _cut(whole, out, part_bytes)
        manifest = {"sha256": digest(whole), "parts": {p.name: digest(p) for p in parts}}
    (out / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(__file__, out / "carry.py")
    return parts


def _state(names: list[str]) -> dict[str, object]:
    """Which commit this is and whether its code was changed, so that rows measured elsewhere say so, too."""
    where = importlib.util.spec_from_file_location("environment", ROOT / "harness" / "results" / "environment.py")
    assert where is not None
    assert where.loader is not None
    environment = importlib.util.module_from_spec(where)  # it imports Python's own library only
    where.loader.exec_module(environment)
    commit, dirty, _ = environment.git_state(ROOT)
    files = [n for n in names if n.startswith(environment.CODE)]
    return {"git_commit": commit, "git_dirty": dirty, "files": files, "sha256": environment.code_hash(ROOT, files)}


def _cut(whole: Path, out: Path, part_bytes: int) -> list[Path]:
    parts = []
    with whole.open("rb") as handle:
        while block := handle.read(part_bytes):
            parts.append(out / f"part-{len(parts):03d}")
            parts[-1].write_bytes(block)
    return parts


def unpack(source: Path, where: Path) -> None:
    """Join the parts (or take one archive), check them, and unpack into `where`."""
    where.mkdir(parents=True, exist_ok=True)
    if source.is_file():
        _extract(source, where)
        return
    try:
        manifest = json.loads((source / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{source} has no {MANIFEST} that can be read: {error}") from None
    with tempfile.TemporaryDirectory(dir=where) as work:
        whole = Path(work) / "whole.tar.gz"
        with whole.open("wb") as handle:
            for name, expected in manifest["parts"].items():
                part = source / name
                if not part.is_file():
                    raise SystemExit(f"{part} is missing; copy it and run this again")
                if digest(part) != expected:
                    raise SystemExit(f"{part} was damaged on the way; copy it and run this again")
                handle.write(part.read_bytes())
        if digest(whole) != manifest["sha256"]:
            raise SystemExit(f"the parts in {source} do not make the archive that was packed")
        _extract(whole, where)
    lines = [f"cd {where.resolve() / 'code'}"]
    if (where / "cache").is_dir():
        lines.append(f"export DECODATHLON_CACHE={where.resolve() / 'cache'}")
    if (where / "data").is_dir():
        lines.append(f"export DECODATHLON_DATA={where.resolve() / 'data'}")
    lines += [
        "pip install --no-deps --no-build-isolation -e .",
        "pytest tests -m gpu",
        "pytest suites/ --benchmark --device cuda --decoder all --results run.duckdb",
        "python scripts/carry.py results run.tar.gz run.shards/*",
    ]
    sys.stdout.write("Now:\n" + "".join(f"    {line}\n" for line in lines))


def _extract(archive: Path, where: Path) -> None:
    with tarfile.open(archive) as opened:
        opened.extractall(where, filter="data")


def results(out: Path, folders: list[Path]) -> None:
    """The shards of runs, without what is only of use on that machine (whatever begins with a dot)."""
    for folder in folders:
        if not (folder / "run.json").is_file():
            raise SystemExit(f"{folder} has no run.json; name the folders of runs, as in run.shards/*")
    with tarfile.open(out, "w:gz") as archive:
        for folder in folders:
            for path in sorted(folder.glob("*.json")):
                if not path.name.startswith("."):
                    archive.add(path, f"{folder.name}/{path.name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    packing = actions.add_parser("pack")
    packing.add_argument("out", type=Path)
    packing.add_argument("--model-cache", action="store_true", help="also the embedded model, converted")
    packing.add_argument("--data", type=Path, help="also this folder of data sets")
    packing.add_argument("--part-mib", type=int, default=60, help="size of a part (default 60)")
    unpacking = actions.add_parser("unpack")
    unpacking.add_argument("source", type=Path)
    unpacking.add_argument("where", type=Path)
    bringing = actions.add_parser("results")
    bringing.add_argument("out", type=Path)
    bringing.add_argument("folders", type=Path, nargs="+")
    options = parser.parse_args()
    if options.action == "pack":
        own = os.environ.get("DECODATHLON_CACHE")
        usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "decodathlon"
        cache = (Path(own) if own else usual) if options.model_cache else None
        parts = pack(options.out, model_cache=cache, data=options.data, part_bytes=options.part_mib << 20)
        sys.stdout.write(
            f"{len(parts)} parts in {options.out}; copy all of it, then: python3 carry.py unpack . WHERE\n"
        )
    elif options.action == "unpack":
        unpack(options.source, options.where)
    else:
        results(options.out, options.folders)


if __name__ == "__main__":
    main()
