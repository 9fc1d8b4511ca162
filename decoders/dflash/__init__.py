"""DFlash: a small network that sees the target's hidden states drafts a whole block of tokens in one pass.

`network` is that network and its memory, `config` and `checkpoint` what its files say and where they come from,
`drafter` how the core of speculative decoding sees it. `block` is `dflash`; `schedules` say how large its blocks are,
`hints` what they begin with. `trees` makes a tree of a block and has `ddtree`; `candidates` and `rounds` are the
founding note's trees, by the functions of `packing`.
`train` is the command that makes a drafter, `training` what is peculiar to it.
"""

from decodathlon.decoders.dflash import block, candidates, peer, rounds, train, trees

__all__ = ["block", "candidates", "peer", "rounds", "train", "trees"]
