"""Every metric of ``metrics.jsonl``: what it means, and what should alarm whoever reads it.

Names are verl's where the meaning is the same, ours under ``agentrl/`` where it is not. ``docs/metrics.md`` is written from here:
``python -m agentrl.telemetry.metrics docs/metrics.md``. A test fails when the learner emits a name that is not declared.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric, or a family of them."""

    name: str
    """``a/{mean,max}`` stands for ``a/mean`` and ``a/max``; ``<term>`` for any word."""
    meaning: str
    alarm: str = ""
    """What is alarming; empty where nothing by itself is."""

    def names(self) -> Iterator[str]:
        """Each name of the family; ``<term>`` stays as it is."""
        match = re.search(r"\{([^}]*)\}", self.name)
        if match is None:
            yield self.name
            return
        for part in match[1].split(","):
            yield from Metric(self.name[: match.start()] + part + self.name[match.end() :], "").names()


@dataclass(frozen=True, slots=True)
class Chapter:
    title: str
    metrics: Sequence[Metric]


SPREAD = "{mean,max,min}"

CHAPTERS: Sequence[Chapter] = (
    Chapter("Where the run is", (
        Metric("step", "Steps made, which is the version of the policy that this step produced."),
        Metric("policy_version", "The same number, as servers know it."),
        Metric("training/global_step", "The same number, under verl's name."),
        Metric("update/applied", "Share of this step's updates that changed the policy.", "below 1 without a warm-up"),
        Metric("update/skipped", "1 when the policy's weights did not change in this step.", "often 1: nothing to train on, or non-finite gradients"),
        Metric("update/nonfinite", "Share of this step's updates whose gradients were not finite.", "ever above 0"),
        Metric("update/skipped_total", "Updates skipped for non-finite gradients since the run began.", "growing"),
    )),
    Chapter("What the rollouts earned", (
        Metric("reward/mean", "Mean reward of all finished trajectories that this step consumed, trained or not.", "flat from the start, or falling"),
        Metric("reward/<term>/mean", "Mean of one named reward term.", "a shaping term that rises while `correct` does not: it is being gamed"),
        Metric(f"critic/rewards/{SPREAD}", "The same rewards: mean and extremes."),
        Metric("frac_reward_zero_std", "Share of groups whose rewards are all equal: no signal.", "near 1: tasks too easy or too hard"),
        Metric("agentrl/overlong/penalty_mean", "Mean length penalty added to the reward (0 or less).", "growing away from 0: answers run into the limit"),
        Metric("agentrl/overlong/fraction", "Share of trajectories with a length penalty."),
        Metric("agentrl/greedy_baseline/mean", "Mean reward of the greedy rollouts that remax compares with, one per trained trajectory's group."),
        Metric(f"critic/advantages/{SPREAD}", "Advantages over trained tokens.", "extremes far beyond 10: a group with almost no spread"),
        Metric(f"critic/returns/{SPREAD}", "Returns over trained tokens, before whitening."),
    )),
    Chapter("What the rollouts look like", (
        Metric(f"response_length/{SPREAD}", "Sampled tokens per trajectory; tool output does not count.", "collapse towards 0, or growth without reward"),
        Metric("response_length/clip_ratio", "Share of trajectories cut off by the token limit.", "above 0.2: raise `serve.tokens`, or set `learn.overlong`"),
        Metric(f"prompt_length/{SPREAD}", "Tokens of the prompt."),
        Metric(f"num_turns/{SPREAD}", "Generations per trajectory.", "mean falling to 1: the model stopped using its tools"),
        Metric(f"tool_call_counts/{SPREAD}", "Tool calls per trajectory.", "mean falling to 0"),
        Metric("tools/failure_frequency", "Share of tool calls that did not succeed.", "rising"),
        Metric("tools/<name>/calls", "Calls of one tool since the last step, over all serve processes; the counts and rates below likewise."),
        Metric("tools/<name>/infra_error_rate", "Share of them that failed outside the model's control. These rollouts are not trained on.", "above 0.05: repair the tool's service; see `max_infra_error_rate`"),
        Metric("tools/<name>/{model_error_rate,timeout_rate}", "Share of them that the model got wrong, or that ran too long.", "rising"),
        Metric("tools/<name>/{retries,cache_hits}", "Attempts that were repeated, and calls answered from the cache."),
        Metric("tools/<name>/p99_ms", "99th percentile of the latest calls' time, of the slowest process.", "near the tool's `timeout_s`"),
        Metric("tools/<name>/circuit_open", "1 while new rollouts wait for this tool.", "ever 1"),
        Metric("agentrl/stop/<reason>", "Share of trajectories that ended for this reason.", "`deadline`, `aborted` or `error:…` above a few percent"),
    )),
    Chapter("The policy's update", (
        Metric("actor/loss", "What was minimised: policy loss, KL and entropy terms."),
        Metric("actor/pg_loss", "The policy loss alone. Its size says little; with ratio 1 it is minus the mean advantage."),
        Metric("actor/grad_norm", "Gradient norm before clipping, over all ranks.", "spikes, or always above `learn.grad_clip`"),
        Metric("actor/lr", "Learning rate of the last update."),
        Metric("actor/entropy", "Mean entropy of trained tokens, in nats, at the sampler's temperature.", "falling to near 0 (collapse), or rising without end"),
        Metric("actor/ppo_kl", "Mean log old - log current: how far the update moved, or with the rollout's logprobs how stale the data are.", "above 0.1"),
        Metric("actor/pg_clipfrac", "Share of tokens whose ratio was clipped (or masked, or dropped: see the loss).", "above 0.3: data too stale, or the rate too high"),
        Metric("actor/pg_clipfrac_lower", "Share of tokens where the dual clip (or the loss's second bound) acted.", "above 0.01"),
        Metric("actor/kl_loss", "KL to the reference as the loss has it.", "growing without bound"),
        Metric("actor/kl_coef", "The KL's coefficient in this step, as the controller left it.", "growing by orders of magnitude"),
        Metric("actor/reward_kl_penalty", "Mean KL to the reference that was taken off the rewards, before its coefficient.", "growing without bound"),
        Metric("actor/reward_kl_penalty_coeff", "Its coefficient, under verl's name."),
        Metric("actor/mismatch_kl", "`prime_rl`: k3 KL between rollout and current policy.", "above 0.1"),
        Metric("actor/is_weight_mean", "`reinforce`: mean importance weight current / rollout.", "far from 1"),
        Metric("actor/behav_kl", "`decoupled_ppo`: mean log behaviour - log proximal.", "above 0.1"),
        Metric("actor/behav_weight_mean", "`decoupled_ppo`: mean weight proximal / behaviour.", "far from 1"),
        Metric("actor/behav_capped_fraction", "`decoupled_ppo`: share of tokens whose weight was capped.", "above 0.05"),
    )),
    Chapter("The critic", (
        Metric(f"critic/values/{SPREAD}", "Values of trained tokens before the step.", "outside the range of returns"),
        Metric("critic/vf_loss", "Half the (clipped) squared error of the values.", "not falling in the warm-up"),
        Metric("critic/vf_clipfrac", "Share of values whose clipped error was the larger one.", "above 0.5: raise `learn.critic.clip`, or lower its rate"),
        Metric("critic/vf_explained_var", "1 - variance of the error / variance of the returns.", "negative after the warm-up: worse than a constant"),
        Metric("critic/grad_norm", "Gradient norm before clipping.", "spikes"),
        Metric("critic/lr", "Learning rate of the last update."),
        Metric("critic/nonfinite", "Share of this step's critic updates whose gradients were not finite.", "ever above 0"),
    )),
    Chapter("Rollout policy against trained policy", (
        Metric(f"training/off_policy/trajectory_staleness/{SPREAD}", "Policy versions between a trajectory's oldest token and the learner.", "max at `learn.max_staleness`: data are being dropped"),
        Metric("training/rollout_probs_diff_{mean,max,std}", "|probability by the learner - by the sampler| per token.", "mean above 0.01 on fresh data: the engine computes something else"),
        Metric("rollout_corr/turn_logprob_diff_{mean,max}", "Mean |logprob by the learner - by the sampler| of each model turn (a run of sampled tokens); the mean and the largest over turns.", "max far above mean on fresh data: single turns were trained on another context, or by other weights, than they were sampled with"),
        Metric("rollout_corr/turn_logprob_diff_fraction_high", "Share of turns where that mean exceeds 0.1 nats per token.", "above 0.01 on fresh data"),
        Metric("rollout_corr/{kl,k3_kl}", "KL(rollout || trained) per token, by k1 and k3.", "above 0.1; negative kl with a large k3_kl"),
        Metric("rollout_corr/{training_ppl,training_log_ppl,rollout_ppl,rollout_log_ppl}", "Perplexity of the sampled tokens under both policies, per trajectory."),
        Metric("rollout_corr/{log_ppl_diff,log_ppl_abs_diff,log_ppl_diff_max,log_ppl_diff_min,ppl_ratio}", "Their difference (training - rollout) and ratio.", "ppl_ratio far from 1"),
        Metric("rollout_corr/{chi2_token,chi2_seq}", "Mean squared ratio - 1 per token and per trajectory: the variance of plain importance sampling.", "chi2_token above 1"),
        Metric("rollout_corr/rollout_is_{mean,std,max,min}", "Importance weights as they act.", "mean below 0.5"),
        Metric("rollout_corr/rollout_is_eff_sample_size", "Kish's effective share of the tokens, 0 to 1.", "below 0.3: few tokens decide the step"),
        Metric("rollout_corr/rollout_is_{ratio_fraction_high,ratio_fraction_low,oob_ratio}", "Shares of raw weights beyond the bounds.", "above 0.1"),
        Metric("rollout_corr/rollout_is_seq_{mean,std,max,min,max_deviation,fraction_high,fraction_low}", "The same per trajectory."),
        Metric("rollout_corr/rollout_is_batch_norm_factor", "Mean weight that all were divided by.", "far from 1"),
        Metric("rollout_corr/rollout_rs_{masked_fraction,seq_masked_fraction}", "Share of tokens, and of trajectories that lost a token, rejected by all rules together.", "above 0.3"),
        Metric("rollout_corr/rollout_rs_<rule>_{mean,std,max,min,fraction_high,fraction_low,masked_fraction,seq_masked_fraction}", "One rule's statistic and what it alone rejects."),
    )),
    Chapter("What became of the data", (
        Metric("agentrl/groups/{consumed,trained,dropped,requeued}", "Groups this step consumed, by what became of them; `requeued` are given back to be sampled again, and among the dropped.", "dropped near consumed"),
        Metric("agentrl/groups/effective_size/mean", "Finished trajectories per group.", "well below `serve.n`: rollouts fail"),
        Metric("agentrl/groups/consumed_total", "Groups consumed since the run began."),
        Metric("agentrl/trajectories/{trained,filtered,stale,failed,over_stale}", "Trajectories by how they ended; `over_stale` counts those beyond the bound, whatever the policy did with them.", "failed above a few percent; stale above 0 for long"),
        Metric("agentrl/trajectories/{trained,filtered,stale,failed}_total", "The same since the run began."),
        Metric("agentrl/tokens/{trained,filtered,stale,failed}", "Sampled tokens by how their trajectory ended."),
    )),
    Chapter("Time and throughput", (
        Metric("timing_s/step", "Seconds of the step, without waiting, publishing and checkpoints."),
        Metric("timing_s/{share,old_log_prob,adv,update}", "Its parts: handing the batch to all ranks; frozen forward passes; advantages and corrections; forward, backward and optimizer."),
        Metric("timing_s/wait", "Seconds until the batch was complete.", "above timing_s/step: rollouts are the bottleneck"),
        Metric("timing_s/publish", "Seconds to write and announce the new weights."),
        Metric("timing_s/checkpoint", "Seconds that training waited for the checkpoint before this step, where there was one."),
        Metric("perf/total_num_tokens", "Tokens of trained trajectories, prompts and tool output included."),
        Metric("perf/throughput", "Those tokens per second of the step and per rank."),
    )),
    Chapter("Supervised fine-tuning", (
        Metric("sft/loss", "Mean negative logprob per assistant token."),
        Metric("sft/tokens", "Tokens of the batch."),
    )),
)  # fmt: skip
"""In the order in which a reader asks."""


def is_declared(name: str) -> bool:
    """Whether a metric of this name is described here."""
    return any(pattern.fullmatch(name) for pattern in _patterns())


def undeclared(names: Sequence[str]) -> list[str]:
    """Those of the names that nothing here describes, sorted."""
    return sorted(name for name in names if not is_declared(name))


def markdown() -> str:
    """The page ``docs/metrics.md``."""
    lines = [
        "# Metrics",
        "",
        "What each number in `metrics.jsonl` (and in TensorBoard or W&B) means and what is alarming about it. Written by",
        "`python -m agentrl.telemetry.metrics docs/metrics.md` from `agentrl/telemetry/metrics.py`; change it there. Names are verl's",
        "where the meaning is the same. A metric that does not apply to a run (a critic's, say) is absent, not zero.",
    ]
    for chapter in CHAPTERS:
        lines += ["", f"## {chapter.title}", "", "| Metric | Meaning | Alarming |", "|---|---|---|"]
        lines += [
            "| " + " | ".join(_cell(text) for text in (f"`{metric.name}`", metric.meaning, metric.alarm)) + " |"
            for metric in chapter.metrics
        ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


@lru_cache(maxsize=1)
def _patterns() -> list[re.Pattern[str]]:
    names = [name for chapter in CHAPTERS for metric in chapter.metrics for name in metric.names()]
    return [re.compile(re.sub(r"<\w+>", r"[^/]+", re.escape(name))) for name in names]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(markdown(), encoding="utf-8")
