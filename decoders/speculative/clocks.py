"""Controllers that go by the clock: what a drafted token costs here and now, against what it brings.

Both may decide to draft nothing, and then look again from time to time whether that has become wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

from decodathlon.decoders.speculative.controllers import Controller, Seconds

#: How much of an average the newest value is.
NEWEST = 0.03
#: Another length must promise so much more before it is taken.
HYSTERESIS = 1.03
#: What of older cycles is left, in a straight line through what was measured.
FADE = 0.97
#: Cycles between two looks at what the next length up or down would bring.
PROBE = 48


class Mean:
    """An exponential moving average whose first values weigh as in a plain mean."""

    def __init__(self) -> None:
        self.value, self.count = 0.0, 0

    def add(self, x: float) -> None:
        self.count += 1
        self.value += max(NEWEST, 1 / self.count) * (x - self.value)


def lengths(longest: int) -> list[int]:
    """What is tried: none, and powers of two up to the longest."""
    return [0, *(2**i for i in range(longest.bit_length()) if 2**i < longest), longest]


def neighbour(tried: list[int], best: int, cycle: int) -> int:
    """The best length, and in every so manieth cycle the next above it or, by turns, below it."""
    place = tried.index(best)
    if cycle % PROBE == PROBE - 1:
        place += 1 if (cycle // PROBE) % 2 else -1
    return tried[min(max(place, 0), len(tried) - 1)]


class EWMA(Controller):
    """The length that has made the most tokens per second: tokens and seconds of each are averaged, each is tried at
    first, and from time to time the neighbours of the best."""

    def __init__(self, longest: int) -> None:
        super().__init__(longest)
        self.arms = {n: (Mean(), Mean()) for n in lengths(longest)}
        self.cycle, self.best, self._now = 0, longest, longest

    def width(self) -> int:
        untried = [n for n, (tokens, _) in self.arms.items() if tokens.count < 2]
        self._now = untried[0] if untried else neighbour(list(self.arms), self.best, self.cycle)
        return self._now

    def settle(self, drafted: int, accepted: int, seconds: Seconds) -> None:
        self.cycle += 1
        tokens, took = self.arms[self._now]
        tokens.add(accepted + 1)
        took.add(sum(seconds))
        rates = {n: t.value / max(s.value, 1e-9) for n, (t, s) in self.arms.items() if t.count}
        first = max(rates, key=lambda n: rates[n])
        if self.best not in rates or rates[first] > HYSTERESIS * rates[self.best]:
            self.best = first

    @property
    def state(self) -> dict[str, float | str]:
        return {"best": self.best}


class Budget:
    """How many nodes of a tree are looked at: `fixed`, or where that is 0 as many as pay, at most `most`.

    With the nodes in falling order of how likely they are to stay, n of them promise 1 + w_1 + ... + w_n tokens in
    t_draft d_n + t_verify(1 + n) + t_keep seconds, d_n being the passes of the drafter that make them; verifying is a
    straight line through what was measured of it.
    """

    def __init__(self, fixed: int, most: int) -> None:
        self.fixed, self.most = fixed, max(1, most)
        self.cycle, self.passes = 0, 0
        self.draft, self.keep = Mean(), Mean()
        # by least squares in which the past fades: number, sums of n, n^2, seconds, n * seconds
        self._sums = [0.0] * 5

    def nodes(self, worth: Sequence[float], passes: Sequence[int] = ()) -> int:
        """The number to take of nodes that stay with these probabilities, in falling order.

        Args:
            passes: of the drafter that the first 1, 2, ... of them take; where they are already made, none.
        """
        if self.fixed or not worth:
            return min(self.fixed, len(worth))
        most = min(self.most, len(worth))
        line = self._line()
        if line is None:  # not yet two lengths: the shortest and the longest, in turn
            return most if self.cycle % 2 else 1
        begin, slope = line
        tokens, best, found = 1.0, 0.0, 1
        for n in range(1, most + 1):
            tokens += worth[n - 1]
            drafting = self.draft.value * (passes[n - 1] if passes else self.passes)
            rate = tokens / max(1e-9, drafting + self.keep.value + begin + slope * n)
            if rate > best:
                best, found = rate, n
        # now and then another number, without which the line would be forgotten
        return min(most, max(1, found + (4 if found < most else -4))) if self.cycle % PROBE == 0 else found

    def timed(self, nodes: int, passes: int, seconds: Seconds) -> None:
        """What the cycle took in which so many were looked at, and the drafter read so often."""
        self.cycle += 1
        self.passes = passes
        self.draft.add(seconds.draft / max(1, passes))
        self.keep.add(seconds.keep)
        new = (1.0, nodes, nodes * nodes, seconds.verify, nodes * seconds.verify)
        self._sums = [FADE * old + one for old, one in zip(self._sums, new, strict=True)]

    def _line(self) -> tuple[float, float] | None:
        """Seconds of verifying no node, and of each."""
        count, n, nn, t, nt = self._sums
        spread = count * nn - n * n
        if self.cycle < 4 or spread <= 1e-6 * count * nn:
            return None
        slope = max(0.0, (count * nt - n * t) / spread)
        return (t - slope * n) / count, slope


class BreakEven(Controller):
    """The length that promises the most tokens per second, from how often the token at each place stays if those before
    it did, and from measured seconds of drafting a token and of verifying so many:

        E(k) = 1 + a_1 + a_1 a_2 + ... + a_1 ... a_k   tokens in   k t_draft + t_verify(1 + k) + t_keep   seconds.
    """

    def __init__(self, longest: int) -> None:
        super().__init__(longest)
        self.stays = [Mean() for _ in range(longest)]
        self.draft, self.keep = Mean(), Mean()
        self.verify = {n: Mean() for n in lengths(longest)}
        self.cycle, self.best = 0, longest

    def width(self) -> int:
        untried = [n for n, m in self.verify.items() if m.count < 2]
        if untried:
            return untried[0]
        return neighbour(list(range(self.longest + 1)), self.best, self.cycle)

    def settle(self, drafted: int, accepted: int, seconds: Seconds) -> None:
        self.cycle += 1
        for place in range(min(drafted, accepted + 1)):
            self.stays[place].add(float(place < accepted))
        if drafted:
            self.draft.add(seconds.draft / drafted)
        nearest = min(self.verify, key=lambda n: abs(n - drafted))
        self.verify[nearest].add(seconds.verify)
        self.keep.add(seconds.keep)
        rates = self._rates()
        first = max(range(len(rates)), key=lambda k: rates[k])
        if rates[first] > HYSTERESIS * rates[self.best]:
            self.best = first

    def _rates(self) -> list[float]:
        """Tokens per second by length."""
        tokens, chain, found = 1.0, 1.0, []
        for k in range(self.longest + 1):
            if k:
                chain *= self.stays[k - 1].value if self.stays[k - 1].count else self._usual()
                tokens += chain
            found.append(tokens / max(1e-9, k * self.draft.value + self._verify(k) + self.keep.value))
        return found

    def _usual(self) -> float:
        """How often a token stays at a place that nobody has reached: as at the last one that was."""
        known = [m.value for m in self.stays if m.count]
        return known[-1] if known else 0.5

    def _verify(self, k: int) -> float:
        """Seconds to verify k drafted tokens, between the lengths that were measured on a straight line."""
        known = [(n, m.value) for n, m in sorted(self.verify.items()) if m.count]
        if not known:
            return 0.0
        below = max((x for x in known if x[0] <= k), default=known[0])
        above = min((x for x in known if x[0] >= k), default=known[-1])
        if above[0] == below[0]:
            return below[1]
        return below[1] + (k - below[0]) / (above[0] - below[0]) * (above[1] - below[1])

    @property
    def state(self) -> dict[str, float | str]:
        return {"best": self.best}
