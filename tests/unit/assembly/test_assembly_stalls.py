"""The doctor's judgement on made-up facts: the cause is named, not its effects, and health is not mistaken for a stall."""

from dataclasses import replace
from typing import Any

from agentrl.assembly.stalls import ProcessView, Snapshot, StreamView, Verdict, diagnose, judge

ENGINE = {"url": "http://e:1", "state": "ready", "reason": ""}


def alive(pid: int = 7, **changes: Any) -> ProcessView:
    return replace(ProcessView(pid=pid, alive=True, age_s=500.0), **changes)


def serve(quiet_s: float = 0.0, **changes: Any) -> dict[str, Any]:
    return {
        "pid": 8, "quiet_s": quiet_s, "finished_s": quiet_s, "waits": {}, "engines": [ENGINE], "tools": {}, "failing": "",
        "oldest_rollout": "t/1/0/0", "oldest_rollout_s": quiet_s, **changes,
    }  # fmt: skip


def learn(quiet_s: float = 0.0, doing: str = "group", **changes: Any) -> dict[str, Any]:
    waits = {doing: {"count": 1, "oldest_s": quiet_s}} if doing in ("group", "stream") else {}
    return {"pid": 9, "policy_version": 3, "doing": doing, "quiet_s": quiet_s, "waits": waits, **changes}


def wait(reason: str, oldest_s: float, count: int = 4) -> dict[str, dict[str, float]]:
    return {reason: {"count": count, "oldest_s": oldest_s}, "capacity": {"count": 9, "oldest_s": oldest_s + 50}}


def snapshot(**changes: Any) -> Snapshot:
    healthy = Snapshot(
        limit_s=60.0,
        num_steps=10,
        processes={"run": alive(6), "serve": alive(8), "learn": alive(9), "redis": alive(5)},
        serve=serve(),
        learn=learn(),
        stream=StreamView(url="unix:///s", persistence="always"),
        last_run_event="run_started",
    )
    return replace(healthy, **changes)


def stage(verdict: Verdict) -> tuple[str, str]:
    assert (verdict.state, verdict.level) == ("stalled", "fail"), verdict
    assert verdict.fix, "a stall without a cure"
    return verdict.stage, verdict.waits_for


def test_a_healthy_run_moves_whichever_side_is_faster() -> None:
    assert judge(snapshot()).state == "moves"
    behind = snapshot(serve=serve(900, waits=wait("trainer", 900)), learn=learn(10, "step"))
    assert judge(behind).state == "moves"
    assert "learner is the bottleneck" in judge(behind).text
    ahead = snapshot(serve=serve(5, waits=wait("server", 55)), learn=learn(900))
    assert judge(ahead).state == "moves", "long waits of learn are no stall while rollouts finish"


def test_a_finished_run_is_finished_and_an_unfinished_one_says_how_it_ended() -> None:
    dead = {"learn": ProcessView(pid=9, alive=False)}
    finished = judge(snapshot(processes=dead, complete=True, last_run_event="run_ended"))
    assert (finished.state, finished.level) == ("finished", "ok")
    drained = judge(snapshot(processes={}, last_run_event="run_ended"))
    assert (drained.state, drained.level, drained.text) == ("stopped", "warn", "stopped at step 3 of 10")
    assert judge(snapshot(processes={}, last_run_event="run_failed")).level == "fail"
    killed = judge(snapshot(processes={}, last_run_event="run_started"))
    assert (killed.level, "supervisor was killed" in killed.text) == ("fail", True)


def test_what_is_dead_or_silent_comes_before_what_waits_for_it() -> None:
    waiting = learn(300)
    alone = {"serve": ProcessView(pid=8, alive=False), "learn": alive(9)}
    assert stage(judge(snapshot(processes=alone, learn=waiting, serve_age_s=300))) == ("serve", "a start")
    silent = snapshot(serve_age_s=40.0, learn=waiting)
    assert stage(judge(silent)) == ("serve", "itself")
    stopped = {**snapshot().processes, "serve": alive(8, stopped=True)}
    assert judge(replace(silent, processes=stopped)).fix == "kill -CONT 8"
    down = replace(silent, stream=StreamView(url="unix:///s", error="ConnectionError"))
    assert stage(judge(down)) == ("stream", "redis")


def test_a_child_that_the_supervisor_is_restarting_is_no_stall_until_it_takes_too_long() -> None:
    gone = {"run": alive(6), "learn": alive(9), "serve": ProcessView(pid=8, alive=False)}
    fresh = snapshot(processes=gone, serve_age_s=4.0, missing_s={"serve": 3.0})
    assert judge(fresh).state == "starting"
    assert stage(judge(replace(fresh, serve_age_s=95.0, missing_s={"serve": 90.0}))) == ("serve", "its restart")


def test_a_process_whose_status_is_of_its_dead_predecessor_is_starting() -> None:
    young = {**snapshot().processes, "serve": alive(88, age_s=5.0)}
    assert judge(snapshot(processes=young, serve_age_s=300.0)).state == "moves"
    old = {**snapshot().processes, "serve": alive(88, age_s=400.0)}
    assert stage(judge(snapshot(processes=old, serve_age_s=300.0))) == ("serve", "its start")


def test_engines_are_told_apart_from_weights_tools_and_scorers() -> None:
    bad = [{**ENGINE, "state": "quarantined", "reason": "reports 'base'"}, {**ENGINE, "state": "unhealthy", "reason": "refused"}]
    none_usable = snapshot(serve=serve(100, engines=bad, waits=wait("server", 100)), learn=learn(100))
    assert stage(judge(none_usable)) == ("engine", "a usable engine")
    assert "reports 'base'" in judge(none_usable).text
    cases = {"server": "engine", "tool:code": "tool:code", "reward": "reward", "weights": "weights", "stream": "learn"}
    cases |= {"env:Game": "env:Game", "agent": "agent"}
    for reason, expected in cases.items():
        verdict = judge(snapshot(serve=serve(100, waits=wait(reason, 90)), learn=learn(100)))
        assert stage(verdict)[0] == expected, reason
        assert verdict.oldest_rollout == "t/1/0/0"
    inside = {**wait("agent", 300), **wait("server", 90)}
    assert stage(judge(snapshot(serve=serve(100, waits=inside), learn=learn(100))))[0] == "engine"


def test_tokens_that_come_to_nothing_are_no_progress() -> None:
    circuit = {"code": {"circuit_open": 1.0, "calls": 30, "infra_errors": 28}}
    tool = snapshot(serve=serve(1, finished_s=100.0, tools=circuit, waits=wait("tool:code", 2)), learn=learn(100))
    assert stage(judge(tool))[0] == "tool:code"
    assert "28 of its 30 calls" in judge(tool).text
    scorer = snapshot(serve=serve(1, finished_s=100.0, failing="reward", failed={"reward": 40}), learn=learn(100))
    assert stage(judge(scorer)) == ("reward", "an end of reward failures")


def test_a_step_without_end_is_the_learners() -> None:
    verdict = judge(snapshot(learn=learn(200, "step"), serve=serve(150, waits=wait("trainer", 150))))
    assert stage(verdict) == ("learn", "step")
    assert verdict.since_s == 200


def test_both_sides_waiting_for_each_other_is_a_stall_of_serve() -> None:
    verdict = judge(snapshot(learn=learn(200, "group"), serve=serve(200, waits={"trainer": {"count": 1, "oldest_s": 200}})))
    assert stage(verdict) == ("serve", "the trainer")
    assert "audit" in verdict.fix


def test_parts_that_are_not_as_they_should_be_are_reported_while_the_run_moves() -> None:
    circuit = {"code": {"circuit_open": 1.0}}
    engines = [ENGINE, {**ENGINE, "url": "http://e:2", "state": "quarantined", "reason": "restarted"}]
    findings = diagnose(
        snapshot(
            serve=serve(0, engines=engines, tools=circuit),
            stream=StreamView(url="redis://h", persistence="everysec"),
            processes={**snapshot().processes, "engine-1": alive(11, stopped=True)},
        )
    )
    assert findings[0].subject == "run"
    assert findings[0].level == "ok"
    warned = {f.subject: f.text for f in findings if f.level == "warn"}
    assert set(warned) == {"stream", "engine", "engine-1", "tool:code"}
    assert "2 s of acknowledged entries" in warned["stream"]
    assert "http://e:2 is quarantined: restarted" in warned["engine"]


def test_a_full_disk_is_the_cause_of_whatever_stands_still_because_of_it() -> None:
    down = StreamView(url="unix:///s", error="ConnectionError: refused")
    full = judge(snapshot(stream=down, free_bytes=1 << 20))
    assert stage(full) == ("disk", "free space")
    assert "1.0 MiB are left" in full.text
    assert "gives no answer" in full.text
    assert judge(snapshot(free_bytes=1 << 20)).state == "moves", "what moves is no stall"
    assert stage(judge(snapshot(stream=down, free_bytes=1 << 30)))[0] == "stream"
    halted = {**snapshot().processes, "redis": ProcessView(pid=5, alive=True, stopped=True)}
    assert stage(judge(snapshot(processes=halted, free_bytes=0)))[0] == "stream", "a halted process is halted by somebody"


def test_requests_that_wait_for_an_update_wait_for_weights() -> None:
    def updating(*states: str) -> Verdict:
        engines = [{"url": f"http://{n}", "state": state} for n, state in enumerate(states)]
        return judge(snapshot(serve=serve(300, waits=wait("server", 300), engines=engines)))

    assert stage(updating("updating", "updating")) == ("weights", "an update of the engines")
    assert stage(updating("updating", "ready")) == ("engine", "tokens")


def test_a_policy_that_no_server_could_load_is_named_with_what_is_served_instead() -> None:
    problem = {"label": "e1-v5", "error": "holds NaN", "serving": "e1-v4", "behind": 1, "tries": 2}
    findings = diagnose(snapshot(serve=serve(0, policy={"target": "e1-v4", "rollbacks": 1, "problem": problem})))
    (finding,) = [f for f in findings if f.subject == "weights"]
    assert finding.level == "warn"
    assert "no server could load e1-v5 (holds NaN); e1-v4 is served instead" in finding.text
    healthy = diagnose(snapshot(serve=serve(0, policy={"target": "e1-v5", "rollbacks": 1, "problem": None})))
    assert not [f for f in healthy if f.subject == "weights"]
