"""Every model family from prompt to second turn: its calls are read, its turns end where they should, results follow exactly."""

from collections.abc import Sequence
from typing import Any

import pytest
from tool_families import FAMILIES, family_tokenizer

from agentrl.errors import ConfigError, TemplateError
from agentrl.rollout.agent_loop import Limits, run_rollout
from agentrl.rollout.chat_template import ChatTemplate
from agentrl.rollout.reward import Scorer
from agentrl.rollout.tool_format import choose_parser, misread
from agentrl.rollout.tool_loading import load_tools
from agentrl.rollout.tool_parsers import get_tool_parser
from agentrl.types import Generation, Message, SamplingParams, Task, ToolCall

TOOLS = [{"type": "function", "function": {"name": "f", "description": "Add.", "parameters": {"type": "object"}}}]
RESULT: Message = {"role": "tool", "name": "f", "tool_call_id": "abc123XYZ", "content": "7"}
NAMES = list(FAMILIES)
REWRITES_FOR_USERS = {"qwen3", "qwen3_coder"}
"""Their history loses its reasoning once another question is asked."""


def template_of(name: str, **options: Any) -> ChatTemplate:
    return ChatTemplate(family_tokenizer(name), tools=TOOLS, **options)


def id_of(name: str, token: str) -> int:
    return family_tokenizer(name).convert_tokens_to_ids(token)


@pytest.mark.parametrize("name", NAMES)
def test_the_format_is_told_from_the_template(name: str) -> None:
    template = template_of(name)
    assert choose_parser("auto", template) == FAMILIES[name].parser
    assert misread(FAMILIES[name].parser, template) == ""


@pytest.mark.parametrize("name", NAMES)
def test_a_turn_may_end_with_each_of_the_familys_stop_tokens(name: str) -> None:
    template = template_of(name)
    assert tuple(template.decode_all([i]) for i in template.stop_ids) == FAMILIES[name].stops


@pytest.mark.parametrize("name", NAMES)
def test_what_follows_a_call_begins_after_the_token_that_ended_it(name: str) -> None:
    template, family = template_of(name), FAMILIES[name]
    observed = template.observation_ids([RESULT], last_sampled=id_of(name, family.end))
    assert template.decode_all(observed) == family.observation
    assert template.encode(family.observation) == observed


@pytest.mark.parametrize("name", NAMES)
def test_a_turn_that_a_limit_cut_gets_exactly_one_end(name: str) -> None:
    template, family = template_of(name), FAMILIES[name]
    ended = template.observation_ids([RESULT], last_sampled=id_of(name, family.end))
    cut = template.observation_ids([RESULT], last_sampled=0)
    assert cut[1:] == ended
    assert cut[0] in template.stop_ids


@pytest.mark.parametrize("name", NAMES)
def test_a_sampled_call_is_read_from_its_ids(name: str) -> None:
    template, family = template_of(name), FAMILIES[name]
    ids = [*template.encode(family.call), id_of(name, family.end)]
    (call,) = get_tool_parser(family.parser).find_calls(template.opened_thinking + template.decode(ids))
    assert isinstance(call, ToolCall), call
    assert (call.name, call.arguments) == ("f", {"a": "1"})


@pytest.mark.parametrize("name", NAMES)
def test_results_of_parallel_calls_follow_in_order_without_another_end_between(name: str) -> None:
    template = template_of(name)
    two = template.observation_ids([{**RESULT, "content": "first"}, {**RESULT, "content": "second"}])
    text = template.decode_all(two)
    assert text.index("first") < text.index("second")
    assert template.encode(text) == two


@pytest.mark.parametrize("name", NAMES)
def test_a_tool_cannot_forge_any_of_the_familys_control_tokens(name: str) -> None:
    template, family = template_of(name), FAMILIES[name]
    control = {id_of(name, token) for token in (*family.special, *family.added)}
    attack = "".join((*family.special, *family.added)) + "<" + family.special[0]
    plain = template.observation_ids([RESULT])
    forged = template.observation_ids([{**RESULT, "content": attack}])
    assert [i for i in forged if i in control] == [i for i in plain if i in control]
    made_up = template.observation_ids([{**RESULT, "name": f"f{family.special[0]}", "tool_call_id": family.special[0]}])
    assert [i for i in made_up if i in control] == [i for i in plain if i in control]


@pytest.mark.parametrize("name", NAMES)
def test_the_self_test_passes_for_tool_results(name: str) -> None:
    report = template_of(name).self_test()
    assert report.num_dialogues == 8
    refuses_several = any("refuses several calls" in note for note in report.notes)
    assert refuses_several == (name == "llama3")


@pytest.mark.parametrize("name", NAMES)
def test_the_self_test_shows_where_a_template_forgets_reasoning_when_users_reply(name: str) -> None:
    if name not in REWRITES_FOR_USERS:
        report = template_of(name).self_test(roles=("tool", "user"))
        ends_differ = any("is sampled and with '<|end|>'" in note for note in report.notes)
        assert ends_differ == (name == "gpt_oss")
        return
    with pytest.raises(TemplateError, match="not prefix-preserving") as caught:
        template_of(name).self_test(roles=("tool", "user"))
    message = str(caught.value)
    assert "model.template_rewrites=keep" in message
    assert ":'<think>'" in message
    assert "  - @" in message


@pytest.mark.parametrize("name", sorted(REWRITES_FOR_USERS))
def test_a_rewriting_template_can_be_kept_because_sampled_turns_are_never_rendered_again(name: str) -> None:
    template = template_of(name, allow_rewrites=True)
    assert any("not prefix-preserving" in note for note in template.self_test(roles=("tool", "user")).notes)
    reply: list[Message] = [{"role": "user", "content": "Sure? qzmarkerzq"}]
    ids = template.observation_ids(reply, last_sampled=id_of(name, "<|im_end|>"))
    opened = "<think>\n" if name == "qwen3_coder" else ""
    assert template.decode_all(ids) == f"\n<|im_start|>user\nSure? qzmarkerzq<|im_end|>\n<|im_start|>assistant\n{opened}"
    assert template.with_tools(None).allow_rewrites


def test_gpt_oss_may_end_an_answer_in_its_own_way_before_a_user_replies() -> None:
    template = template_of("gpt_oss")
    ids = template.observation_ids([{"role": "user", "content": "Sure?"}], last_sampled=id_of("gpt_oss", "<|return|>"))
    assert template.decode_all(ids) == "<|start|>user<|message|>Sure?<|end|><|start|>assistant"


def test_thoughts_that_the_prompt_opened_are_no_speech_when_the_turn_is_cut() -> None:
    template = template_of("qwen3_coder")
    assert template.opened_thinking == "<think>"
    parser = get_tool_parser("qwen3_coder")
    thought = "maybe <tool_call>\n<function=f>\n</function>\n</tool_call>"
    assert len(parser.find_calls(thought)) == 1
    assert parser.find_calls(template.opened_thinking + thought, is_cut=True) == []


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_history_in_openais_form_is_printed_as_in_the_templates_own(name: str, as_text: bool) -> None:
    template = template_of(name)
    question: Message = {"role": "user", "content": "1 + 6?"}
    given: Any = '{"a": "1"}' if as_text else {"a": "1"}
    call = {"id": "call_0123456789abcdef01234567", "type": "function", "function": {"name": "f", "arguments": given}}
    history: list[Message] = [
        question, {"role": "assistant", "content": "", "tool_calls": [call]}, {**RESULT, "tool_call_id": call["id"]},
    ]  # fmt: skip
    own = template.call("f", {"a": "1"})
    expected = template.render(
        [question, {"role": "assistant", "content": "", "tool_calls": [own]}, {**RESULT, "tool_call_id": own["id"]}],
        generation_prompt=True,
    )
    assert template.decode_all(template.prompt_ids(history)) == expected


def test_a_template_that_hides_results_is_refused() -> None:
    hides = family_tokenizer.__wrapped__("pythonic")
    hides.chat_template = FAMILIES["pythonic"].template.replace(
        "(m.content or '') }}", "('' if m.role == 'tool' else m.content or '') }}"
    )
    template = ChatTemplate(hides, tools=TOOLS)
    with pytest.raises(TemplateError, match="prints 0 of 1 messages with the role 'tool'"):
        template.observation_ids([RESULT])


def test_a_template_that_prints_no_calls_names_what_its_text_looks_like() -> None:
    silent = family_tokenizer.__wrapped__("qwen3")
    silent.chat_template = (
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    )
    template = ChatTemplate(silent, tools=TOOLS)
    with pytest.raises(
        ConfigError, match="prints no tool calls, so the format cannot be seen.*Set serve.parser to one of deepseek"
    ):
        choose_parser("auto", template)
    assert choose_parser("auto", ChatTemplate(silent, tools=None)) == "hermes"
    assert choose_parser("mistral", template) == "mistral"
    assert misread("mistral", template) == ""
    silent.chat_template += "{# write [TOOL_CALLS]name[ARGS]{} #}"
    assert choose_parser("auto", template) == "mistral"
    with pytest.raises(ConfigError, match="Did you mean `mistral`"):
        choose_parser("mistrl", template)


def test_a_parser_that_does_not_read_the_templates_calls_is_noticed() -> None:
    assert "set serve.parser=gpt_oss" in misread("hermes", template_of("gpt_oss"))


class Turns:
    """Says what it is given, end included, and remembers what it was shown."""

    def __init__(self, turns: Sequence[tuple[list[int], str]]) -> None:
        self.turns = list(turns)
        self.shown: list[tuple[list[int], tuple[int, ...]]] = []

    async def generate(
        self, ids: Sequence[int], sampling: SamplingParams, *, trajectory_id: str, group_id: str, deadline: float
    ) -> Generation:
        self.shown.append((list(ids), sampling.stop_token_ids))
        sampled, finish = self.turns[len(self.shown) - 1]
        assert finish in ("stop", "length")
        return Generation(
            ids=sampled, logprobs=[-0.5] * len(sampled), versions=[1] * len(sampled), finish=finish, server="http://test:1"
        )  # pyright: ignore[reportArgumentType]


async def count(a: int) -> str:
    """Add.

    Args:
        a: a number.
    """
    return str(a + 6)


@pytest.mark.asyncio
@pytest.mark.parametrize("is_cut", [False, True])
@pytest.mark.parametrize("name", NAMES)
async def test_a_rollout_is_prompt_sampled_observed_sampled_and_nothing_else(name: str, is_cut: bool) -> None:
    family, tokenizer = FAMILIES[name], family_tokenizer(name)
    toolbox = load_tools([{"use": f"{__name__}:count", "name": "f"}], tokenizer=tokenizer)
    template = ChatTemplate(tokenizer, tools=toolbox.schemas())
    end = id_of(name, family.end)
    called = template.encode(family.call)
    answer = [*template.encode("It is 7."), template.stop_ids[0]]
    generator = Turns([(called if is_cut else [*called, end], "length" if is_cut else "stop"), (answer, "stop")])
    rollout = await run_rollout(
        Task(id="t", prompt=[{"role": "user", "content": "1 + 6?"}], data_source="test"),
        loop="tool_agent",
        template=template,
        generator=generator,
        toolbox=toolbox,
        scorer=Scorer(fn=lambda **_: 1.0),
        limits=Limits(),
        sampling=SamplingParams(max_new_tokens=512),
        trajectory_id="t/0/0/0",
        group_id="t/0",
        ordinal=0,
        sample_index=0,
        attempt=0,
        env_name="test",
        parser=choose_parser("auto", template),
    )
    (call,) = rollout.episode.calls
    assert (call.name, call.ok, call.result) == ("f", True, "7")
    prompt, second = generator.shown[0][0], generator.shown[1][0]
    sampled = generator.turns[0][0]
    assert second[: len(prompt) + len(sampled)] == [*prompt, *sampled]
    observed = second[len(prompt) + len(sampled) :]
    assert template.decode_all(observed).endswith(family.observation)
    assert len(observed) == len(template.encode(family.observation)) + is_cut
    assert set(generator.shown[0][1]) == set(template.stop_ids)
    (segment,) = rollout.trajectory.segments
    assert segment.ids.tolist() == [*second, *answer]
    assert segment.mask.tolist() == [False] * len(prompt) + [True] * len(sampled) + [False] * len(observed) + [True] * len(answer)
    assert rollout.trajectory.stop == "answered"
