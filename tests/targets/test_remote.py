"""A model behind a server: what the server is seen to do, what it writes, what becomes of its faults."""

import math
import time
from collections import Counter
from dataclasses import replace

import engine_double
import numpy as np
import pytest
from engine_double import END, Double

from decodathlon.harness import decoder as decoders
from decodathlon.harness import models, served
from decodathlon.harness.decoder import Limits
from decodathlon.harness.engines import client, probes, remote
from decodathlon.harness.engines.client import Client, EngineDownError, EngineError
from decodathlon.harness.engines.dialects import DIALECTS, Engine, Law
from decodathlon.harness.errors import MissingError, SpecError, UnsupportedError
from decodathlon.harness.randomness import RowRandom
from decodathlon.harness.registry import load_builtins
from decodathlon.harness.results.lines import Lines
from decodathlon.harness.targets.remote import Ask, RemoteTarget

load_builtins()
EVERYTHING = {"temperature", "top_k", "top_p", "min_p", "chat", "greedy"}


class Direct(Client):
    """To a double without a network between."""

    def __init__(self, double):
        super().__init__("http://direct/v1")
        object.__setattr__(self, "double", double)

    def post(self, path, body):
        return self.double.reply(body, chat=path == "chat/completions")


def target_of(double, **options):
    made = RemoteTarget(Direct(double), "m", Engine(DIALECTS["vllm"], "0.33.0", 512), name="openai:m", **options)
    probes.probe(made)
    return made


@pytest.fixture
def serve(request):
    started = []

    def start(double, **options):
        server = engine_double.serve(double, **options)
        started.append(server)
        return server

    yield start
    for server in started:
        server.close()


# --- What it is seen to do ------------------------------------------------------------------------------------------


def test_a_server_that_does_everything_is_seen_to():
    target = target_of(Double())
    assert target.parts == EVERYTHING
    assert target.capabilities == {"text", "server", "log-probs", "prefix"}
    assert target.raw_log_probs
    assert not target.notes


@pytest.mark.parametrize("part", ["top_k", "top_p", "min_p"])
def test_a_part_of_a_law_that_is_passed_over_is_seen(part):
    target = target_of(Double(ignores=frozenset({part})))
    assert target.parts == EVERYTHING - {part}
    name = part.replace("_", "-")
    decoder = served.on(decoders.build(name), target)
    with pytest.raises(UnsupportedError, match=f"needs {part} on the server: openai:m does not follow it"):
        decoder.check(target)


def test_a_server_that_passes_over_the_temperature_is_seen():
    target = target_of(Double(ignores=frozenset({"temperature"})))
    assert target.parts == {"chat"}  # what it gives for greedy search differs from itself
    for spec in ("greedy", "temperature[temperature=0.5]"):
        with pytest.raises(UnsupportedError):
            served.on(decoders.build(spec), target).check(target)
    served.on(decoders.build("temperature"), target).check(target)  # the model's own law is what it draws from


def test_a_server_that_knows_only_greedy_or_free_is_seen():
    double = Double()
    right = double.write
    double.write = lambda body: right(body | {"temperature": 1.0 if body["temperature"] else 0.0})
    assert "temperature" not in target_of(double).parts


def test_a_server_that_follows_top_k_at_one_only_is_seen():
    double = Double()
    right = double.write
    double.write = lambda body: right(body | {"top_k": 1 if body["top_k"] == 1 else 0})
    assert target_of(double).parts == EVERYTHING - {"top_k"}


def test_a_server_with_one_seed_for_all_is_seen():
    double = Double()
    right = double.write
    double.write = lambda body: right(body | {"seed": 7})
    target = target_of(double)
    assert target.parts == {"chat", "greedy"}
    assert "the server draws the same text at every temperature and seed" in target.notes


def test_an_engine_that_is_not_known_says_so():
    made = RemoteTarget(Direct(Double()), "m", Engine(DIALECTS["openai"], "", 512), name="openai:m")
    probes.probe(made)
    assert any("an engine that is not known here" in note for note in made.notes)
    assert made.parts == {"chat", "greedy", "temperature", "top_p"}


def test_a_server_that_is_always_greedy_is_seen():
    constant = Double()
    constant.write = lambda body: (
        list("a a a a a a")[: body["max_tokens"]],
        [0.0] * min(11, body["max_tokens"]),
        False,
    )
    target = target_of(constant)
    assert target.parts == {"chat", "greedy"}
    assert "the server draws the same text at every temperature and seed" in target.notes


def test_log_probabilities_of_the_shaped_law_are_told_apart():
    target = target_of(Double(raw=False))
    assert not target.raw_log_probs
    assert served.by_model(target, Law(temperature=1.0))
    assert not served.by_model(target, Law(temperature=0.7))
    assert not served.by_model(target, Law(top_p=0.5))
    found, _ = texts("top-p[p=0.5]", target, 5, 4)
    assert all(answer.log_prob is None for answer in found)


def test_what_is_not_there_is_not_seen():
    target = target_of(Double(tells=False, goes_on=False, seeded=False))
    assert target.capabilities == {"text", "server"}
    assert any("does not draw by the seed" in note for note in target.notes)
    for spec, why in (
        ("qalign[reward=length:3]", "needs prefix of the server"),
        ("persistent-smc-steps", "needs prefix of the server"),
        ("best-of-n", "needs log-probs of the server"),
        ("beam", "needs logits"),
        ("dflash", "needs logits"),
    ):
        with pytest.raises(UnsupportedError, match=why):
            served.on(decoders.build(spec), target).check(target)
    served.on(decoders.build("best-of-n[reward=length:3]"), target).check(target)


def test_engines_are_told_in_their_own_words():
    asked = Law(temperature=0.7, top_p=0.9)
    said = {name: d.sampling(asked, 5) for name, d in DIALECTS.items()}
    assert said["vllm"]["top_k"] == 0
    assert said["sglang"]["top_k"] == -1
    assert said["llama.cpp"]["samplers"][0] == "temperature"
    assert "repeat_penalty" in said["llama.cpp"]
    assert set(said["openai"]) == {"temperature", "top_p", "max_tokens", "presence_penalty", "frequency_penalty"}
    config = said["transformers"]["generation_config"]
    assert '"do_sample": true' in config
    assert '"top_k": 0' in config
    assert '"do_sample": false' in DIALECTS["transformers"].sampling(Law(temperature=0.0), 5)["generation_config"]


# --- What it writes -------------------------------------------------------------------------------------------------


def distance(found, law):
    """Total variation between counts and a law, and what as many independent exact draws would give on average."""
    total = sum(found.values())
    tvd = 0.5 * sum(abs(found.get(k, 0) / total - law.get(k, 0.0)) for k in set(found) | set(law))
    p = np.array(list(law.values()))
    rng = np.random.default_rng(0)
    floor = np.mean([0.5 * np.abs(rng.multinomial(total, p / p.sum()) / total - p).sum() for _ in range(50)])
    return tvd, float(floor)


def texts(spec, target, draws, length, seed=0):
    decoder = served.on(decoders.build(spec), target)
    prompt = target.chat([{"role": "user", "content": "?"}])
    rng = RowRandom(seed, range(draws))
    found = decoder.generate(target, [prompt] * draws, Limits(length), rng)
    return found, Counter(a.text + END * (a.stop_reason == "stop") for a in found)


@pytest.mark.parametrize(
    ("spec", "law"),
    [
        ("temperature", {}),
        ("temperature[temperature=0.6]", {"temperature": 0.6}),
        ("top-k[k=2]", {"top_k": 2}),
        ("top-p[p=0.7]", {"top_p": 0.7}),
        ("min-p[p=0.4,temperature=1.3]", {"min_p": 0.4, "temperature": 1.3}),
        ("greedy", {"temperature": 0.0}),
        ("best-of-n[n=1,reward=length:2]", {}),
    ],
)
def test_answers_have_the_law_that_was_asked_for(spec, law):
    found, counts = texts(spec, target_of(Double()), 2000, 4)
    tvd, floor = distance(counts, engine_double.answers(4, **law))
    assert tvd < 2 * floor + 1e-9
    for answer in found[:50]:
        assert len(answer.tokens) == len(answer.text) + (answer.stop_reason == "stop")
        expected, text = 0.0, ""
        for token in [*answer.text, *[END] * (answer.stop_reason == "stop")]:
            expected += math.log(engine_double.law(text)[token])
            text += token
        assert answer.log_prob == pytest.approx(expected, abs=1e-9)


def tilted(reward, beta, most, power=0.0):
    every = engine_double.answers(most)
    weights = {y: p * math.exp(reward(y) / beta) for y, p in every.items()}
    total = sum(weights.values())
    return {y: w / total for y, w in weights.items()}


def size(answer):
    return len(answer.replace(END, "x"))


@pytest.mark.parametrize(
    ("spec", "law"),
    [
        ("qalign[reward=length:3,beta=1,steps=24]", tilted(lambda y: -abs(size(y) - 3), 1.0, 4)),
        ("qalign[reward=log-power,beta=2,steps=24]",
         tilted(lambda y: math.log(engine_double.answers(4)[y]), 2.0, 4)),
        ("quest[reward=log-power,beta=0.6,steps=40]",
         tilted(lambda y: math.log(engine_double.answers(4)[y]) * (1 - 0.6), 0.6, 4)),
    ],
)  # fmt: skip
def test_chains_over_answers_reach_their_law_through_the_server(spec, law):
    target = target_of(Double())
    _, counts = texts(spec, target, 1500, 4)
    tvd, floor = distance(counts, law)
    assert distance(by_size(counts), by_size(law))[0] < 3 * distance(by_size(counts), by_size(law))[1]
    plain, _ = distance(counts, engine_double.answers(4))
    assert tvd < 2 * floor
    assert plain > 2 * tvd  # a chain that never moved would be seen


def test_a_wrong_length_in_the_rule_would_be_seen(monkeypatch):
    """The test above with a seeded bug: the lengths left out of the acceptance."""
    from decodathlon.decoders.served import suffix

    monkeypatch.setattr(suffix.math, "log", lambda x: math.log1p(x - 1) if x <= 1 else 0.0)
    _, counts = texts("qalign[reward=length:3,beta=1,steps=24]", target_of(Double()), 1500, 4)
    tvd, floor = distance(by_size(counts), by_size(tilted(lambda y: -abs(size(y) - 3), 1.0, 4)))
    assert tvd > 3 * floor


def by_size(law):
    found = Counter()
    for answer, p in law.items():
        found[size(answer)] += p
    return found


@pytest.mark.parametrize("tells", [True, False])
def test_a_chain_asks_for_what_is_left_of_an_answer(tells):
    double = Double(tells=tells)
    target = target_of(double)
    target.capabilities |= {"prefix"}  # its greedy text has no space, behind which it could be cut into words
    probed = len(double.asked)
    texts("qalign[reward=length:3,steps=6]", target, 20, 8)
    moves = [b for b in double.asked[probed:] if b["messages"][-1]["role"] == "assistant"]
    assert len(moves) > 20
    for body in moves:
        left, begun = body["max_tokens"], len(body["messages"][-1]["content"])
        assert left + begun == 8 if tells else left < 8  # of words only about how many tokens they were is known


def test_best_of_n_and_votes_choose_here():
    target = target_of(Double())
    found, _ = texts("best-of-n[n=16,reward=length:2]", target, 20, 6)
    assert sum(len(a.tokens) == 2 for a in found) >= 18  # of one answer in three
    assert all(a.cost.target_calls >= 16 for a in found)
    found, _ = texts("self-consistency[n=4,temperature=1,top_p=1]", target, 10, 6)
    assert all(max(a.trace[0]["scores"]) == a.trace[0]["scores"][a.trace[0]["chosen"]] for a in found)


def test_growing_particles_estimate_the_constant_without_bias():
    """E[Z] of the repaired scheme with one-letter steps, against the sum over all answers."""
    target = target_of(Double())
    spec = (
        "persistent-smc-steps[n_particles=4,max_steps=3,max_tokens_per_step=1,step_boundary=fixed,fixed_step_tokens=1,"
        "temperature=1,top_p=1,score=logprob_power,tau=1,policy=always,schedule=fixed_linear,answer=draw]"
    )
    found, _ = texts(spec, target, 500, 3)
    constants = np.array([math.exp(a.trace[-1]["log_z"]) for a in found])
    exact = sum(p * p for p in engine_double.answers(3).values())
    error = constants.std(ddof=1) / math.sqrt(len(constants))
    assert abs(constants.mean() - exact) < 4 * error
    assert error < 0.1 * exact
    tvd, floor = distance(
        Counter(a.text + END * (a.stop_reason == "stop") for a in found),
        {y: p * p / exact for y, p in engine_double.answers(3).items()},
    )
    assert tvd < 3 * floor + 0.05  # four particles are few; the law without copies is much further away


def test_without_tokens_of_its_own_a_text_counts_as_many_as_the_server_says():
    target = target_of(Double(tells=False))
    found, _ = texts("temperature", target, 50, 6)
    for answer in found:
        assert len(answer.tokens) == len(answer.text) + (answer.stop_reason == "stop")
        assert answer.log_prob is None
        assert target.decode(answer.tokens) == answer.text


def test_letters_that_are_split_over_tokens_are_put_together():
    entries = [
        {"token": "?", "logprob": -1.0, "bytes": list(part)} for part in ("é".encode()[:1], "é".encode()[1:], b"x")
    ]
    reply = {"choices": [{"message": {"content": "éx"}, "finish_reason": "length", "logprobs": {"content": entries}}],
             "usage": {"completion_tokens": 3}}  # fmt: skip
    target = target_of(Double())
    written = target._read(reply)
    assert target.decode(written.tokens) == "éx"
    assert len(written.tokens) == 3
    assert written.log_probs == [-1.0] * 3


def reply(content, why="stop", tokens=None, told=None):
    choice = {"message": {"content": content}, "finish_reason": why, "logprobs": {"content": told} if told else None}
    return {"choices": [choice], "usage": {} if tokens is None else {"completion_tokens": tokens}}


def test_replies_are_read_as_they_are_meant():
    target = target_of(Double())
    entries = [{"token": t, "logprob": -1.0} for t in (" a", "b", "<end>")]
    stripped = target._read(reply("ab", tokens=3, told=entries))  # a server that takes the space off
    assert len(stripped.tokens) == 3
    assert stripped.log_probs == [-1.0] * 3
    thinking = target._read(reply(None, why="length", tokens=500))
    assert len(thinking.tokens) == 500
    assert target.decode(thinking.tokens) == ""
    target.incidents.clear()
    target._read(reply("x", why="content_filter", tokens=1))
    target._read(reply("x"))
    assert len(target.incidents) == 2
    with pytest.raises(EngineError, match="ended an answer with abort"):
        target._read(reply("x", why="abort"))
    with pytest.raises(EngineError, match="answers what is no answer"):
        target._read({"choices": []})


def test_an_answer_of_nothing_does_not_stop_a_chain():
    double = Double()
    right = double.write
    double.write = lambda body: right(body) if body["max_tokens"] != 7 else ([], [], False)
    target = target_of(double)
    found, _ = texts("qalign[reward=length:3,steps=2]", target, 3, 7)
    assert len(found) == 3


def test_steps_are_cut_where_they_are_over_and_keep_to_the_length():
    """A line of up to six letters ends behind a space here; what was written behind it is thrown away."""
    from decodathlon.decoders.served import steps as form

    spec = (
        "persistent-smc-steps[n_particles=3,max_steps=4,max_tokens_per_step=6,step_boundary=fixed,fixed_step_tokens=2,"
        "temperature=1,top_p=1]"
    )
    for double in (Double(), Double(tells=False)):
        target = target_of(double)
        prompt = target.chat([{"role": "user", "content": "?"}])
        grown = form.Grown(target, [prompt], 3, Limits(9), told=double.tells)
        cut = decoders.build(spec.replace("fixed,fixed_step_tokens=2", "newline,min_tokens_per_step=2"))
        stepwise = form._Stepwise(cut)
        object.__setattr__(cut, "_over", lambda step, target: target.decode(step).endswith("b"))
        for _ in range(4):
            before = [len(one.tokens) for one in grown.all]
            stepwise.grow(grown, RowRandom(0, [0]))
            for one, begun in zip(grown.all, before, strict=True):
                new = target.decode(one.tokens[begun:])
                assert len(one.tokens) <= 9
                if double.tells:
                    assert "b" not in new[:-1]  # nothing behind the end of a step


# --- Faults ---------------------------------------------------------------------------------------------------------


def quick(url, **options):
    return Client(url, **{"timeout": 2.0, "tries": 4, "pause": 0.01} | options)


def remote_target(server, **options):
    made = RemoteTarget(quick(server.url, **options), "m", Engine(DIALECTS["vllm"], "", 512), name="openai:m")
    made.parts, made.capabilities = frozenset(EVERYTHING), made.capabilities | {"log-probs", "prefix"}
    return made


def asks(target, count):
    prompt = target.chat([{"role": "user", "content": "?"}])
    return [Ask(prompt=prompt, tokens=4, law=Law(), seed=i) for i in range(count)]


@pytest.mark.parametrize("fault", [429, 500, 503, "drop", "half", "garbage"])
def test_a_fault_is_tried_again_and_the_answer_counts_once(serve, fault):
    calm, faulty = Double(), Double(faults=[fault] * 3)
    first = remote_target(serve(calm))
    expected = first.write(asks(first, 1))
    target = remote_target(serve(faulty))
    found = target.write(asks(target, 6))
    assert len(found) == 6
    assert len(faulty.asked) == 6
    assert set(faulty.counts().values()) == {1}
    assert found[0].log_probs == expected[0].log_probs


def test_a_refusal_is_no_fault(serve):
    double = Double(faults=[400])
    target = remote_target(serve(double))
    with pytest.raises(EngineError, match="answers 400 to /v1/chat/completions: told to say so"):
        target.write(asks(target, 1))
    assert not double.asked


def test_a_server_that_hangs_is_given_up_and_one_that_is_gone_is_told(serve):
    target = remote_target(serve(Double(faults=["hang"] * 9)), timeout=0.2, tries=2)
    begun = time.monotonic()
    with pytest.raises(EngineDownError, match="gave no answer in 2 tries"):
        target.write(asks(target, 1))
    assert time.monotonic() - begun < 4
    server = engine_double.serve(Double())
    target = remote_target(server)
    server.close()
    with pytest.raises(EngineDownError, match="Connection refused"):
        target.write(asks(target, 1))


def test_what_was_answered_before_it_died_is_kept_and_not_asked_again(serve, tmp_path):
    path = tmp_path / "lines.jsonl"
    dying = Double(dies_after=7)
    target = remote_target(serve(dying), tries=2)
    target.concurrency = 3
    book = Lines(path)
    target.remember(book)
    with pytest.raises(EngineDownError):
        target.write(asks(target, 20))
    book.close()
    assert len(dying.asked) == 7
    again = Double()
    target = remote_target(serve(again))
    book = Lines(path)
    target.remember(book)
    found = target.write(asks(target, 20))
    book.close()
    assert len(again.asked) == 13
    assert not set(again.counts()) & set(dying.counts())
    whole = Double()
    target = remote_target(serve(whole))
    assert [target.decode(w.tokens) for w in target.write(asks(target, 20))]
    assert [w.log_probs for w in found] == [w.log_probs for w in target.write(asks(target, 20))]


def test_keys_go_to_the_server_and_into_no_message(serve, monkeypatch):
    monkeypatch.setenv("DECODATHLON_MODEL_KEY", "sk-a-secret-key")
    target = remote_target(serve(Double(faults=[400])))
    with pytest.raises(EngineError) as caught:
        target.write(asks(target, 1))
    assert "sk-a-secret" not in str(caught.value)
    assert "127.0.0.1" not in str(caught.value)
    assert client._words(b"Authorization: Bearer sk-a-secret-key") == "Authorization: Bearer [key]"
    assert str(EngineError("sk-a-secret-key")) == "[key]"
    assert client._words(b'{"error": {"message": "bad key sk-a-secret-key"}}') == "bad key [key]"
    monkeypatch.setenv("DECODATHLON_MODEL_KEY", "sk-with-a-newline\n")
    assert client.key() == "sk-with-a-newline"


# --- By name --------------------------------------------------------------------------------------------------------


def test_names_and_addresses_are_checked_before_anything_is_asked(monkeypatch):
    for text, url, told in (
        ("openai:", "http://x/v1", "the name that the server has for the model is missing"),
        ("openai:m", "", "needs --model-url"),
        ("openai:m", "x:8000", "an address begins with http"),
        ("openai:m", "http://me:pw@h/v1", "a key belongs into"),
        ("openai:m", "http://h/v1?key=1", "a key belongs into"),
        ("openai:m", "http://h:port/v1", "its port is no number"),
        ("openai:m", "http://h:99999/v1", "its port is no number"),
        ("openai:m[contxt=5]", "http://x/v1", "did you mean 'context'"),
        ("openai:m[concurrency=0]", "http://x/v1", "concurrency"),
        ("greedy-model", "http://x/v1", "--model-url is the address of a server"),
    ):
        with pytest.raises(SpecError, match=told):
            models.resolve(text, url)
    one, other = (models.resolve("openai:org/m[hardware=8xH100]", f"http://{host}/v1") for host in "ab")
    assert one.name.startswith("openai:org/m@")
    assert one.name != other.name
    assert models.resolve("openai:/a/b/m", "http://a/v1").name.startswith("openai:m@")
    with pytest.raises(MissingError, match="no server answers there"):
        remote.check("openai:m", "http://127.0.0.1:1/v1")
    with pytest.raises(MissingError, match=r"is no folder with a tokenizer_config\.json"):
        remote.check("openai:m[tokenizer=/nowhere]", "http://127.0.0.1:1/v1")


def test_an_engine_is_recognised_and_tried_when_it_is_loaded(serve):
    server = serve(Double())
    said = []
    target = remote.load("openai:m[hardware=8xH100]", server.url, name="openai:m@x", say=said.append)
    assert target.engine.label == "vllm 0.33.0"
    assert target.context_length == 512
    assert target.processor == "8xH100, vllm 0.33.0"
    assert said[-1] == "the server was seen to have: chat, greedy, log-probs, min_p, prefix, temperature, top_k, top_p"


def test_a_law_that_is_not_seen_is_not_sent():
    target = target_of(Double())
    decoder = served.on(decoders.build("top-p[p=0.5]"), target)
    target.parts = target.parts - {"top_p"}
    with pytest.raises(UnsupportedError):
        decoder.generate(target, [target.chat([{"role": "user", "content": "?"}])], Limits(3), RowRandom(0, [0]))


def test_a_part_that_is_left_out_of_the_request_would_be_seen(monkeypatch):
    """A seeded bug in the client: min_p is never sent."""
    without = replace(DIALECTS["vllm"], parts=DIALECTS["vllm"].parts - {"min_p"})
    made = RemoteTarget(Direct(Double()), "m", Engine(without, "", 512), name="openai:m")
    probes.probe(made)
    assert "min_p" not in made.parts
