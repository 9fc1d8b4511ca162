"""The autoregressive loop that every `Sampler` shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from decodathlon.harness.decoder import Completion, Cost, Limits, Sampler
from decodathlon.harness.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from decodathlon.harness.randomness import RowRandom
    from decodathlon.harness.targets.base import Context, Target


def autoregressive(
    sampler: Sampler, target: Target, prompts: Sequence[Sequence[int]], limits: Limits, rng: RowRandom
) -> list[Completion]:
    """Complete every prompt, one token per row and target call.

    On a CUDA device the step of a sampler without a state, or with a static one, is one graph replay
    (targets/graphs.py); else the loop below runs.
    """
    sampler.check(target)
    if limits.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {limits.max_new_tokens}")
    noise = rng.uniforms(limits.max_new_tokens, 1 + sampler.uniforms)
    capacity = max(map(len, prompts), default=0) + limits.max_new_tokens
    if (sampler.stateless or sampler.static_state) and target.static_loop and target.device.type == "cuda":
        from decodathlon.harness.targets import graphs

        tokens, log_probs = graphs.run(sampler, target, prompts, noise, limits)
    else:
        with torch.no_grad():
            context = target.open(prompts, capacity=capacity)
            noise = noise.to(context.next_logits.device)
            tokens, log_probs = _run(sampler, context, noise, set() if limits.ignore_eos else set(target.stop_tokens))
    return completions(target, prompts, tokens, log_probs, limits)


def _run(sampler: Sampler, context: Context, noise: Tensor, stop: set[int]) -> tuple[Tensor, Tensor]:
    """Tokens and their log-probabilities under the target, both (B, up to T)."""
    state = sampler.start(context.rows)
    tokens, log_probs = [], []
    running = set(range(context.rows))
    T = noise.shape[1]
    for t in range(T):
        logits = context.next_logits
        token, state = sampler.choose(logits.clone(), state, noise[:, t])  # it may write into what it gets
        tokens.append(token)
        log_probs.append(token_log_prob(logits, token))
        if stop:
            running -= {b for b, chosen in enumerate(token.tolist()) if chosen in stop}
        if not running or t + 1 == T:
            break
        context.extend(token[:, None])
        context.keep(1)
    return torch.stack(tokens, 1), torch.stack(log_probs, 1)


def token_log_prob(logits: Tensor, token: Tensor) -> Tensor:
    """(B,) natural-log probability of the tokens (B,) under the unprocessed logits (B, V)."""
    return logits.gather(-1, token[:, None])[:, 0] - logits.logsumexp(-1)


def completions(
    target: Target, prompts: Sequence[Sequence[int]], tokens: Tensor, log_probs: Tensor, limits: Limits
) -> list[Completion]:
    """Cut each row of tokens (B, T) behind its stop token, and account for what it cost."""
    found = []
    stop = frozenset() if limits.ignore_eos else target.stop_tokens
    scores = log_probs.double().cpu()
    for b, row in enumerate(tokens.tolist()):
        end = next((i + 1 for i, token in enumerate(row) if token in stop), None)
        length = end if end is not None else len(row)
        kept = row[:length]
        found.append(
            Completion(
                tokens=kept,
                stop_reason="length" if end is None else "stop",
                log_prob=float(scores[b, :length].sum()),
                text=target.decode(kept) if "text" in target.capabilities else "",
                cost=Cost(target_calls=length, target_positions=len(prompts[b]) + length - 1),
            )
        )
    return found
