"""Packing a model and giving it back: byte for byte, whatever is in it, and whoever is interrupted."""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file

from decodathlon.decoders.jit_delta import container, frames, pack, schemes
from decodathlon.decoders.jit_delta.container import Reader
from decodathlon.harness.errors import MissingError, SpecError

SILENT = [].append
QUANTISED = {"quantization_config": {"quant_method": "awq"}}


def weights():
    """Tensors of every kind: large and small, of all types, with every bit pattern, and empty."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator) * 0.02

    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return {
        "a.weight": normal(257, 129).bfloat16(), "b.weight": every.view(256, 256).clone(),
        "norm": normal(64).bfloat16(),
        "half": normal(100, 50).half(), "full": normal(90, 70), "whole": torch.arange(5000), "empty": torch.zeros(0, 7),
        "scalar": torch.tensor(3.0, dtype=torch.bfloat16), "yes": torch.tensor([True, False]),
        "zeros": torch.zeros(80, 80, dtype=torch.bfloat16), "eight": normal(80, 80).to(torch.float8_e4m3fn),
        "wide": normal(70, 70).double(),
    }  # fmt: skip


@pytest.fixture
def model(tmp_path):
    """A folder as a hub has it: two shards with an index, a config, and something beside."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "notes.txt").write_text("kept")
    tensors = weights()
    names = list(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for file, some in shards.items():
        save_file({n: tensors[n] for n in some}, folder / file, metadata={"format": "pt"})
    where = {n: file for file, some in shards.items() for n in some}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def same(one, other):
    left, right = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in (one, other))
    assert left.keys() == right.keys()
    for name in left:
        assert left[name] == right[name], name


@pytest.mark.parametrize("scheme", schemes.SCHEMES)
def test_files_come_back_byte_for_byte(model, tmp_path, scheme):
    reader = pack.pack(model, tmp_path / "packed", scheme, SILENT)
    assert pack.verify(tmp_path / "packed", SILENT) == len(weights()) == len(reader.records)
    made = pack.unpack(tmp_path / "packed", tmp_path / "back", SILENT)
    assert len(made) == 2
    same(model, tmp_path / "back")
    forms = {name: record.form for name, record in reader.records.items()}
    assert forms["a.weight"] == forms["b.weight"] == forms["zeros"] == scheme
    assert forms["half"] == forms["full"] == "bytes"
    assert {forms[n] for n in ("norm", "whole", "empty", "scalar", "yes", "eight", "wide")} == {"raw"}


def test_packed_files_are_safetensors(model, tmp_path):
    """Anybody's reader opens them; planes are their tensors."""
    pack.pack(model, tmp_path / "packed", "nested", SILENT)
    found = load_file(tmp_path / "packed" / "model-00001-of-00002.packed.safetensors")
    assert {n.rpartition(":")[2] for n in found if n.startswith("a.weight:")} == {
        "code", "first", "second", "middle", "last", "escapes", "before", "spans", "means",
    }  # fmt: skip
    assert found["a.weight:middle"].numel() == -(-257 * 129 // 256) * 128


def test_sizes_are_those_of_the_files(model, tmp_path):
    reader = pack.pack(model, tmp_path / "packed", "nested", SILENT)
    record = reader.records["a.weight"]
    counts = torch.bincount(weights()["a.weight"].view(torch.int16).int().flatten() & 0xFFFF, minlength=65536)
    p = counts[counts > 0] / counts.sum()
    assert record.floor == pytest.approx(float(-(p * p.log2()).sum()), abs=1e-4)
    assert record.memory == sum(t.numel() * t.element_size() for t in reader.read("a.weight").planes.values())
    files = sum(p.stat().st_size for p in (tmp_path / "packed").glob("*.safetensors"))
    stored = sum(r.disk for r in reader.records.values())
    assert stored < files < stored + 3 * (container.ROOM + 200 * container.ENTRY)


@pytest.mark.parametrize("plane", ["code", "middle", "escapes"])
def test_a_flipped_bit_is_named(model, tmp_path, plane):
    reader = pack.pack(model, tmp_path / "packed", "nested", SILENT)
    told = reader.records["b.weight"].planes[plane]
    path = tmp_path / "packed" / reader.records["b.weight"].file
    data = bytearray(path.read_bytes())
    data[told["at"] + told["stored"] // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(MissingError, match=f"plane {plane} of b.weight is damaged"):
        pack.verify(tmp_path / "packed", SILENT)


def test_a_damaged_model_is_not_packed_already(model, tmp_path):
    """Neither a plane nor a header that is not what it was passes; the remedy is one."""
    out = tmp_path / "packed"
    reader = pack.pack(model, out, "nested", SILENT)
    path = out / reader.records["b.weight"].file
    whole = path.read_bytes()
    told = reader.records["b.weight"].planes["middle"]
    header = next(iter(f for f, t in reader.files.items() if t["packed"] == path.name))
    at = whole.index(reader.header(header), 8)
    for place, words in ((told["at"] + 5, "plane middle of b.weight"), (at + 20, f"the header of {header}")):
        data = bytearray(whole)
        data[place] ^= 1
        path.write_bytes(data)
        given = {pack.verify: [out], pack.unpack: [out, tmp_path / f"back-{place}"], pack.pack: [model, out, "nested"]}
        for work, options in given.items():
            with pytest.raises(MissingError, match=rf"{words}.* is damaged; remove .* and pack the model again"):
                work(*options, SILENT)
    shutil.rmtree(out)
    pack.pack(model, out, "nested", SILENT)
    pack.verify(out, SILENT)


def test_files_that_are_torn_or_foreign_are_named(model, tmp_path):
    out = tmp_path / "packed"
    pack.pack(model, out, "nested", SILENT)
    with pytest.raises(MissingError, match="no packed model"):
        Reader(model)
    whole = (out / container.MANIFEST).read_text()
    (out / container.MANIFEST).write_text(whole[:100])
    with pytest.raises(MissingError, match="torn"):
        Reader(out)
    (out / container.MANIFEST).write_text(whole.replace('"version": 2', '"version": 9'))
    with pytest.raises(SpecError, match="packed in version 9"):
        Reader(out)
    (out / container.MANIFEST).write_text(whole)
    file = out / "model-00002-of-00002.packed.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-10])
    with pytest.raises(MissingError, match=r"model-00002.*is torn"):
        pack.verify(out, SILENT)
    file.write_bytes(b"GGUF" + data[4:])
    with pytest.raises(MissingError, match=r"model-00002.*no safetensors file"):
        pack.verify(out, SILENT)


KILLED = """
    import sys, os
    from pathlib import Path
    from decodathlon.decoders.jit_delta import container, pack
    add, count = container.Writer.add, [0]
    def stumble(self, *given):
        count[0] += 1
        if count[0] == {at}:
            self._file.write(b"half a plane"); self._file.flush()
            os.kill(os.getpid(), 9)
        return add(self, *given)
    container.Writer.add = stumble
    pack.pack(Path(sys.argv[1]), Path(sys.argv[2]), "nested", lambda text: None)
"""


@pytest.mark.parametrize("at", [1, 3, 5, 6, 9])
def test_who_was_killed_goes_on_behind_the_last_tensor(model, tmp_path, at, monkeypatch):
    out = tmp_path / "packed"
    code = textwrap.dedent(KILLED.format(at=at))
    done = subprocess.run([sys.executable, "-c", code, str(model), str(out)], capture_output=True, timeout=120)
    assert done.returncode == -9, done.stderr.decode()
    with pytest.raises(MissingError, match="is not packed to the end; run the same"):
        Reader(out)
    added, add = [], container.Writer.add
    monkeypatch.setattr(
        container.Writer, "add", lambda self, name, *given: (added.append(name), add(self, name, *given))[1]
    )
    pack.pack(model, out, "nested", SILENT)
    assert len(added) == len(weights()) - (at - 1)
    pack.unpack(out, tmp_path / "back", SILENT)
    same(model, tmp_path / "back")
    assert not list(out.glob("*.journal"))
    assert not list(out.glob("*.part"))


def test_a_disk_that_is_full_keeps_what_is_done(model, tmp_path, monkeypatch):
    out, put = tmp_path / "packed", frames.pieces

    def full(raw, **more):
        if len(raw) == 100 * 50:
            raise OSError(28, "No space left on device")
        return put(raw, **more)

    monkeypatch.setattr(frames, "pieces", full)
    with pytest.raises(MissingError, match=r"No space left on device. What is done is kept"):
        pack.pack(model, out, "nested", SILENT)
    monkeypatch.undo()
    pack.pack(model, out, "nested", SILENT)
    pack.unpack(out, tmp_path / "back", SILENT)
    same(model, tmp_path / "back")


def test_room_is_asked_for_before_anything_is_written(model, tmp_path, monkeypatch):
    monkeypatch.setattr(pack.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 10**6))
    with pytest.raises(MissingError, match=r"0\.0 GB free, and about 0\.1 GB are needed"):
        pack.pack(model, tmp_path / "packed", "nested", SILENT)


def changed(model, name, content):
    (model / name).write_text(content)
    return model


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: changed(m, "config.json", json.dumps(QUANTISED)), r"quantised already \(awq\)"),
        (lambda m: changed(m, "config.json", "{"), "config.json is torn"),
        (lambda m: (m / "config.json").unlink() or m, "no config.json"),
        (lambda m: (m / "model-00002-of-00002.safetensors").unlink() or m, "names model-00002-of-00002"),
        (lambda m: changed(m, "model-00001-of-00002.safetensors", "x" * 99), "no safetensors file, or torn"),
        (lambda m: changed(m, "model.safetensors.index.json", "{}"), "index.json is torn"),
    ],
)  # fmt: skip
def test_what_cannot_be_packed_is_told(model, tmp_path, change, said):
    with pytest.raises((MissingError, SpecError), match=said):
        pack.pack(change(model), tmp_path / "packed", "nested", SILENT)


def test_a_config_that_names_no_quantisation_is_none(model, tmp_path):
    pack.pack(changed(model, "config.json", '{"quantization_config": null}'), tmp_path / "packed", "nested", SILENT)
    assert pack.verify(tmp_path / "packed", SILENT) == len(weights())


def test_a_file_is_no_folder_to_unpack_to(model, tmp_path):
    pack.pack(model, tmp_path / "packed", "nested", SILENT)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SpecError, match="not an empty folder"):
        pack.unpack(tmp_path / "packed", tmp_path / "file", SILENT)


def test_who_stands_on_nothing_takes_no_base(model, tmp_path):
    pack.pack(model, tmp_path / "packed", "nested", SILENT)
    with pytest.raises(SpecError, match="was not packed against another model"):
        Reader(tmp_path / "packed", tmp_path)


def test_pickles_are_not_opened(tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(MissingError, match=r"pytorch_model.bin, a pickle"):
        pack.pack(folder, tmp_path / "packed", "nested", SILENT)


def test_a_folder_with_something_else_is_left_alone(model, tmp_path):
    out = tmp_path / "packed"
    pack.pack(model, out, "nested", SILENT)
    with pytest.raises(SpecError, match="other weights, or packed otherwise"):
        pack.pack(model, out, "fixed12", SILENT)
    os.utime(model / "model-00001-of-00002.safetensors", (1, 1))
    with pytest.raises(SpecError, match="other weights, or packed otherwise"):
        pack.pack(model, out, "nested", SILENT)
    with pytest.raises(SpecError, match="is not empty; take"):
        pack.pack(model, model.parent, "nested", SILENT)
    with pytest.raises(SpecError, match="not an empty folder"):
        pack.unpack(out, model, SILENT)


PEAK = """
    import sys, threading
    from pathlib import Path
    from decodathlon.decoders.jit_delta import pack
    from decodathlon.harness.measure.memory import anonymous_bytes
    most, done = [0], threading.Event()
    def watch():
        while not done.wait(0.003):
            most[0] = max(most[0], anonymous_bytes())
    watcher = threading.Thread(target=watch)
    watcher.start()
    pack.pack(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], lambda text: None)
    done.set()
    watcher.join()
    print(most[0])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="anonymous memory is read from /proc")
@pytest.mark.parametrize(
    ("dtype", "scheme"), [(torch.bfloat16, s) for s in schemes.SCHEMES] + [(torch.float32, "nested")]
)
def test_memory_is_that_of_the_largest_tensor(tmp_path, dtype, scheme):
    """At most twice the largest tensor and 300 MB, of a model that is three times as large."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    count = 24_000_000 // dtype.itemsize
    large = (torch.randn(count, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    save_file({f"{i}.weight": large.clone() for i in range(3)}, folder / "model.safetensors")
    arguments = [sys.executable, "-c", textwrap.dedent(PEAK), str(folder), str(tmp_path / "packed"), scheme]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=300)
    assert int(done.stdout) < 2 * 24e6 + 300e6


def test_a_tensor_in_two_files_is_refused_and_what_is_not_the_model_is_left(model, tmp_path):
    (model / "model.safetensors.index.json").unlink()
    save_file({"a.weight": torch.ones(70, 70)}, model / "other.safetensors")
    with pytest.raises(SpecError, match=r"has a\.weight in two of its files"):
        pack.pack(model, tmp_path / "packed", "nested", SILENT)
    save_file({"a.weight": torch.zeros(70, 70)}, model / "model.safetensors")
    reader = pack.pack(model, tmp_path / "one", "nested", SILENT)
    assert list(reader.files) == ["model.safetensors"]


def test_what_is_packed_already_is_left_as_it_is(model, tmp_path, monkeypatch):
    said, out = [], tmp_path / "packed"
    pack.pack(model, out, "nested", SILENT)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    pack.pack(model, out, "nested", said.append)
    assert said[-1] == f"{out} is packed already"
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before


@pytest.mark.parametrize("cut", [1, 5])
def test_a_torn_line_of_the_journal_is_no_end(model, tmp_path, monkeypatch, cut):
    """The disk was full, or somebody was killed, while a line was written; and once more later."""
    out, add, count = tmp_path / "packed", container.Writer.add, [0]

    def stumble(self, *given):
        count[0] += 1
        if count[0] in (3, 7):
            raise KeyboardInterrupt
        return add(self, *given)

    monkeypatch.setattr(container.Writer, "add", stumble)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            pack.pack(model, out, "nested", SILENT)
        (journal,) = [j for j in out.glob("*.journal") if j.with_suffix(".part").exists()]
        journal.write_bytes(journal.read_bytes()[:-cut] if cut == 1 else journal.read_bytes() + b'{"na')
    monkeypatch.setattr(container.Writer, "add", add)
    pack.pack(model, out, "nested", SILENT)
    pack.unpack(out, tmp_path / "back", SILENT)
    same(model, tmp_path / "back")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda told: told["files"].update({"../outside": told["files"].popitem()[1]}), "names ../outside"),
        (lambda told: told["tensors"]["a.weight"].update(file="/etc/hosts"), "names /etc/hosts"),
        (lambda told: told["tensors"]["a.weight"]["facts"].update(count=10**9), "has 33153 numbers"),
        (lambda told: told["tensors"]["a.weight"]["planes"]["first"].update(shape=[1, 32], bytes=32), "plane first of"),
        (lambda told: told["tensors"]["a.weight"]["planes"]["spans"].update(shape=[0], bytes=0), "plane spans of"),
        (lambda told: told.update(tensors=[]), "has no tensors"), (lambda told: told.pop("scheme"), "has no scheme"),
        (lambda told: told["tensors"]["a.weight"].pop("form"), "is torn, or not made by"),
        (lambda told: told["tensors"]["a.weight"]["facts"].update(start=7), "is not what was written; remove"),
        (lambda told: told["tensors"]["a.weight"]["planes"].pop("means"), "is not what was written"),
        (lambda told: told["tensors"]["a.weight"].update(form="nestee"), "is not what was written"),
        (lambda told: told.update(scheme="neste"), "is not what was written"),
        (lambda told: told.pop("sha256"), "is not what was written"),
    ],
)  # fmt: skip
def test_a_manifest_that_pack_would_not_write_is_refused(model, tmp_path, change, words):
    out = tmp_path / "packed"
    pack.pack(model, out, "nested", SILENT)
    told = json.loads((out / container.MANIFEST).read_text())
    change(told)
    (out / container.MANIFEST).write_text(json.dumps(told))
    with pytest.raises(MissingError, match=words):
        Reader(out)
    (out / container.MANIFEST).write_text("[1, 2]")
    with pytest.raises(MissingError, match="has no version"):
        Reader(out)


@pytest.mark.parametrize("threads", [1, 3])
def test_planes_that_count_escapes_which_are_not_there_are_refused(threads, monkeypatch):
    from decodathlon.kernels.delta import native, reference

    if native.library() is None:
        pytest.skip("no C compiler")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    bits = (torch.randn(200_000) * 0.02).bfloat16().view(torch.int16)
    planes, out = reference.nested(bits), torch.zeros_like(bits)
    for bad in (
        planes._replace(escapes=planes.escapes[:-1]), planes._replace(spans=planes.spans + 10**9),
        planes._replace(spans=planes.spans - 5),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="count more escapes than there are"):
            native.nested_exact(native.library(), bad, out)
        with pytest.raises(ValueError, match="count more escapes than there are"):
            native.nested_draft(native.library(), bad, 5, out)
