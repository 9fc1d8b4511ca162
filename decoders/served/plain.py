"""The baselines on a server: one request per answer, which states the law and a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from decodathlon.harness.decoder import Completion, Cost, Limits
from decodathlon.harness.engines.dialects import Law
from decodathlon.harness.served import add_cost, by_model, completion, seed, served, whole

if TYPE_CHECKING:
    from decodathlon.harness.randomness import RowRandom
    from decodathlon.harness.targets.remote import RemoteTarget


def greedy_law(decoder: Any) -> Law:
    return Law(temperature=0.0)


def processed_law(decoder: Any) -> Law:
    """Temperature and truncation, as the decoder hands them to `law.process`."""
    return Law(temperature=decoder.temperature, **decoder.settings)


def _form(law: Any) -> Any:
    def answers(
        decoder: Any, target: RemoteTarget, prompts: Sequence[Sequence[int]], limits: Limits, rng: RowRandom
    ) -> list[Completion]:
        from decodathlon.harness.targets.remote import Ask

        asked, told = law(decoder), by_model(target, law(decoder))
        asks = [
            Ask(
                prompt=prompt,
                tokens=limits.max_new_tokens,
                law=asked,
                seed=seed(rng, row),
                ignore_eos=limits.ignore_eos,
            )
            for row, prompt in enumerate(prompts)
        ]
        found = []
        for one in target.write(asks):
            spent = Cost()
            add_cost(spent, one)
            found.append(completion(target, one.tokens, whole(one.log_probs) if told else None, spent))
        return found

    return answers


served("greedy", law=greedy_law, streams=True)(_form(greedy_law))
for _name in ("temperature", "top-k", "top-p", "min-p"):
    served(_name, law=processed_law, streams=True)(_form(processed_law))
