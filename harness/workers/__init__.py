"""Where cells run: in processes of this machine (`local`), on a Ray cluster (`ray`), or right here (`inline`).

`schedule` says which cell is next, `fleet` has all workers at it, `executors` makes them.
"""
