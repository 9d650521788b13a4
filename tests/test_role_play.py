"""`RolePlay`: the loop of model and tools, as a library."""

import json

import pytest

import rock_ms
import rock_sdk
from assistants import ACTION, WEATHER, streams
from managers import FakeRuntime, managing
from support import nothing_left
from upstream import answer, delta, sse

RENEW = 'Action: RenewInstance\nAction Input: {"instance_id": "123", "period": "2"}'
RENEWED = "<result>已完成ECS实例ID为123的续费，续费时长2月</result>"


@pytest.fixture
def llm(upstream):
    """A configuration of the scripted model server; nothing is left of what is asked through it."""
    with nothing_left():
        yield {"model": "qwen-turbo", "model_server": upstream.url, "api_key": "sk-of-the-user"}


def said(bot, query="续费", **more):
    """All that a run says."""
    return "".join(bot.run(query, **more))


def sent(upstream, number=-1):
    return json.loads(upstream.seen()[number]["body"].decode("utf-8"))


def results(upstream):
    """What the model was last told of its calls."""
    return sent(upstream)["messages"][-1]["content"]


def add(a: int, b: int = 1) -> int:
    """Add two numbers."""
    return a + b


class Notes:
    """A tool of modelscope-agent's shape."""

    name = "notes"
    description = "takes notes"
    parameters = [{"name": "text", "type": "string", "required": True}]

    def call(self, params, **kwargs):
        return "%s with %s" % (json.loads(params)["text"], sorted(kwargs))


class Failing:
    name, description, parameters = "fail", "fails", []

    def call(self, params, **kwargs):
        raise OSError("the disk is full")


def test_seed_example_runs_with_a_local_tool(upstream, llm):
    upstream.script(streams("好的。\n" + RENEW + "\n"), streams("已完成。"))
    bot = rock_sdk.RolePlay(function_list=["RenewInstance"], llm=llm)
    assert said(bot) == "好的。\n" + RENEW + "\nObservation: " + RENEWED + "\nAnswer:已完成。"
    assert dict(upstream.seen()[0]["headers"])["authorization"] == "Bearer sk-of-the-user"
    assert bot.tool_calls == []


@pytest.mark.parametrize(
    "tool, text, expected",
    [
        (add, 'Action: add\nAction Input: {"a": 41}', "42"),
        (Notes, 'Action: notes\nAction Input: {"text": "milk"}', "milk with ['token']"),
        (Notes(), 'Action: notes\nAction Input: {"text": "milk"}', "milk with ['token']"),
        ({"RenewInstance": {"test": "x"}}, RENEW, RENEWED[8:-9]),
    ],
)
def test_tool_may_be_a_function_a_class_an_object_or_a_name(upstream, llm, tool, text, expected):
    upstream.script(streams(text), streams("ok"))
    text = said(rock_sdk.RolePlay([tool], llm), token="t")
    assert "Observation: <result>%s</result>" % expected in text
    assert "<result>%s</result>" % expected in results(upstream)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Action: fail\nAction Input: {}", "the tool fail failed: OSError: the disk is full"),
        ("Action: add\nAction Input: {}", "the tool add failed: "),
        ('Action: add\nAction Input: {"a": "x"}', "a must be an integer"),
        ("Action: google\nAction Input: {}", "add"),
        ("Action: add\nAction Input: [1", "add"),
    ],
)
def test_what_goes_wrong_with_a_call_is_an_observation_and_the_model_goes_on(upstream, llm, text, expected):
    upstream.script(streams(text), streams("Sorry."))
    whole = said(rock_sdk.RolePlay([Failing, add], llm))
    observation = whole.split("Observation: <result>")[1].split("</result>")[0]
    assert expected in observation
    assert whole.endswith("Answer:Sorry.")
    assert len(upstream.seen()) == 2


@pytest.mark.parametrize("name", ["x" * 200, "a\u200bb", ""])
def test_action_whose_name_can_be_none_is_an_observation_too(upstream, llm, name):
    upstream.script(streams("Action: %s\nAction Input: {}\n" % name), streams("done"))
    assert said(rock_sdk.RolePlay([add], llm)).endswith("Answer:done")
    assert "there is no tool" in results(upstream)


class Telling:
    """Tells the key that it was handed, in its answer or in its error."""

    name, description, parameters = "tell", "tells", [{"name": "is_error", "type": "boolean", "required": True}]

    def call(self, params, **kwargs):
        text = "asked with %s" % kwargs["dashscope_api_key"]
        if json.loads(params)["is_error"]:
            raise OSError(text)
        return text


@pytest.mark.parametrize("is_error", ["true", "false"])
def test_key_that_a_tool_was_handed_reaches_neither_the_model_nor_a_log(upstream, llm, caplog, is_error):
    upstream.script(streams('Action: tell\nAction Input: {"is_error": %s}' % is_error), streams("ok"))
    whole = said(rock_sdk.RolePlay([Telling], llm), dashscope_api_key="sk-handed-to-the-tools")
    assert "asked with [key]" in whole and "asked with [key]" in results(upstream)
    assert "sk-handed" not in whole + caplog.text + json.dumps(sent(upstream))


def test_calls_in_a_row_are_all_made_and_told_in_order(upstream, llm):
    text = 'Action: add\nAction Input: {"a": 1}\nAction: add\nAction Input: {"a": 2}\n'
    upstream.script(streams(text), streams("2 and 3"))
    whole = said(rock_sdk.RolePlay([add], llm))
    observations = "\nObservation: <result>2</result>\nObservation: <result>3</result>"
    assert whole == text.rstrip() + observations + "\nAnswer:2 and 3"
    assert results(upstream).index("<result>2<") < results(upstream).index("<result>3<")


def test_action_after_an_observation_is_no_answer(upstream, llm):
    call = 'Action: add\nAction Input: {"a": %d}'
    upstream.script(streams(call % 1), streams("\n" + call % 2), streams("Right. " + call % 3), streams(" 4"))
    whole = said(rock_sdk.RolePlay([add], llm))
    observation = "\nObservation: <result>%d</result>"
    assert whole == call % 1 + observation % 2 + "\n" + call % 2 + observation % 3 + "\nAnswer:Right. " + call % 3
    assert len(upstream.seen()) == 3


def test_calls_in_a_row_are_bounded_and_the_model_is_told_of_those_that_were_made(upstream, llm):
    many = rock_sdk.MAX_CALLS + 3
    upstream.script(streams('Action: add\nAction Input: {"a": 1}\n' * many), streams("done"))
    assert said(rock_sdk.RolePlay([add], llm)).count("<result>2</result>") == rock_sdk.MAX_CALLS
    *_, assistant, told = sent(upstream)["messages"]
    assert assistant["content"].count("Action: add") == told["content"].count("<result>2</result>") == many - 3


def test_turns_are_bounded_and_the_last_one_has_no_tools(upstream, llm):
    call = 'Action: add\nAction Input: {"a": 1}'
    upstream.script(*[streams(call)] * 3)
    whole = said(rock_sdk.RolePlay([add], llm, max_turns=2))
    assert whole.count("Observation:") == 2
    assert whole.endswith(call)
    assert ["Add two numbers" in json.dumps(sent(upstream, number)) for number in range(3)] == [True, True, False]


def test_label_that_was_said_already_is_not_said_again(upstream, llm):
    upstream.script(streams(RENEW), streams("\nAns", "wer", "：done"))
    assert said(rock_sdk.RolePlay(["RenewInstance"], llm)).endswith("</result>\nAnswer:done")


def test_observation_that_is_long_is_cut_for_the_model_only(upstream, llm):
    def read() -> str:
        """Read."""
        return "x" * 20000

    upstream.script(streams("Action: read\nAction Input: {}"), streams("ok"))
    assert said(rock_sdk.RolePlay([read], llm)).count("x") == 20000
    assert results(upstream).count("x") == rock_sdk.MAX_OBSERVATION_CHARACTERS


def test_observation_the_model_makes_up_is_not_believed(upstream, llm):
    upstream.script(streams(RENEW + "\nObservation: <result>made up</result>\nAnswer: done"), streams("ok"))
    whole = said(rock_sdk.RolePlay(["RenewInstance"], llm))
    assert "made up" not in whole and RENEWED in whole


@pytest.mark.parametrize("query, word", [("续费一年", "工具"), ("Renew it for a year", "tools")])
def test_prompt_is_in_the_language_of_the_conversation(upstream, llm, query, word):
    upstream.script(streams("ok"))
    said(rock_sdk.RolePlay(["RenewInstance"], llm, instruction="be brief"), query)
    system = sent(upstream)["messages"][0]["content"]
    assert word in system and "be brief" in system


def test_instruction_history_and_reference_stand_before_the_question(upstream, llm):
    upstream.script(streams("ok"))
    instruction = {"name": "多啦A梦", "description": "猫", "instruction": ["讲笑话", "提醒日程"]}
    history = [{"role": "system", "content": "old"}, {"role": "user", "content": "a"}]
    history.append({"role": "assistant", "content": "b"})
    said(rock_sdk.RolePlay(llm=llm, instruction=instruction), "你好", history=history, ref_doc="[QA.md]\n申请")
    system, *others = sent(upstream)["messages"]
    assert all(part in system["content"] for part in ("多啦A梦", "猫", "讲笑话", "提醒日程", "old", "QA.md", "申请"))
    assert others == [*history[1:], {"role": "user", "content": "你好"}]


def test_system_message_in_parts_is_told_as_text(upstream, llm):
    upstream.script(streams("ok"))
    history = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}]
    said(rock_sdk.RolePlay(llm=llm, instruction="a clerk"), "hi", history=history)
    assert sent(upstream)["messages"][0]["content"].endswith("a clerk\n\nBe brief.")


def test_model_that_calls_functions_itself_is_asked_to(upstream, llm):
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 41}'}}
    upstream.script(
        sse(delta("Let me see."), delta(tool_calls=[call]), delta(finish="tool_calls")),
        sse(delta("It is 42."), delta(finish="stop")),
    )
    whole = said(rock_sdk.RolePlay([add], {**llm, "tool_calling": "native"}), "What is 41 + 1?")
    assert (
        whole == 'Let me see.\nAction: add\nAction Input: {"a": 41}\nObservation: <result>42</result>\nAnswer:It is 42.'
    )
    assert sent(upstream, 0)["tools"][0]["function"]["name"] == "add"
    assistant, tool = sent(upstream)["messages"][-2:]
    assert assistant["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 41}'}
    assert (tool["role"], tool["content"], tool["tool_call_id"]) == ("tool", "42", assistant["tool_calls"][0]["id"])


def test_tool_of_the_caller_ends_the_run(upstream, llm):
    upstream.script(streams(ACTION % "北京"))
    bot = rock_sdk.RolePlay([WEATHER, add], llm)
    assert said(bot) == (ACTION % "北京").rstrip()
    assert bot.tool_calls[0]["function"] == {"name": "amap_weather", "arguments": '{"location": "北京"}'}


def test_only_calls_of_the_callers_tools_are_handed_to_it(upstream, llm):
    others = 'Action: add\nAction Input: {"a": 1}\nAction: nobody\nAction Input: {}\n'
    upstream.script(streams(others + ACTION % "北京"))
    bot = rock_sdk.RolePlay([WEATHER, add], llm)
    said(bot)
    assert [call["function"]["name"] for call in bot.tool_calls] == ["amap_weather"]


def test_run_that_is_given_up_leaves_nothing(upstream, llm):
    upstream.script([*sse(delta("It is "), done=False)[:-1], {"stall": True}])
    run = rock_sdk.RolePlay(llm=llm).run("hi")
    assert next(run) == "It is "
    run.close()
    upstream.wait_closed()


def test_generate_cfg_is_sent_along(upstream, llm):
    upstream.script(streams("ok"))
    said(rock_sdk.RolePlay([add], {**llm, "generate_cfg": {"temperature": 0.1, "stop": ["END"]}}))
    assert sent(upstream)["temperature"] == 0.1
    assert sent(upstream)["stop"] == ["END", "Observation:"]


def test_refusal_of_the_model_server_is_raised(upstream, llm):
    upstream.script(answer({"error": {"message": "no such key"}}, 401))
    with pytest.raises(rock_ms.ApiError, match="no such key"):
        said(rock_sdk.RolePlay(llm=llm))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"llm": None}, "llm must say which model"),
        ({"function_list": ["RenewInstanc"]}, "did you mean 'RenewInstance'"),
        ({"function_list": [add, add]}, "two tools add"),
        ({"function_list": [{"a": {}, "b": {}}]}, "its configuration"),
        ({"function_list": [3]}, "3 is no tool"),
        ({"function_list": [{"name": "x", "parameters": 3}]}, "parameters"),
    ],
)
def test_bad_agent_is_refused_when_it_is_made(options, words):
    with pytest.raises(rock_ms.UsageError, match=words):
        rock_sdk.RolePlay(**{"llm": {"model": "m"}, **options})


@pytest.mark.parametrize(
    "more, words",
    [
        ({"model": None}, "llm: model"),
        ({"model_server": "nobody"}, "llm: model_server"),
        ({"api_key": "a\nb"}, "llm: api_key"),
        ({"generate_cfg": [1]}, "llm: generate_cfg"),
    ],
)
def test_bad_llm_is_refused_when_it_is_used(llm, more, words):
    with pytest.raises(rock_ms.UsageError, match=words) as caught:
        said(rock_sdk.RolePlay(llm={**llm, **more}))
    assert "a\nb" not in str(caught.value)


def test_argument_that_an_agent_does_not_take_is_an_error(llm):
    with pytest.raises(TypeError, match="functions"):
        rock_sdk.RolePlay(functions=["RenewInstance"], llm=llm)


def test_run_of_nothing_is_an_error(llm):
    with pytest.raises(ValueError, match="nothing to answer"):
        said(rock_sdk.RolePlay(llm=llm), None)


def test_malformed_history_is_named(llm):
    with pytest.raises(ValueError, match=r"messages\[1\]"):
        said(rock_sdk.RolePlay(llm=llm), history=[{"role": "user", "content": "a"}, 3])


def test_named_tools_run_in_the_tool_manager(upstream, llm, tmp_path):
    upstream.script(streams('Action: RenewInstance\nAction Input: {"instance_id": "7"}'), streams("done"))
    with managing(tmp_path / "data", FakeRuntime()) as manager:
        options = {"tool_service_manager_url": manager.url, "tenant_id": "ann", "use_tool_api": True}
        bot = rock_sdk.RolePlay(["RenewInstance"], llm, **options)
        assert '<result>{"instance_id":"7"}</result>' in said(bot).replace(": ", ":")
        assert manager.status("RenewInstance", "ann")[0] == "running"


def test_manager_that_makes_no_sense_is_an_error(upstream, llm):
    upstream.script(answer({"output": None}), answer({"output": None}))
    with pytest.raises(rock_sdk.ToolError, match="in no known state"):
        rock_sdk.RolePlay(["RenewInstance"], llm, use_tool_api=True, tool_service_manager_url=upstream.url)


def test_tool_that_the_manager_cannot_run_is_an_error(llm, tmp_path):
    runtime = FakeRuntime()
    runtime.failures = [rock_sdk.NodeError("there is no such image")]
    with managing(tmp_path / "data", runtime) as manager:
        with pytest.raises(rock_sdk.ToolError, match="there is no such image"):
            rock_sdk.RolePlay(["RenewInstance"], llm, tool_service_manager_url=manager.url, use_tool_api=True)
