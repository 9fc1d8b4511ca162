"""The network of DFlash against a reference written from the specification, in the layout of the released files."""

import json
import math

import pytest
import torch
from tiny_drafters import RELEASED, SLIDING, network_of

from decodathlon.decoders.dflash import checkpoint, config
from decodathlon.decoders.dflash.network import Memory


def reference(weights, raw, states, embeddings, start):
    """(b, E) outputs for one row, place by place and head by head: algorithms 4.1 to the letter.

    Args:
        states: (start, F * E) of the context.
        embeddings: (b, E) of the block.
    """
    eps, D = raw["rms_norm_eps"], raw["head_dim"]
    H, K, b = raw["num_attention_heads"], raw["num_key_value_heads"], len(embeddings)

    def norm(x, name):
        return x / (x.square().mean() + eps).sqrt() * weights[name]

    def turned(x, position):
        half = D // 2
        angle = [position / raw["rope_theta"] ** (2 * i / D) for i in range(half)]
        cos, sin = torch.tensor([math.cos(a) for a in angle]), torch.tensor([math.sin(a) for a in angle])
        first, second = x[:half], x[half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin])

    context = [norm(weights["fc.weight"] @ row, "hidden_norm.weight") for row in states]
    x = [row * raw["dflash_config"].get("input_embedding_scale", 1.0) for row in embeddings]
    for layer in range(raw["num_hidden_layers"]):
        at = f"layers.{layer}."
        inputs = [norm(row, at + "input_layernorm.weight") for row in x]
        keys, values = [], []
        for position, row in enumerate([*context, *inputs]):
            k = (weights[at + "self_attn.k_proj.weight"] @ row).view(K, D)
            keys.append([turned(norm(one, at + "self_attn.k_norm.weight"), position) for one in k])
            values.append((weights[at + "self_attn.v_proj.weight"] @ row).view(K, D))
        slides = raw["layer_types"][layer] == "sliding_attention"
        for i, row in enumerate(inputs):
            q = (weights[at + "self_attn.q_proj.weight"] @ row).view(H, D)
            heads = []
            for h in range(H):
                query = turned(norm(q[h], at + "self_attn.q_norm.weight"), start + i)
                k = h // (H // K)
                seen = [
                    j for j in range(start + b)
                    if not slides or (j <= start + i and start + i - j < raw["sliding_window"])
                ]  # fmt: skip
                score = torch.stack([query @ keys[j][k] / math.sqrt(D) for j in seen]).softmax(0)
                heads.append(sum(s * values[j][k] for s, j in zip(score, seen, strict=True)))
            x[i] = x[i] + weights[at + "self_attn.o_proj.weight"] @ torch.cat(heads)
        for i in range(b):
            row = norm(x[i], at + "post_attention_layernorm.weight")
            gate = weights[at + "mlp.gate_proj.weight"] @ row
            up = weights[at + "mlp.up_proj.weight"] @ row
            x[i] = x[i] + weights[at + "mlp.down_proj.weight"] @ (gate * gate.sigmoid() * up)
    return torch.stack([norm(row, "norm.weight") for row in x])


@pytest.mark.parametrize("raw", [RELEASED, SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize(("start", "b"), [(1, 2), (3, 16), (11, 4)])
def test_a_block_is_drafted_as_the_specification_says(raw, start, b):
    network = network_of(raw)
    states, embeddings = torch.randn(start, 48).double(), torch.randn(b, 24).double()
    memory = Memory(network, 1, 64)
    memory.append(states[None], [start])
    ours = memory.draft(embeddings[None])[0]
    theirs = reference(dict(network.state_dict()), raw, states, embeddings, start)
    assert torch.allclose(ours, theirs, atol=1e-6), (ours - theirs).abs().max()  # rotations are in float32


def test_files_are_those_of_the_released_drafters(tmp_path):
    """Names and shapes of a released config at a tiny size; what is saved is read back."""
    network = network_of()
    names = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    assert names == {
        "fc.weight": (24, 48), "hidden_norm.weight": (24,), "norm.weight": (24,),
        **{
            f"layers.{i}.{name}.weight": shape
            for i in range(2)
            for name, shape in {
                "self_attn.q_proj": (32, 24), "self_attn.k_proj": (16, 24), "self_attn.v_proj": (16, 24),
                "self_attn.o_proj": (24, 32), "self_attn.q_norm": (8,), "self_attn.k_norm": (8,),
                "mlp.gate_proj": (40, 24), "mlp.up_proj": (40, 24), "mlp.down_proj": (24, 40),
                "input_layernorm": (24,), "post_attention_layernorm": (24,),
            }.items()
        },
    }  # fmt: skip
    checkpoint.save(network, tmp_path)
    again = config.read(tmp_path / "config.json")
    assert again == network.config
    back = checkpoint.read(tmp_path, again)
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name].bfloat16().float()), name
    states, x = torch.randn(1, 3, 48), torch.randn(1, 4, 24)
    memory = Memory(back, 1, 16)
    memory.append(states, [3])
    assert memory.draft(x).isfinite().all()


def test_fields_may_stand_in_either_place():
    raw = json.loads(json.dumps(RELEASED))
    raw["dflash_config"] |= {"block_size": 10, "final_logit_softcapping": 30.0, "output_multiplier": 0.5}
    raw.pop("block_size")
    raw |= {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0}, "rope_scaling": None}
    found = config.parse(raw, "test")
    assert (found.block_size, found.final_logit_softcapping, found.output_multiplier) == (10, 30.0, 0.5)
    assert found.rope == {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0}
    network = network_of(raw)
    logits = network.logits(torch.randn(3, 24).double(), lambda x: 100 * x)
    assert logits.abs().max() <= 30


def test_layers_that_the_released_drafters_look_at():
    assert config.layer_ids(36, 5) == (1, 9, 17, 25, 33)
    assert config.layer_ids(24, 5) == (1, 6, 11, 16, 21)
    assert config.layer_ids(30, 1) == (15,)


@pytest.mark.parametrize("raw", [RELEASED, SLIDING], ids=["full", "sliding"])
def test_rows_of_different_lengths_are_drafted_as_each_alone(raw):
    network = network_of(raw)
    states, x = torch.randn(3, 9, 48).double(), torch.randn(3, 4, 24).double()
    counts = [9, 2, 5]
    memory = Memory(network, 3, 64)
    memory.append(states, counts)
    together = memory.draft(x)
    for b, n in enumerate(counts):
        alone = Memory(network, 1, 64)
        alone.append(states[b : b + 1], [n])
        assert torch.allclose(together[b], alone.draft(x[b : b + 1])[0], atol=1e-9)
    memory.append(states[:, :3], [1, 3, 0])  # behind what each has; the block's own keys are written over
    memory.select([2, 1])
    last = Memory(network, 1, 64)
    last.append(torch.cat([states[1, :2], states[1, :3]])[None], [5])
    assert torch.allclose(memory.draft(x[:2])[1], last.draft(x[1:2])[0], atol=1e-9)


def test_a_memory_that_is_full_says_so():
    memory = Memory(network_of(), 1, 8)
    memory.append(torch.randn(1, 6, 48).double(), [6])
    with pytest.raises(ValueError, match="memory of 8 tokens cannot take 4 behind"):
        memory.draft(torch.randn(1, 4, 24).double())


def test_transformers_class_drafts_the_same():
    """Its network of this kind, made by others, with our weights under its names."""
    import transformers

    if not hasattr(transformers, "MuseGlimmerAssistantModel"):
        pytest.skip("transformers has DFlash from 5.23 on")
    from types import SimpleNamespace

    from decodathlon.decoders.dflash import peer

    network = network_of()
    place = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float64)
    theirs = peer._of_transformers(network, place)
    states, x = torch.randn(1, 7, 48).double(), torch.randn(1, 16, 24).double()
    memory = Memory(network, 1, 64)
    memory.append(states, [7])
    found = theirs(noise_embeds=x, context_hidden_states=states, position_ids=torch.arange(23)[None])
    assert torch.allclose(memory.draft(x), found.last_hidden_state, atol=1e-6)
