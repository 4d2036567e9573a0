"""The one place that knows the internals of transformers' continuous batching.

The library has the paged cache, prefix sharing, chunked prefill and the scheduler; its own loop, sampler and rules for
reusing cached blocks do not fit reinforcement learning, so this module replaces exactly those:

* **The step is ours.** One thread calls `ContinuousBatch.step`, so between two calls nothing moves: an update of the
  weights needs no lock, and every token is known to come from the weights that were there when `step` was called.
* **Logprobs** are those of the temperature-scaled distribution over the whole vocabulary, before top-k, top-p and min-p
  cut it, as SGLang reports them. The library would return those of the cut distribution.
* **Prefix reuse never crosses an update.** Two things would: a block of old keys and values that a live request holds
  keeps its content hash, and a request that lived through the update registers blocks that hold a mixture. So an
  update forgets every hash, and a request registers blocks only while the weights are those it was prefilled with.

All of it is private API of a pinned version; `check_internals` compares what is used with what is there and refuses with
the version numbers rather than generating something subtly wrong.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

from agentrl.errors import ConfigError

WRITTEN_FOR = "5.23"
"""transformers release whose internals this module was written against."""

GREEDY_BELOW = 1e-6
"""Temperatures below this mean argmax, as in SGLang."""

_SCORE_ROWS = 256  # rows of [rows, vocab] logits that scoring a prompt holds at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one request samples; the defaults are the model's own distribution."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def is_cut(self) -> bool:
        """Whether anything narrows the distribution that is sampled from."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0


@dataclass(frozen=True, slots=True)
class SampledToken:
    """What one step added to one request."""

    request_id: str
    token: int
    logprob: float
    is_last: bool


class ContinuousBatch:
    """A model, its paged cache and the requests in flight. Not thread-safe: exactly one thread may use it.

    Args:
        model: a causal LM of transformers, already on its device and in its dtype.
        max_running_requests: requests in one forward pass. On a CPU attention costs the square of it: queue the rest.
        max_batch_tokens: tokens in one forward pass; longer prompts are prefilled in pieces.
        page_size: tokens per cache block; also the unit of prefix sharing.
        num_blocks: cache blocks; ``num_blocks * page_size`` bounds prompt plus output of one request.
        seed: of the sampler; None takes one from the operating system.

    Raises:
        ConfigError: transformers' internals are not those this module knows, or the sizes do not fit together.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_running_requests: int = 32,
        max_batch_tokens: int = 128,
        page_size: int = 16,
        num_blocks: int = 512,
        seed: int | None = None,
    ) -> None:
        check_internals()
        if max_batch_tokens < max_running_requests:
            raise ConfigError(
                f"max_batch_tokens={max_batch_tokens} is less than max_running_requests={max_running_requests}: a step could "
                "not give every request one token. Raise the first or lower the second."
            )
        from transformers import ContinuousBatchingConfig, GenerationConfig
        from transformers.generation.continuous_batching.requests import RequestState, RequestStatus

        self._model = model
        self._new_state: Any = RequestState
        self._pending: Any = RequestStatus.PENDING
        self._finished: Any = RequestStatus.FINISHED
        self._generator = torch.Generator(device=model.device)
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        manager: Any = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=True, max_new_tokens=1, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=page_size,
                num_blocks=num_blocks,
                max_batch_tokens=max_batch_tokens,
                max_requests_per_batch=max_running_requests,
                max_blocks_per_request=0,
                use_cuda_graph=False,
                use_async_batching=False,
                auto_switch_to_flash=False,
                return_logprobs=True,
                seed=seed,
            ),
        )
        manager.logit_processor.clear()  # temperature and cuts belong to `_sample`, which needs the raw logits
        self._processor: Any = manager._create_batch_processor()
        self._scheduler: Any = self._processor.scheduler
        self._cache: Any = self._processor.cache
        if list(self._cache.cache_allocators) != ["full_attention"]:
            raise ConfigError(
                f"the embedded engine serves full-attention models only; this one has {list(self._cache.cache_allocators)}. "
                "Serve it with SGLang."
            )
        (self._allocator,) = self._cache.cache_allocators.values()
        self._sampling: dict[str, Sampling] = {}
        self._epoch = 0
        """Counts the weights this batch has seen."""
        self._kv_epoch: dict[str, int] = {}
        """The epoch at which a request's cache was begun: what it may share, and share with."""
        self._cached_tokens: dict[str, int] = {}
        self._install_overrides()

    def _install_overrides(self) -> None:
        search = self._cache.search_prefix_match

        def search_prefix_match(request_id: str, prompt_ids: list[int]) -> int:
            """Called whenever a request is (re-)prefilled from its first token: its cache begins here."""
            self._kv_epoch[request_id] = self._epoch
            matched: int = search(request_id, prompt_ids)
            self._cached_tokens[request_id] = matched
            return matched

        def mark_complete_blocks(state: Any, complete_blocks: dict[str, int]) -> None:
            """The library's, but also for a request's last step: its blocks are what the next turn starts from."""
            if complete_blocks and self._kv_epoch.get(state.request_id) == self._epoch:
                (count,) = complete_blocks.values()
                self._allocator.mark_complete_blocks(state.request_id, state.initial_tokens + state.generated_tokens, count)

        self._cache.search_prefix_match = search_prefix_match
        self._cache.mark_complete_blocks = mark_complete_blocks
        self._processor.model_runner._sample = self._sample

    # ------------------------------------------------------------------ what is in flight

    @property
    def num_active(self) -> int:
        """Requests that hold cache."""
        return len(self._scheduler.active_requests)

    @property
    def num_waiting(self) -> int:
        """Requests that hold none yet."""
        return len(self._scheduler.waiting_requests)

    @property
    def capacity_tokens(self) -> int:
        """Tokens the cache holds: the longest prompt plus output of one request."""
        return int(self._allocator.num_blocks * self._allocator.tokens_per_page)

    @property
    def used_tokens(self) -> int:
        """Tokens of cache held by requests in flight, in whole blocks; reusable blocks of finished ones do not count."""
        free = self._cache.compute_free_capacity()
        used_blocks = round((1.0 - free) * self._allocator.num_blocks) - len(self._allocator.ledger.cached_blocks)
        return max(0, used_blocks) * int(self._allocator.tokens_per_page)

    def cached_tokens(self, request_id: str) -> int:
        """Tokens that this request found in the cache when its latest prefill began."""
        return self._cached_tokens.get(request_id, 0)

    # ------------------------------------------------------------------ requests

    def add(
        self, request_id: str, ids: Sequence[int], *, max_new_tokens: int, stop_ids: Sequence[int], sampling: Sampling
    ) -> None:
        """Queue a request; ``max_new_tokens`` at least 1, and with the prompt no more than `capacity_tokens`."""
        self._sampling[request_id] = sampling
        self._scheduler.add_waiting_request(
            self._new_state(
                request_id=request_id,
                initial_tokens=list(ids),
                max_new_tokens=max_new_tokens,
                eos_token_id=list(stop_ids),
            )
        )

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Take requests out at once and free their cache. Unknown ids are ignored."""
        for request_id in request_ids:
            self._scheduler.set_request_cancellation(request_id)
        self._scheduler.clear_cancelled_requests()
        for request_id in request_ids:
            self._forget_request(request_id)
        self._unblock()

    def retract(self) -> list[str]:
        """Put everything that holds cache back at the head of the queue; it will be prefilled anew, output included.

        Returns:
            The ids of the retracted requests, in their order.
        """
        retracted = list(self._scheduler.active_requests.values())
        for state in retracted:
            self._scheduler.finish_request(state.request_id)
        for state in reversed(retracted):
            again = state.create_equivalent_initial_request()
            self._scheduler.waiting_requests[again.request_id] = again
            self._scheduler.waiting_requests_order.appendleft(again.request_id)
        self._unblock()
        return [state.request_id for state in retracted]

    def _unblock(self) -> None:
        # After a shortage of memory the scheduler admits nothing until a request finishes. Those that could have
        # finished may just have been taken away, and then nothing would ever be admitted again.
        self._scheduler.block_new_requests = False

    def _forget_request(self, request_id: str) -> None:
        for table in (self._sampling, self._kv_epoch, self._cached_tokens):
            table.pop(request_id, None)

    # ------------------------------------------------------------------ steps

    @torch.no_grad()
    def step(self) -> list[SampledToken]:
        """One forward pass over what fits. Empty when nothing is in flight, or when the pass only prefilled."""
        processor = self._processor
        if not processor.prepare_next_batch():
            return []
        processor._generation_step(self._model)
        batch = [future.state for future in processor.inputs_and_outputs.requests_in_batch if future.has_new_token]
        processor.update_batch()
        sampled: list[SampledToken] = []
        for state in batch:
            is_last = state.status == self._finished
            sampled.append(SampledToken(state.request_id, state.generated_tokens[-1], state.logprobs[-1], is_last))
        return sampled

    def finish(self, request_id: str) -> None:
        """Forget a request whose last token `step` has returned. Its cached prefix stays for others."""
        self._forget_request(request_id)

    def _sample(self, scores: Tensor, output_ids: Tensor) -> None:
        """Replace the library's sampler.

        Args:
            scores: [1, rows, vocab] fp32 raw logits; only the first rows, one per request with a new token, are meant.
            output_ids: [2, slots] int32, filled with the token and, bit for bit, its fp32 logprob.
        """
        futures = self._processor.inputs_and_outputs.requests_in_batch
        sampling = [self._sampling[future.state.request_id] for future in futures if future.has_new_token]
        if not sampling:
            return
        tokens, logprobs = sample(scores[0, : len(sampling)], sampling, self._generator)
        output_ids[0, : len(sampling)].copy_(tokens)
        output_ids[1, : len(sampling)].copy_(logprobs.view(torch.int32))

    @torch.no_grad()
    def score(self, ids: Sequence[int]) -> list[float]:
        """Logprobs of ``ids[1:]`` given what stands before them, at temperature 1, by a plain forward pass: [len(ids) - 1]."""
        tokens = torch.tensor([list(ids)], device=self._model.device)
        hidden = self._model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0, :-1]
        head = self._model.get_output_embeddings()
        scores: list[float] = []
        for start in range(0, len(hidden), _SCORE_ROWS):
            logprobs = torch.log_softmax(head(hidden[start : start + _SCORE_ROWS]).float(), dim=-1)
            wanted = tokens[0, start + 1 : start + 1 + len(logprobs), None]
            scores += logprobs.gather(1, wanted)[:, 0].tolist()
        return scores

    # ------------------------------------------------------------------ weights and cache

    def weights_changed(self) -> None:
        """Call after every change of the weights: from here on no block of the old ones can be found."""
        self._epoch += 1
        self.forget_cache()

    def forget_cache(self) -> None:
        """Forget every reusable prefix. Blocks of requests in flight stay theirs, but nobody can find them."""
        self._cache.evict_cached_blocks()
        ledger = self._allocator.ledger
        ledger.hash_to_block.clear()
        ledger.block_to_hash.clear()


def sample(logits: Tensor, sampling: Sequence[Sampling], generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    Args:
        logits: [rows, vocab] fp32, raw.
        sampling: one per row.
        generator: on the device of ``logits``.

    Returns:
        Tokens [rows] int64, and their logprobs [rows] fp32 under softmax(logits / temperature) over the whole
        vocabulary: top-k, top-p and min-p restrict the draw, not the number. At temperature 0 the temperature is 1.
    """
    if any(s.temperature != 1.0 and not s.is_greedy for s in sampling):
        temperatures = [1.0 if s.is_greedy else s.temperature for s in sampling]
        logits = logits / torch.tensor(temperatures, device=logits.device)[:, None]
    logprobs = torch.log_softmax(logits, dim=-1)
    if all(s.is_greedy for s in sampling):
        tokens = logits.argmax(dim=-1)
    else:
        probs = logprobs.exp()
        if any(s.is_cut for s in sampling):
            probs = cut(probs, sampling)
        tokens = torch.multinomial(probs, num_samples=1, generator=generator)[:, 0]
        if any(s.is_greedy for s in sampling):
            greedy = torch.tensor([s.is_greedy for s in sampling], device=logits.device)
            tokens = torch.where(greedy, logits.argmax(dim=-1), tokens)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def cut(probs: Tensor, sampling: Sequence[Sampling]) -> Tensor:
    """Zero what top-k, top-p and min-p exclude, each judged on the whole distribution; the likeliest token always stays.

    Args:
        probs: [rows, vocab] fp32, rows sum to 1.
        sampling: one per row.

    Returns:
        [rows, vocab], not renormalised.
    """
    device, vocab = probs.device, probs.shape[-1]
    top_k = torch.tensor([s.top_k if s.top_k > 0 else vocab for s in sampling], device=device)[:, None]
    top_p = torch.tensor([s.top_p for s in sampling], device=device)[:, None]
    min_p = torch.tensor([s.min_p for s in sampling], device=device)[:, None]
    ordered, places = probs.sort(dim=-1, descending=True)
    before = ordered.cumsum(dim=-1) - ordered
    dropped = (torch.arange(vocab, device=device) >= top_k) | (before > top_p) | (ordered < ordered[:, :1] * min_p)
    dropped[:, 0] = False
    return torch.zeros_like(probs).scatter_(1, places, ordered.masked_fill(dropped, 0.0))


def check_internals() -> None:
    """Compare the private API that this module uses with the installed transformers.

    Raises:
        ConfigError: something is missing or takes other parameters; names it and both versions.
    """
    try:
        from transformers.generation.continuous_batching import cache, continuous_api, model_runner, requests, scheduler
        from transformers.generation.continuous_batching.cache_allocators import cache_allocator
    except ImportError as error:
        raise _incompatible(str(error)) from error
    manager, processor = continuous_api.ContinuousBatchingManager, continuous_api.ContinuousBatchProcessor
    expected: list[tuple[Any, str, list[str]]] = [
        (manager, "_create_batch_processor", []),
        (processor, "prepare_next_batch", []),
        (processor, "_generation_step", ["model"]),
        (processor, "update_batch", []),
        (model_runner.ModelRunner, "_sample", ["scores", "output_ids"]),
        (scheduler.Scheduler, "add_waiting_request", ["state"]),
        (scheduler.Scheduler, "finish_request", ["request_id"]),
        (scheduler.Scheduler, "set_request_cancellation", ["request_id"]),
        (scheduler.Scheduler, "clear_cancelled_requests", []),
        (cache.PagedAttentionCache, "search_prefix_match", ["request_id", "prompt_ids"]),
        (cache.PagedAttentionCache, "mark_complete_blocks", ["state", "complete_blocks"]),
        (cache_allocator.CacheAllocator, "mark_complete_blocks", ["request_id", "token_ids", "new_new_blocks"]),
        (cache.PagedAttentionCache, "evict_cached_blocks", []),
        (cache.PagedAttentionCache, "compute_free_capacity", ["relative"]),
        (requests.RequestState, "create_equivalent_initial_request", []),
    ]
    for owner, name, parameters in expected:
        found = getattr(owner, name, None)
        if found is None:
            raise _incompatible(f"{owner.__name__}.{name} is gone")
        actual = [parameter for parameter in inspect.signature(found).parameters if parameter != "self"]
        if actual != parameters:
            raise _incompatible(f"{owner.__name__}.{name} takes {actual}, not {parameters}")
    ledger = cache_allocator.BlockLedger()
    for name in ("hash_to_block", "block_to_hash", "cached_blocks"):
        if not isinstance(getattr(ledger, name, None), dict):
            raise _incompatible(f"BlockLedger.{name} is not a dict")


def _incompatible(what: str) -> ConfigError:
    return ConfigError(
        f"transformers {transformers.__version__} changed the continuous batching that the embedded engine is built on: {what}. "
        f"It was written for {WRITTEN_FOR}: install transformers {WRITTEN_FOR}.*, or serve with SGLang."
    )
