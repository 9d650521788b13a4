"""The SDK's configurations: ROCK's fields and defaults, files as ROCK's users write them, and what mistakes get."""

import json
import os
import re
import shlex
import subprocess
from dataclasses import asdict, fields

import pytest

from rock_ms import UsageError
from rock_sdk import AgentBashCommand, ModelServiceConfig, RockAgentConfig, RuntimeEnvConfig, fill
from support import TIMEOUT

# What the seeds' table and ROCK's classes have; names that ROCK makes up by chance are None.
DEFAULTS = {
    ModelServiceConfig: {
        "enabled": False,
        "type": "local",
        "install_cmd": None,
        "install_timeout": 300,
        "start_cmd": "rock model-service start --type ${type}",
        "stop_cmd": "rock model-service stop",
        "watch_agent_cmd": "rock model-service watch-agent --pid ${pid}",
        "anti_call_llm_cmd": "rock model-service anti-call-llm --index ${index} --response ${response_payload}",
        "anti_call_llm_cmd_no_response": "rock model-service anti-call-llm --index ${index}",
        "logging_path": "/data/logs",
        "logging_file_name": "model_service.log",
        "env": {},
        "config_ini_cmd": None,
        "runtime_env_config": None,
    },
    RuntimeEnvConfig: {
        "type": "python",
        "version": "default",
        "env": None,
        "install_timeout": 600,
        "custom_install_cmd": None,
        "pip": None,
        "pip_index_url": None,
        "npm_registry": None,
        "extra_symlink_dir": None,
        "extra_symlink_executables": None,
    },
    RockAgentConfig: {
        "run_cmd": None,
        "env": {},
        "pre_init_cmds": [],
        "post_init_cmds": [],
        "working_dir": None,
        "project_path": None,
        "use_deploy_working_dir_as_fallback": True,
        "skip_wrap_run_cmd": False,
        "agent_install_timeout": 600,
        "agent_run_timeout": 1800,
        "agent_run_check_interval": 30,
        "agent_type": "default",
        "agent_name": None,
        "version": "default",
        "agent_installed_dir": "/tmp/installed_agent",
        "instance_id": None,
        "agent_session": None,
    },
}
DEFAULTS[RockAgentConfig].update(
    runtime_env_config=DEFAULTS[RuntimeEnvConfig], model_service_config=DEFAULTS[ModelServiceConfig]
)

TEXT = ("must be a text that is not empty", ["", 5, True, ["a"], {}])
FLAG = ("must be true or false", ["maybe", "", 2, [True], {}])
SECONDS = ("must be a number of seconds above 0", ["x", "", 0, -1, True, float("nan"), float("inf"), [300], {}])
MAPPING = ("must be a mapping", ["a", 5, True, ["a"]])
LIST = ("must be a list", ["a", 5, True, {"command": "a"}])
ANYTHING = ("must be a text", [True, ["a"], {}])  # a name or a version: numbers are taken, too
RULES = {
    ModelServiceConfig: {
        **dict.fromkeys(
            ("install_cmd", "start_cmd", "stop_cmd", "logging_path", "logging_file_name", "config_ini_cmd"), TEXT
        ),
        "enabled": FLAG,
        "install_timeout": SECONDS,
        "type": ("must be local or proxy", ["", "Local", "remote", 1, True, ["local"]]),
        "watch_agent_cmd": ("must contain ${pid}", ["rock watch-agent --pid {pid}", "rock watch-agent --pid $pid"]),
        "anti_call_llm_cmd": (
            "must contain --response ${response_payload}",
            ["rock --index ${index}", "rock --index ${index} ${response_payload}"],
        ),
        "anti_call_llm_cmd_no_response": ("must contain ${index}", ["rock anti-call-llm --index 0"]),
        "env": MAPPING,
        "runtime_env_config": MAPPING,
    },
    AgentBashCommand: {"command": TEXT, "timeout_seconds": SECONDS},
    RuntimeEnvConfig: {
        **dict.fromkeys(("custom_install_cmd", "pip_index_url", "npm_registry", "extra_symlink_dir"), TEXT),
        "type": ("must be python or node", ["", "ruby", "Python", 3, ["node"]]),
        "install_timeout": SECONDS,
        "env": MAPPING,
        "pip": ("must be a list", [5, True, {"a": "1.0"}]),
        "extra_symlink_executables": LIST,
        "version": ANYTHING,
    },
    RockAgentConfig: {
        **dict.fromkeys(("agent_install_timeout", "agent_run_timeout", "agent_run_check_interval"), SECONDS),
        **dict.fromkeys(("use_deploy_working_dir_as_fallback", "skip_wrap_run_cmd"), FLAG),
        **dict.fromkeys(("project_path", "agent_installed_dir", "run_cmd"), TEXT),
        **dict.fromkeys(("agent_type", "agent_name", "version", "instance_id", "agent_session"), ANYTHING),
        "working_dir": ("must be a directory of this machine that exists", ["/nonexistent", __file__]),
        "env": MAPPING,
        "pre_init_cmds": LIST,
        "post_init_cmds": LIST,
        "runtime_env_config": MAPPING,
        "model_service_config": MAPPING,
    },
}
# What stands in another configuration is named with its path.
PATHS = {RuntimeEnvConfig: "runtime_env_config", ModelServiceConfig: "model_service_config"}


def bad_values():
    for cls, rules in RULES.items():
        for name, (rule, values) in rules.items():
            for value in values:
                yield pytest.param(cls, name, value, rule, id="%s.%s=%r" % (cls.__name__, name, value))


def refusal(call, *args, **options):
    """The message of the UsageError that a call raises."""
    with pytest.raises(UsageError) as caught:
        call(*args, **options)
    return str(caught.value)


def write(directory, text, name="rock_agent_config.yaml"):
    path = os.path.join(str(directory), name)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    return path


# Fields and defaults ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", DEFAULTS)
def test_fields_and_defaults_are_those_of_rock(cls):
    assert asdict(cls()) == DEFAULTS[cls]


def test_a_command_of_an_installation_may_take_five_minutes():
    assert asdict(AgentBashCommand.of("make")) == {"command": "make", "timeout_seconds": 300}


@pytest.mark.parametrize("cls", DEFAULTS)
def test_none_is_the_default_as_of_a_yaml_key_with_nothing_behind_it(cls):
    assert cls.of(dict.fromkeys(DEFAULTS[cls])) == cls()


def test_two_configurations_share_no_mapping_and_no_list():
    one, other = RockAgentConfig(), RockAgentConfig()
    one.env["A"] = "1"
    one.pre_init_cmds.append("make")
    one.model_service_config.env["A"] = "1"
    assert other == RockAgentConfig()


@pytest.mark.parametrize(
    "cls, name, value, kept",
    [
        (ModelServiceConfig, "enabled", "yes", True),
        (ModelServiceConfig, "enabled", 0, False),
        (ModelServiceConfig, "install_timeout", "1.5", 1.5),
        (
            ModelServiceConfig,
            "env",
            {"N": 8, "F": 0.5, "S": "", "L": "a\nb"},
            {"N": "8", "F": "0.5", "S": "", "L": "a\nb"},
        ),
        (RuntimeEnvConfig, "version", 3.11, "3.11"),
        (RuntimeEnvConfig, "pip", "requirements.txt", "requirements.txt"),
        (RuntimeEnvConfig, "pip", ("a==1", "b"), ["a==1", "b"]),
        (RockAgentConfig, "pre_init_cmds", ["make"], [AgentBashCommand("make")]),
        (RockAgentConfig, "pre_init_cmds", [AgentBashCommand("make", 5)], [AgentBashCommand("make", 5)]),
        (RockAgentConfig, "model_service_config", ModelServiceConfig(True), ModelServiceConfig(True)),
        (RockAgentConfig, "instance_id", 7, "7"),
        (RockAgentConfig, "run_cmd", "agent ${prompt_file}", "agent ${prompt_file}"),
    ],
)
def test_values_are_taken_in_the_forms_that_files_have_them_in(cls, name, value, kept):
    assert getattr(cls.of({name: value}), name) == kept


# What is refused ----------------------------------------------------------------------------------------------------


def test_the_table_of_bad_values_has_every_field():
    for cls, rules in RULES.items():
        assert set(rules) == {spec.name for spec in fields(cls)}


@pytest.mark.parametrize("cls, name, value, rule", list(bad_values()))
def test_a_bad_value_is_answered_with_the_field_the_rule_and_what_was_got(cls, name, value, rule):
    message = refusal(cls.of, {name: value} if cls is not AgentBashCommand else {"command": "a", name: value})
    assert message.startswith("%s: %s" % (name, rule))
    got = {list: "an array", dict: "an object"}.get(type(value), repr(value))
    if name == "env":  # what was got may be a secret
        got = type(value).__name__
    assert message.endswith(", got " + got)
    if cls in PATHS:
        nested = refusal(RockAgentConfig.of, {PATHS[cls]: {name: value}})
        assert nested == "%s.%s" % (PATHS[cls], message)


@pytest.mark.parametrize(
    "values, path, got",
    [
        (
            {"pre_init_cmds": ["a", {"command": "b", "timeout_seconds": -1}]},
            r"pre_init_cmds.?1.?\.timeout_seconds",
            "-1",
        ),
        ({"post_init_cmds": ["a", {"command": ["b"]}]}, r"post_init_cmds.?1.?\.command", "an array"),
        ({"pre_init_cmds": ["a", 5]}, r"pre_init_cmds.?1", "5"),
        ({"runtime_env_config": {"pip": ["a", 5]}}, r"runtime_env_config\.pip.?1", "5"),
        ({"runtime_env_config": {"extra_symlink_executables": ["a", ""]}}, r"\.extra_symlink_executables.?1", "''"),
    ],
)
def test_an_entry_of_a_list_is_named_by_its_place_from_0(values, path, got):
    message = refusal(RockAgentConfig.of, values)
    assert re.search(path + r".?:", message)
    assert message.endswith("got " + got)


@pytest.mark.parametrize(
    "values, path",
    [
        ({"pre_init_cmds": ["a", {"command": "b", "timeout_seconds": -1}]}, "pre_init_cmds"),
        ({"pre_init_cmds": ["a", 5]}, "pre_init_cmds"),
        ({"runtime_env_config": {"pip": ["a", 5]}}, "runtime_env_config.pip"),
    ],
)
def test_a_list_with_a_bad_entry_is_named(values, path):
    assert refusal(RockAgentConfig.of, values).startswith(path)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"rum_cmd": "x"}, "rum_cmd: unknown setting; did you mean 'run_cmd'?"),
        (
            {"model_service_config": {"sart_cmd": "x"}},
            "model_service_config.sart_cmd: unknown setting; did you mean 'start_cmd'?",
        ),
        ({"runtime_env_config": {"pips": []}}, "runtime_env_config.pips: unknown setting; did you mean 'pip'?"),
        ({"pre_init_cmds": [{"comand": "x"}]}, "comand: unknown setting; did you mean 'command'?"),
        (
            {"model_service_config": {5: "x"}},
            "model_service_config.5: unknown setting; known are enabled, type, install_cmd",
        ),
    ],
)
def test_an_unknown_key_names_the_nearest(values, message):
    assert message in refusal(RockAgentConfig.of, values)


@pytest.mark.parametrize("value, got", [(5, "5"), (None, "null"), (["a"], "an array"), (True, "True")])
def test_what_is_no_mapping_is_no_configuration(value, got):
    assert refusal(RockAgentConfig.of, value) == "a RockAgentConfig must be a mapping, got " + got


@pytest.mark.parametrize(
    "env, rule",
    [
        ({"A B": "x"}, "A B: no name of an environment variable"),
        ({"": "x"}, ": no name of an environment variable"),
        ({"A=B": "x"}, "A=B: no name of an environment variable"),
        ({"1A": "x"}, "1A: no name of an environment variable"),
        ({"A\n": "x"}, "A\n: no name of an environment variable"),
        ({"A": True}, "A: must be a text: put it in quotes"),
        ({"A": None}, "A: must be a text: put it in quotes"),
        ({"A": ["x"]}, "A: must be a text: put it in quotes"),
        ({"A": "x\0"}, "A: holds a NUL character"),
        ({"A": "\ud800"}, "A: holds a lone surrogate"),
    ],
)
@pytest.mark.parametrize("path", ["env", "model_service_config.env", "runtime_env_config.env"])
def test_an_environment_that_no_process_can_have_is_refused_with_its_variable(env, rule, path):
    values = env
    for name in reversed(path.split(".")):
        values = {name: values}
    assert refusal(RockAgentConfig.of, values).startswith("%s.%s" % (path, rule))


@pytest.mark.parametrize(
    "make",
    [
        lambda: RockAgentConfig.of({"env": {"KEY": ["sesame"]}}),
        lambda: RockAgentConfig.of({"env": {"KEY": "sesame\0"}}),
        lambda: RockAgentConfig.of({"env": [{"KEY": "sesame"}]}),
        lambda: RockAgentConfig.of({"model_service_config": {"env": {"KEY": {"is": "sesame"}}}}),
        lambda: RockAgentConfig.of({"model_service_config": [{"env": {"KEY": "sesame"}}]}),
        lambda: RockAgentConfig.of({"env": {"KEY": "sesame"}, "run_cmd": "no placeholder"}),
        lambda: RockAgentConfig.of({"env": "KEY=sesame"}),
        lambda: ModelServiceConfig.of(RockAgentConfig(env={"KEY": "sesame"})),
    ],
)
def test_no_error_shows_what_an_environment_holds(make):
    assert "sesame" not in refusal(make)


# Files --------------------------------------------------------------------------------------------------------------

IFLOW = """\
run_cmd: "iflow -p ${prompt} --yolo"

runtime_env_config:
  type: node
  npm_registry: "https://registry.npmmirror.com"
  custom_install_cmd: "npm i -g @iflow-ai/iflow-cli@latest"

env:
  IFLOW_API_KEY: "<API_KEY>"                  # replace
  IFLOW_BASE_URL: "http://localhost:8080/v1"  # Enter your base url
  IFLOW_MODEL_NAME: "<MODEL_NAME>"            # replace

model_service_config:
  enabled: true
  type: proxy
  start_cmd: "rock model-service start --type ${type} --proxy-base-url <IFLOW_BASE_URL>" # replace <> value
"""

CLAUDE = """\
run_cmd: "claude -p ${prompt}"

runtime_env_config:
  type: node
  custom_install_cmd: "npm install -g @anthropic-ai/claude-code"

env:
  ANTHROPIC_BASE_URL: "" # 填入你的anthropic base url
  ANTHROPIC_API_KEY: "" # 填入你的anthropic api key
"""

LANGGRAPH = """\
working_dir: "."                                # Upload current directory containing langgraph_agent.py to sandbox

run_cmd: "python langgraph_agent.py ${prompt}"  # Run local script

runtime_env_config:
  type: python
  pip:                                          # Install pip dependencies
    - langchain==1.2.3
    - langchain-openai==1.1.7
    - langgraph==1.0.6

env:
  OPENAI_API_KEY: xxxxxxx
"""

COMPLETE = """\
# ========== Basic Configuration ==========
agent_type: "default"
agent_name: "demo-agent"
version: "1.0.0"
instance_id: "instance-001"
agent_installed_dir: "/tmp/installed_agent"
agent_session: "my-session"
env:
  OPENAI_API_KEY: "xxxxxxx"

# ========== Working Directory Configuration ==========
working_dir: "./my_project"
project_path: "/testbed"
use_deploy_working_dir_as_fallback: true

# ========== Run Configuration ==========
run_cmd: "python ${working_dir}/main.py --prompt ${prompt}"

# Timeout configuration
agent_install_timeout: 600
agent_run_timeout: 1800
agent_run_check_interval: 30

# ========== Initialization Commands ==========
pre_init_cmds:
  - command: "apt update && apt install -y git"
    timeout_seconds: 300
  - command: "cp ${working_dir}/config.json /root/.config/config.json"
    timeout_seconds: 60

post_init_cmds:
  - command: "echo 'Installation complete'"
    timeout_seconds: 30

# ========== Runtime Environment Configuration ==========
runtime_env_config:
  type: "python"
  version: "3.11"
  pip:
    - langchain==1.2.3
    - langchain-openai==1.1.7

# ========== ModelService Integration ==========
model_service_config:
  enabled: true
"""

BLOCK = """\
run_cmd: >
  cd /testbed &&
  agent --task ${prompt}
  --yolo
pre_init_cmds:
  - command: |
      apt update
      echo "it's done: $HOME" # kept
    timeout_seconds: 60
runtime_env_config:
  custom_install_cmd: |-
    git clone x
    cd x && pip install -e .
"""


def test_rocks_iflow_example_is_read_as_it_stands(tmp_path):
    config = RockAgentConfig.of(write(tmp_path, IFLOW))
    assert config == RockAgentConfig(
        run_cmd="iflow -p ${prompt} --yolo",
        runtime_env_config=RuntimeEnvConfig(
            type="node",
            npm_registry="https://registry.npmmirror.com",
            custom_install_cmd="npm i -g @iflow-ai/iflow-cli@latest",
        ),
        env={
            "IFLOW_API_KEY": "<API_KEY>",
            "IFLOW_BASE_URL": "http://localhost:8080/v1",
            "IFLOW_MODEL_NAME": "<MODEL_NAME>",
        },
        model_service_config=ModelServiceConfig(
            enabled=True,
            type="proxy",
            start_cmd="rock model-service start --type ${type} --proxy-base-url <IFLOW_BASE_URL>",
        ),
    )


def test_rocks_claude_example_is_read_as_it_stands(tmp_path):
    config = RockAgentConfig.of(write(tmp_path, CLAUDE))
    assert config.run_cmd == "claude -p ${prompt}"
    assert config.env == {"ANTHROPIC_BASE_URL": "", "ANTHROPIC_API_KEY": ""}
    assert config.runtime_env_config.custom_install_cmd == "npm install -g @anthropic-ai/claude-code"
    assert not config.model_service_config.enabled


def test_rocks_langgraph_example_is_read_as_it_stands(tmp_path):
    config = RockAgentConfig.of(write(tmp_path, LANGGRAPH))
    assert config.working_dir == "."
    assert config.runtime_env_config.pip == ["langchain==1.2.3", "langchain-openai==1.1.7", "langgraph==1.0.6"]


def test_rocks_complete_example_is_read_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(str(tmp_path))
    os.mkdir("my_project")
    assert RockAgentConfig.of(write(".", COMPLETE)) == RockAgentConfig(
        agent_type="default",
        agent_name="demo-agent",
        version="1.0.0",
        instance_id="instance-001",
        agent_installed_dir="/tmp/installed_agent",
        agent_session="my-session",
        env={"OPENAI_API_KEY": "xxxxxxx"},
        working_dir="./my_project",
        project_path="/testbed",
        run_cmd="python ${working_dir}/main.py --prompt ${prompt}",
        pre_init_cmds=[
            AgentBashCommand("apt update && apt install -y git"),
            AgentBashCommand("cp ${working_dir}/config.json /root/.config/config.json", 60),
        ],
        post_init_cmds=[AgentBashCommand("echo 'Installation complete'", 30)],
        runtime_env_config=RuntimeEnvConfig(version="3.11", pip=["langchain==1.2.3", "langchain-openai==1.1.7"]),
        model_service_config=ModelServiceConfig(enabled=True),
    )


def test_commands_may_be_block_texts(tmp_path):
    config = RockAgentConfig.of(write(tmp_path, BLOCK))
    assert config.run_cmd == "cd /testbed && agent --task ${prompt} --yolo\n"
    assert config.pre_init_cmds == [AgentBashCommand('apt update\necho "it\'s done: $HOME" # kept\n', 60)]
    assert config.runtime_env_config.custom_install_cmd == "git clone x\ncd x && pip install -e ."


def test_object_mapping_yaml_and_json_make_the_same_configuration(tmp_path):
    from_yaml = RockAgentConfig.of(write(tmp_path, IFLOW))
    values = asdict(from_yaml)
    assert RockAgentConfig.of(values) == from_yaml
    assert RockAgentConfig.of(write(tmp_path, json.dumps(values), "a.json")) == from_yaml
    assert RockAgentConfig.of(tmp_path / "a.json") == from_yaml
    assert RockAgentConfig.of(from_yaml) is from_yaml


def test_an_empty_file_is_all_defaults(tmp_path):
    assert RockAgentConfig.of(write(tmp_path, "# nothing yet\n")) == RockAgentConfig()


@pytest.mark.parametrize(
    "text, message",
    [
        ("run_cmd: x", "run_cmd: must contain ${prompt}"),
        ("rum_cmd: x", "unknown setting 'rum_cmd'; did you mean 'run_cmd'?"),
        ("model_service_config:\n  typ: proxy", "model_service_config.typ: unknown setting; did you mean 'type'?"),
        ("model_service_config:\n  install_timeout: soon", "model_service_config.install_timeout: must be a number"),
        ("- run_cmd", "settings must be a mapping, got an array"),
        ("run_cmd: &a x", "line 1"),
        ('{"run_cmd": 1, "run_cmd": 2}', "a key stands in its object a second time"),
        ('{"run_cmd": ', "Expecting value"),
    ],
)
def test_a_mistake_in_a_file_is_answered_with_the_files_name(tmp_path, text, message):
    path = write(tmp_path, text)
    said = refusal(RockAgentConfig.of, path)
    assert said.startswith(path + ": ")
    assert message in said


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    path = str(tmp_path / name)
    assert refusal(RockAgentConfig.of, path).startswith("cannot read the config file " + path)


# Templates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template, filled",
    [
        ("${x}", "1"),
        ("<<x>>", "1"),
        ("a${x}b<<x>>${x}", "a1b11"),
        ("$x", "$x"),
        ("$$ $1 $? ${#a}", "$$ $1 $? ${#a}"),
        ("${other} <<other>>", "${other} <<other>>"),
        ("${x:-2} ${X} ${ x } {x} <x>", "${x:-2} ${X} ${ x } {x} <x>"),
        ("cat <<x", "cat <<x"),
        ("", ""),
    ],
)
def test_a_template_is_filled_where_a_known_name_stands_and_the_rest_is_the_shells(template, filled):
    assert fill(template, {"x": 1}) == filled


@pytest.mark.parametrize("value", ["\\1 \\g<0> \\n", "${x}", "<<x>>", "$x", "", "a\nb", "é🎉\ud800"])
def test_a_value_is_filled_in_as_it_is(value):
    assert fill("[${x}]", {"x": value}) == "[%s]" % value


@pytest.mark.parametrize("names", ["xy", "yx"])
def test_a_value_that_looks_like_a_placeholder_of_another_is_not_filled_again(names):
    values = {"x": "${y}<<y>>", "y": "${x}<<x>>"}
    assert fill("${x} ${y}", {name: values[name] for name in names}) == "${y}<<y>> ${x}<<x>>"


# The prompt ---------------------------------------------------------------------------------------------------------

PROMPTS = [
    "hello",
    "",
    "it's",
    '"quoted"',
    "a b\tc\n\nd\r\n",
    "$HOME ${HOME} $(id) `id` $$ !! *",
    "\\ \\n \\' \\\\",
    "${prompt} <<prompt>> ${prompt_file}",
    "--flag -n; exit 1 & # no comment",
    "é 🎉 中文",
    "'; touch pwned; '",
]
RUN_CMDS = [
    "show ${prompt}",
    'show "${prompt}"',
    "show '${prompt}'",
    "show <<prompt>>",
    'show "<<prompt>>"',
    "show 'it is' \"it's\" ${prompt}",
    "show '\\' ${prompt}",
    'show \\" ${prompt}',
    "show $(printf '\\''%s'\\'' x) ${prompt}".replace("'\\''", "'"),
    '''show """${prompt}"""''',
    "true &&\nshow ${prompt}\n",
]


@pytest.mark.parametrize("run_cmd", RUN_CMDS)
def test_the_prompt_is_one_word_whatever_it_holds(tmp_path, run_cmd):
    template = RockAgentConfig(run_cmd=run_cmd).run_cmd
    for prompt in PROMPTS:
        command = 'show() { for word; do :; done; printf %s. "$word"; }\n' + fill(
            template, {"prompt": shlex.quote(prompt)}
        )
        output = subprocess.check_output(["bash", "-c", command], cwd=str(tmp_path), timeout=TIMEOUT)
        assert output.decode("utf-8") == prompt + "."
    assert os.listdir(str(tmp_path)) == []


def test_a_prompt_behind_a_flag_is_part_of_that_word():
    for run_cmd in ("show --x=${prompt}", 'show --x="${prompt}"'):
        template = RockAgentConfig(run_cmd=run_cmd).run_cmd
        command = 'show() { printf %s. "$@"; }\n' + fill(template, {"prompt": shlex.quote("a 'b' c")})
        assert subprocess.check_output(["bash", "-c", command], timeout=TIMEOUT) == b"--x=a 'b' c."


@pytest.mark.parametrize(
    "run_cmd",
    [
        'agent "task: ${prompt}"',
        "agent 'task: ${prompt}'",
        "agent 'task: <<prompt>>'",
        "bash -c 'agent ${prompt}'",
        "bash -c 'agent \"${prompt}\"'",
        'bash -c "agent \\"${prompt}\\""',
        'agent "$(cat x ${prompt})"',
        'agent "it\'s" \'a\' "b ${prompt}"',
        'agent ${prompt} "again: ${prompt}"',
    ],
)
def test_a_prompt_inside_quotes_is_refused_as_it_could_leave_them(run_cmd):
    message = refusal(RockAgentConfig, run_cmd=run_cmd)
    assert message.startswith("run_cmd: has ${prompt} inside quotes; write it without")


@pytest.mark.parametrize(
    "run_cmd",
    [
        "agent \\${prompt}",
        "agent $${prompt}",
        "agent `cat ${prompt}`",
    ],
)
def test_a_prompt_whose_quotes_the_shell_would_not_see_as_such_is_refused(run_cmd):
    assert refusal(RockAgentConfig, run_cmd=run_cmd).startswith("run_cmd: ")


def test_a_prompt_in_rocks_older_spelling_is_refused_with_todays():
    message = refusal(RockAgentConfig, run_cmd="python main.py --prompt {prompt}")
    assert "must contain ${prompt}, or ${prompt_file}: write ${prompt} for {prompt}, got 'python" in message
