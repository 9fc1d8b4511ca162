"""`decodathlon pack`, `verify`, `inspect` and `unpack`, as a user meets them."""

from pathlib import Path

import pytest
import tiny_models

from decodathlon.harness.commands.command import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_models.save_folder(tmp_path_factory.mktemp("tiny-llama"))
    return Path(folder)


def test_a_model_goes_there_and_back(model, tmp_path, capsys):
    packed, back = tmp_path / "packed", tmp_path / "back"
    assert main(["pack", str(model), str(packed)]) == 0
    assert main(["verify", str(packed)]) == 0
    assert "tensors come back bit for bit" in capsys.readouterr().out
    assert main(["inspect", str(packed)]) == 0
    told = capsys.readouterr().out
    assert "model.layers.*.self_attn.q_proj.weight" in told
    assert "bits each on disk" in told
    assert main(["inspect", str(packed), "--every"]) == 0
    assert "model.layers.0.self_attn.q_proj.weight" in capsys.readouterr().out
    assert main(["unpack", str(packed), str(back)]) == 0
    for path in model.glob("*"):
        assert (back / path.name).read_bytes() == path.read_bytes(), path.name


def test_bad_input_is_told_in_a_line(model, tmp_path, capsys):
    for words, said in (
        (["pack", str(tmp_path), str(tmp_path / "out")], "has no config.json"),
        (["pack", "stories-260k[path=/nowhere]", str(tmp_path / "out")], "has no safetensors to pack"),
        (["pack", str(model), str(model)], "is not empty"),
        (["verify", str(model)], "is no packed model"),
        (["inspect", str(tmp_path / "nowhere")], "is no packed model"),
        (["unpack", str(model), str(tmp_path / "out")], "is no packed model"),
    ):
        assert main(words) != 0
        assert said in capsys.readouterr().err, words
