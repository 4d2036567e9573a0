"""The mathematics: pure functions of tensors, exact against an independent implementation where one exists.

Read in the order a step uses them: ``shaping`` (rewards), ``advantages`` (with ``turn_credit`` and ``token_baseline``),
``correction`` (rollout policy against trained policy), ``losses`` (with ``ratio_losses`` and ``trust_region_losses``), ``kl``.
``masked``, ``grouping`` and ``aggregation`` are the primitives below them. No module knows a config, a rank or a file.
"""
