"""The embedded engine's parts: `continuous_batching` (transformers' internals), `checkpoint` (weight files),
`engine` (the thread that owns the model), `http` (SGLang's routes). `agentrl.serving.embedded_engine` starts them.
"""
