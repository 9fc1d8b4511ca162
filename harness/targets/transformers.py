"""`TransformersTarget`: any Hugging Face causal LM with full or sliding attention, behind the `Target` seam.

The model's own forward runs with our attention and cache (attention.py). Where the model is of the Llama family the
shorter forward of lean.py replaces it on the hot path. Both are compared at load with the model's native forward, past
its window, and a model that disagrees is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from decodathlon.harness.errors import ContextOverflowError, UnsupportedError
from decodathlon.harness.targets import checks
from decodathlon.harness.targets.attention import ATTENTION_NAME, Layout, RowCache
from decodathlon.harness.targets.base import Context, Step, Target, WeightReads
from decodathlon.harness.targets.lean import LeanForward

#: Logits that `score` holds at once.
MOST_LOGITS = 1 << 24


class TransformersContext(Context):
    """Rows in a `RowCache`. The host mirrors the lengths, so that no step waits for the device."""

    def __init__(self, target: TransformersTarget, rows: int, capacity: int, cache: RowCache | None = None) -> None:
        self.capacity = capacity
        self.cache = cache if cache is not None else RowCache(target.layers, rows, capacity)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=target.device)
        self._target, self.deepest = target, target.layers
        self._host = [0] * rows
        self._last_logits: Tensor | None = None
        self._next_logits: Tensor | None = None
        self._last_width = 0
        self._last_tree: Tensor | None = None
        self._forward: Any = target.forward

    def lent(self, forward: LeanForward) -> LentContext:
        """These rows as a drafter reads them on: with other weights, over the same keys and values.

        What it writes stands behind the tokens that are kept here, where the next `extend` writes over it.
        """
        return LentContext(self._target, self, forward)

    def extend(
        self,
        tokens: Tensor,
        *,
        tree: Tensor | None = None,
        hidden: Sequence[int] = (),
        logits_at: Tensor | None = None,
    ) -> Step:
        B, Q = tokens.shape
        if self.rows != B:
            raise ValueError(f"extend got {B} rows of tokens for a context of {self.rows} rows")
        end = max(self._host) + Q
        if end > self.capacity:
            raise ContextOverflowError(
                f"a row of {max(self._host)} tokens cannot take {Q} more: this context was opened for {self.capacity}"
            )
        if tree is not None:
            tree = self._checked_tree(tree, B, Q)
        start = self._host[0] if len(set(self._host)) == 1 else None
        layout = Layout(self.lengths, Q, end, start=start, tree=tree)
        logits, states = self._forward(tokens.to(self.lengths.device), layout, self.cache, hidden, logits_at)
        self._last_logits = logits if logits_at is None else None
        self._last_width, self._last_tree = Q, tree
        return Step(logits, states)

    def _checked_tree(self, tree: Tensor, B: int, Q: int) -> Tensor:
        tree = tree.to(self.lengths.device).expand(B, Q, Q)
        if not bool(tree.diagonal(dim1=1, dim2=2).all()) or bool(tree.triu(1).any()):
            raise ValueError("tree must have a true diagonal and list parents before their children")
        window = self._target.smallest_window
        if window is not None and window < Q:
            raise UnsupportedError(
                "full attention", f"{self._target.name} has a window of {window} tokens, the tree has {Q} nodes"
            )
        return tree

    def keep(self, counts: int | Sequence[int] | Tensor, *, path: Tensor | None = None) -> None:
        count = [counts] * self.rows if isinstance(counts, int) else [int(c) for c in counts]
        if len(count) != self.rows:
            raise ValueError(f"keep got {len(count)} counts for {self.rows} rows")
        width = self._last_width if path is None else path.shape[1]
        if min(count) < 0 or max(count) > width:
            raise ValueError(f"keep can take 0 to {width} tokens per row after this extend, not {count}")
        if path is not None:
            path = path.to(self.lengths.device)
            self._check_path(path, count)
            steps = torch.arange(width, device=path.device)
            self.cache.move(self.lengths[:, None] + path, self.lengths[:, None] + steps)
        if max(count) > 0:
            self._next_logits = self._logits_after(count, path)
        self._host = [n + c for n, c in zip(self._host, count, strict=True)]
        self.lengths = torch.tensor(self._host, device=self.lengths.device)
        self._last_width, self._last_logits = 0, None

    def _check_path(self, path: Tensor, count: list[int]) -> None:
        """On a GPU the look would wait for the device; there a wrong path is the caller's."""
        tree = self._last_tree
        if tree is None or path.device.type != "cpu":
            return
        for b, c in enumerate(count):
            kept = path[b, :c]
            if not torch.equal(tree[b][kept].sum(-1), torch.arange(1, c + 1)) or not bool(
                tree[b][kept][:, kept].tril().sum() == c * (c + 1) // 2
            ):
                raise ValueError(f"row {b}: {kept.tolist()} is not a path from the root of the tree")

    def _logits_after(self, count: list[int], path: Tensor | None) -> Tensor | None:
        """(B, V) logits behind the last token that each row keeps; who keeps none holds his, if all have some."""
        if self._last_logits is None or (min(count) == 0 and self._next_logits is None):
            return None
        if self._last_width == 1 and min(count) == 1:
            return self._last_logits[:, 0]
        last = torch.tensor(count, device=self.lengths.device) - 1
        index = last.clamp(min=0)
        if path is not None:
            index = path.gather(1, index[:, None])[:, 0]
        fresh = self._last_logits[torch.arange(self.rows, device=index.device), index]
        return fresh if min(count) > 0 else torch.where(last[:, None] >= 0, fresh, self.next_logits)

    @property
    def next_logits(self) -> Tensor:
        if self._next_logits is None:
            raise RuntimeError(
                "nothing was kept since the last rewind, or it was read without its logits; extend once more"
            )
        return self._next_logits

    @next_logits.setter
    def next_logits(self, logits: Tensor) -> None:
        self._next_logits = logits

    def rewind(self, lengths: Sequence[int]) -> None:
        if len(lengths) != self.rows or any(not 0 <= n <= have for n, have in zip(lengths, self._host, strict=True)):
            raise ValueError(f"rows of {self._host} tokens cannot go back to {list(lengths)}")
        self._host = list(lengths)
        self.lengths = torch.tensor(self._host, device=self.lengths.device)
        self._last_width, self._last_logits, self._next_logits = 0, None, None

    def select(self, rows: Sequence[int] | Tensor) -> None:
        if torch.as_tensor(rows).dtype is torch.bool:
            raise ValueError("select takes row numbers, not a mask")
        index = torch.as_tensor(rows, dtype=torch.long, device=self.lengths.device)
        self.cache.select(index)
        self.lengths = self.lengths[index]
        self._host = [self._host[i] for i in index.tolist()]
        if self._next_logits is not None:
            self._next_logits = self._next_logits[index]
        self._last_width, self._last_logits = 0, None


class DraftContext(TransformersContext):
    """Rows that another forward reads; the target's ledger does not count it."""

    def __init__(
        self, target: TransformersTarget, rows: int, capacity: int, cache: RowCache | None, forward: LeanForward
    ) -> None:
        super().__init__(target, rows, capacity, cache)
        self._read = forward
        self._forward = self._of_drafter

    def _of_drafter(
        self, tokens: Tensor, layout: Layout, cache: RowCache, hidden: Sequence[int], logits_at: Tensor | None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        cache.layout = layout
        logits, states = self._read(tokens, layout, cache, hidden, logits_at)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), states


class LentContext(DraftContext):
    """The rows of another context, read by another forward."""

    def __init__(self, target: TransformersTarget, owner: TransformersContext, forward: LeanForward) -> None:
        super().__init__(target, owner.rows, owner.capacity, owner.cache, forward)
        self._owner = owner
        self.follow()

    def follow(self) -> None:
        """Stand where the owner stands, with the rows that it has."""
        self._host, self.lengths = list(self._owner._host), self._owner.lengths
        self._last_width, self._last_logits, self._next_logits = 0, None, None


class TransformersTarget(Target):
    """A Hugging Face causal LM.

    Args:
        model: the loaded model; it is switched to our attention and frozen.
        tokenizer: its tokenizer, or None (then `text` is not among the capabilities).
        name: what rows and errors call it.
        lean: whether the shorter forward may replace the model's own where it exists and agrees.

    Raises:
        UnsupportedError: the architecture has layers that cannot be rolled back, or the probe disagrees.
    """

    static_loop = True

    def __init__(self, model: Any, tokenizer: Any = None, *, name: str, lean: bool = True) -> None:
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        config = model.config.get_text_config()
        self.config = config
        checks.refuse_by_name(config, name)
        self.layers = int(config.num_hidden_layers)
        self.vocab_size = int(config.vocab_size)
        self.context_length = int(getattr(config, "max_position_embeddings", None) or 1 << 20)
        self.device, self.dtype = model.device, model.dtype
        self.parameters = sum(p.numel() for p in model.parameters())
        weights = max(model.num_parameters(), 1)  # of quantised ones, which pack several into a number, the true count
        self.bits_per_weight = 8 * sum(p.numel() * p.itemsize for p in model.parameters()) / weights
        self.stop_tokens = checks.stop_tokens(model, config)
        self.capabilities = frozenset(
            {"logits", "hidden", "gradient", "energy", "hf-model"} | ({"text"} if tokenizer is not None else set())
        )
        begins = (getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None))
        self.start_token = next((t for t in (*begins, config.bos_token_id) if t is not None), None)
        self._native_attention = config._attn_implementation
        self._blocks = checks.blocks(model, self.layers, name)
        self._takes_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        windows = [w for w in (getattr(m, "sliding_window", None) for m in model.modules()) if isinstance(w, int)]
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()) or config.model_type == "mistral":
            windows += [config.sliding_window] if getattr(config, "sliding_window", None) else []
        self.smallest_window = min(windows, default=None)
        self._lean: LeanForward | None = None
        #: What targets/graphs.py keeps between requests.
        self.static_loops: list[Any] = []
        self._probe(lean)

    def release(self) -> None:
        super().release()
        self.static_loops.clear()

    @property
    def weight_reads(self) -> WeightReads:
        """Each pass reads all but the table of embeddings, of which it looks up rows. Which experts it reads is not
        known, and on a GPU graphs are replayed that nobody counts."""
        weights = list(self.model.parameters())
        if any(w.dim() > 2 for w in weights) or self.device.type != "cpu":
            return WeightReads()
        table, head = self.model.get_input_embeddings().weight, self.model.get_output_embeddings()
        looked_up = [] if head is not None and head.weight is table else [table]
        size = sum(w.numel() * w.itemsize for w in weights) - sum(w.numel() * w.itemsize for w in looked_up)
        return WeightReads(self.spent.calls * size)

    @property
    def lean(self) -> LeanForward:
        """The short forward, whose parts a drafter may replace.

        Raises:
            UnsupportedError: the architecture has none.
        """
        if self._lean is None:
            raise UnsupportedError("a forward whose parts can be replaced", f"{self.config.model_type} has none here")
        return self._lean

    # -- reading text ------------------------------------------------------------------------------------------

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        if self.tokenizer is None:
            return super().encode(text)
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        if self.tokenizer is None:
            return super().decode(tokens)
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def chat(self, messages: Sequence[Mapping[str, str]], *, thinking: bool = True) -> list[int] | None:
        if not getattr(self.tokenizer, "chat_template", None):
            return None
        # a template that knows nothing of thinking passes the word by
        how = {} if thinking else {"enable_thinking": False}
        found = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True, **how)
        return list(found["input_ids"])

    @torch.no_grad()
    def open(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        capacity: int | None = None,
        hidden: Sequence[int] = (),
        cache: RowCache | None = None,
        forward: LeanForward | None = None,
    ) -> TransformersContext:
        """Prefill; see `Target.open`.

        Args:
            cache: the memory (and the CUDA graphs) of an earlier context, to be used again.
            forward: reads in the model's place, with a memory of its own: a drafter that is another model.
        """
        capacity = capacity if capacity is not None else self.context_length
        self.check_room(prompts, max(capacity, max(map(len, prompts), default=0)))
        sizes = [len(p) for p in prompts]
        if min(sizes) < 1:
            raise ValueError(f"{self.name}: a prompt has no tokens; give it at least a BOS token")
        context = (
            TransformersContext(self, len(prompts), capacity, cache)
            if forward is None
            else DraftContext(self, len(prompts), capacity, cache, forward)
        )
        width = max(sizes)
        padded = torch.zeros(len(prompts), width, dtype=torch.long)
        for b, prompt in enumerate(prompts):
            padded[b, : sizes[b]] = torch.as_tensor(list(prompt), dtype=torch.long)
        if int(padded.max()) >= self.vocab_size or int(padded.min()) < 0:
            raise ValueError(f"{self.name}: a prompt has a token outside the vocabulary of {self.vocab_size}")
        ends = sorted({n - 1 for n in sizes})
        step = context.extend(padded, hidden=hidden, logits_at=torch.tensor(ends))
        context.prompt_hidden = step.hidden
        context.keep(sizes)
        context.next_logits = step.logits[torch.arange(len(sizes)), [ends.index(n - 1) for n in sizes]]
        return context

    def row_bytes(self, capacity: int) -> int:
        """Keys and values of every layer; the logits in 32 bits, and four tables as large in 64."""
        config = self.model.config.get_text_config()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return int(2 * self.layers * heads * width * self.dtype.itemsize * capacity + 36 * self.vocab_size)

    # -- forwards ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def forward(
        self,
        tokens: Tensor,
        layout: Layout,
        cache: RowCache,
        hidden: Sequence[int] = (),
        logits_at: Tensor | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Logits (B, Q or P, V) in float32 or wider, and the residual streams that were asked for."""
        bad = [h for h in hidden if not 0 <= h <= self.layers + 1]
        if bad:
            raise ValueError(f"{self.name} has hidden states 0 to {self.layers + 1}, not {bad}")
        cache.layout = layout
        if logits_at is not None:
            logits_at = logits_at.to(tokens.device)
        self.spent.add(tokens.numel())
        if self._lean is not None:
            logits, states = self._lean(tokens, layout, cache, hidden, logits_at)
        else:
            logits, states = self._through_transformers(tokens, layout, cache, hidden, logits_at)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), states

    def _through_transformers(
        self, tokens: Tensor, layout: Layout, cache: RowCache, hidden: Sequence[int], logits_at: Tensor | None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        wanted = {"logits_to_keep": logits_at} if logits_at is not None and self._takes_logits_to_keep else {}
        with self._catch(hidden) as states:
            logits = self.model(
                input_ids=tokens,
                position_ids=layout.positions,
                past_key_values=cache,
                use_cache=True,
                decodathlon=layout,
                **wanted,
            ).logits
        if logits_at is not None and not wanted:
            logits = logits[:, logits_at]
        return logits, states

    @contextmanager
    def _catch(self, hidden: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        states: dict[int, Tensor] = {}
        hooks = []

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states[0] = args[0] if args else kwargs["hidden_states"]

        def after(number: int) -> Any:
            def hook(module: Any, args: Any, output: Any) -> None:
                # the backbone wraps what its last norm gives; a block may return a tuple
                output = getattr(output, "last_hidden_state", output)
                states[number] = output[0] if isinstance(output, tuple) else output

            return hook

        for h in set(hidden):
            if h == self.layers + 1:
                hooks.append(self.model.base_model.register_forward_hook(after(h)))
            elif h == 0:
                hooks.append(self._blocks[0].register_forward_pre_hook(before, with_kwargs=True))
            else:
                hooks.append(self._blocks[h - 1].register_forward_hook(after(h)))
        try:
            yield states
        finally:
            for hook in hooks:
                hook.remove()

    def logits(self, tokens: Tensor, at: Tensor) -> Tensor:
        self.check_room(tokens.tolist(), tokens.shape[1])
        return TransformersContext(self, *tokens.shape).extend(tokens, logits_at=at).logits

    # -- scores of whole sequences -----------------------------------------------------------------------------

    @property
    def embeddings(self) -> Tensor:
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight

    def embedding_gradient(self, sequences: Tensor, given: int = 1) -> tuple[Tensor, Tensor]:
        _, scores, gradient = self._differentiated(sequences.to(self.device), given)
        return scores, gradient

    def _differentiated(self, sequences: Tensor, given: int) -> tuple[Tensor, Tensor, Tensor]:
        """Log-laws (B, L - given, V) of the tokens after the given ones, their sum (B,), and its gradient (B, L, E)."""
        B, L = sequences.shape
        self.spent.add(B * L, backward=True)
        with torch.enable_grad():
            inputs = self.model.get_input_embeddings()(sequences).detach().requires_grad_(True)
            zero = torch.zeros(B, dtype=torch.long, device=self.device)
            layout = Layout(zero, L, L, start=0)
            logits = self.model(
                inputs_embeds=inputs, position_ids=layout.positions, use_cache=False, decodathlon=layout
            ).logits
            law = logits[:, given - 1 : -1].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            scores = law.gather(-1, sequences[:, given:, None])[..., 0].sum(-1)
            (gradient,) = torch.autograd.grad(scores.sum(), inputs)
        return law.detach(), scores.detach(), gradient

    @torch.no_grad()
    def score(self, sequences: Tensor, free: int) -> Tensor:
        given, L = max(1, free), sequences.shape[1]
        if given == L:
            return torch.zeros(len(sequences), dtype=torch.float64, device=self.device)
        at, sequences = torch.arange(given - 1, L - 1, device=self.device), sequences.to(self.device)
        at_once = max(1, MOST_LOGITS // (len(at) * self.vocab_size))
        with self.spent.one_call():
            return torch.cat([self._scored(some, given, at) for some in sequences.split(at_once)])

    def _scored(self, sequences: Tensor, given: int, at: Tensor) -> Tensor:
        law = self.logits(sequences[:, :-1], at).log_softmax(-1)
        return law.gather(-1, sequences[:, given:, None])[..., 0].double().sum(-1)

    def local_changes(self, sequences: Tensor, free: int, *, label_term: bool = True) -> tuple[Tensor, Tensor]:
        sequences = sequences.to(self.device)
        given = max(1, free)
        law, scores, gradient = self._differentiated(sequences, given)
        table = self.embeddings.to(law.dtype)
        slope = gradient[:, free:].to(law.dtype)
        change = slope @ table.T - (slope * table[sequences[:, free:]]).sum(-1, keepdim=True)
        if label_term:
            own = law - law.gather(-1, sequences[:, given:, None])
            change[:, given - free :] += own
        return scores.double(), change

    def energy(self, sequences: Tensor) -> Tensor:
        return -self.log_prob([row.tolist() for row in sequences])

    @contextmanager
    def native(self) -> Iterator[Any]:
        """The Hugging Face model with its own attention, for `generate`.

        `generate` fills whatever its caller leaves open (stop tokens among it) from the checkpoint's generation
        config, so that is put aside too.
        """
        defaults = self.model.generation_config
        self.model.generation_config = type(defaults)()
        self.model.set_attn_implementation(self._native_attention)
        try:
            yield self.model
        finally:
            self.model.generation_config = defaults
            self.model.set_attn_implementation(ATTENTION_NAME)

    @torch.no_grad()
    def _probe(self, lean: bool) -> None:
        """Compare our forwards with the native one on random text, with every window shrunk so that it is exceeded."""
        length = min(16, self.context_length)
        source = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, self.vocab_size, (1, length), generator=source).to(self.device)
        tolerance = checks.TOLERANCE.get(self.dtype, 6e-2)
        with checks.small_windows(self.model, self.config):
            truth = self.model(input_ids=tokens, use_cache=False).logits
            self.model.set_attn_implementation(ATTENTION_NAME)
            error = checks.spread_error(self._probe_run(tokens), truth)
            if not error <= tolerance:
                raise UnsupportedError(
                    "a forward that can be driven step by step",
                    f"{self.name} ({self.config.model_type}) is off by {error:.2g} of the logits' spread in "
                    f"{self.dtype} (allowed {tolerance:g})",
                )
            if lean and LeanForward.fits(self.model):
                self._lean = LeanForward(self.model)
                error = checks.spread_error(self._probe_run(tokens), truth)
                if not error <= tolerance:
                    self._lean = None
                    self.notes += (f"lean forward left aside: off by {error:.2g} of the logits' spread",)
        if self._lean is not None:
            self._lean.read_windows(self.model)

    def _probe_run(self, tokens: Tensor) -> Tensor:
        """All logits of `tokens`: half of them at once, then a chain of the rest."""
        half = tokens.shape[1] // 2
        context = TransformersContext(self, 1, tokens.shape[1])
        first = context.extend(tokens[:, :half])
        context.keep(half)
        return torch.cat([first.logits, context.extend(tokens[:, half:]).logits], dim=1)
