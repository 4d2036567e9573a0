"""③ Carry trajectories: asynchronous producers on one side, one synchronous learner on the other, Redis between.

    codec.py        Trajectory and GroupClose <-> bytes; schema number, checksum, nothing pickled
    arrays.py       the arrays of a segment <-> bytes
    keys.py         every Redis key: what it holds, who writes it, who trims it
    server.py       find, start, attach to and check the server; clients that never retry by themselves
    lines.py        connections with many commands in flight
    scripts.py      the Lua that makes each step of an entry's life atomic
    put_ids.py      which ids were ever put: one by one while their group is open, a bit each afterwards
    producer.py     PUT: idempotent by trajectory id, bounded, never drops
    consumer.py     read, assemble groups, COMMIT behind a checkpoint, fenced by the run epoch
    policy.py       the policy record and the progress that admission reads
    leases.py       which of several rollout processes plays which task
    ledger.py       how every rollout ended; the sums must close
    dead_letters.py entries that could not be trained: list, replay, drop
    fingerprint.py  serve and learn agree on model, tokenizer, template, tools and limits

`docs/stream.md` draws the life of an entry and says what happens when any process dies.
"""
