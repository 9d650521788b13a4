"""Settings: where each comes from, what each may be, and what a mistake is answered with."""

import json
import os
import stat
import subprocess
import sys

import pytest

import rock_ms
from rock_ms import ServiceSettings, UsageError, resolve_data_dir, resolve_settings
from support import clean_environ

SPECS = {spec.name: spec for spec in rock_ms.fields(ServiceSettings)}
WITH_FLAG = [spec for spec in SPECS.values() if spec.metadata["flag"]]

# For each setting: a text and its value, then a value for the config file and what that becomes.
GOOD = {
    "type": ("proxy", "proxy", "local", "local"),
    "host": ("::1", "::1", "localhost", "localhost"),
    "port": ("0", 0, 65535, 65535),
    "api_key": ("sesame", "sesame", "poppy", "poppy"),
    "request_timeout": ("unlimited", float("inf"), 1.5, 1.5),
    "heartbeat_seconds": ("0.05", 0.05, 2, 2.0),
    "polling_interval_seconds": ("1e-2", 0.01, 0.5, 0.5),
    "max_body_bytes": ("1", 1, 2048, 2048),
    "log_file": ("a.log", "a.log", "/b/c.log", "/b/c.log"),
    "recording_file": ("r.jsonl", "r.jsonl", "/s.jsonl", "/s.jsonl"),
    "traj_append_mode": ("Yes", True, True, True),
    "logging_path": ("here", "here", "/there", "/there"),
    "logging_file_name": ("x", "x", "y", "y"),
    "proxy_base_url": ("http://h:1/v1/", "http://h:1/v1", "https://h", "https://h"),
    "proxy_rules": (None, None, {"a": "http://b/", "c": "http://d/v1"}, {"a": "http://b", "c": "http://d/v1"}),
    "upstream_api_key": ("sesame", "sesame", "poppy", "poppy"),
    "request_overrides": ('{"n": 1}', {"n": 1}, {"logprobs": True}, {"logprobs": True}),
    "retryable_status_codes": ("500, 502", (500, 502), [429, "503"], (429, 503)),
    "max_attempts": ("1", 1, 9, 9),
    "retry_delay_seconds": ("0.5", 0.5, 3, 3.0),
    "replay_file": ("r.jsonl", "r.jsonl", "/s.jsonl", "/s.jsonl"),
    "replay_match": ("request", "request", "order", "order"),
    "tool": ("amap_weather", "amap_weather", "x", "x"),
    "tool_file": ("t.py", "t.py", "/t.py", "/t.py"),
    "tool_cfg": ('{"a": 1}', {"a": 1}, {"b": [2]}, {"b": [2]}),
    "tool_env": (None, None, {"AMAP_TOKEN": "x"}, {"AMAP_TOKEN": "x"}),
    "tool_workers": ("1", 1, 9, 9),
}

# For each setting: the rule that its errors state, bad texts, and what else is bad in a config file.
BAD = {
    "type": ("must be local, proxy or tool-node", ["remote", "Local", " local"], [1, True, []]),
    "host": ("must be a text that is not empty", [""], [1, False, ["h"], {}]),
    "port": (
        "must be a whole number from 0 to 65535 (0: any free port)",
        ["", "x", "-1", "+1", "65536", "1.0", " 1", "1\n", "0x1", "²", "٣", "9" * 5000],
        [-1, 65536, 1.0, 1e3, True, [8080]],
    ),
    "api_key": (
        "must be printable ASCII without spaces",
        ["", " ", "ses ame", "sesame\n", "s\u00e9same", "\x7f"],
        [12345, 1.50, True, ["sesame"], {"sesame": 1}],
    ),
    "request_timeout": (
        "must be a number of seconds above 0",
        ["", "0", "-1", "nan", "inf", "1e9", "5s", "false"],
        [0, -0.5, True, False, [], 10**400],
    ),
    "heartbeat_seconds": (
        "must be a number of seconds above 0",
        ["0", "-1", "nan", "-inf", "none"],
        [0, True, {}, 10**400],
    ),
    "polling_interval_seconds": ("must be a number of seconds above 0", ["0", "x"], [0.0, False, [1], 10**400]),
    "max_body_bytes": (
        "must be a whole number of bytes above 0",
        ["0", "-1", "1.5", "1k", "9" * 16],
        [0, 1.0, True, [1], 10**15],
    ),
    "log_file": ("must be a text that is not empty", [""], [1, True, []]),
    "recording_file": ("must be a text that is not empty", [""], [1, []]),
    "traj_append_mode": ("must be true or false", ["2", "y", "maybe"], [2, 1.0, [], "t"]),
    "logging_path": ("must be a text that is not empty", [""], [1, {}]),
    "logging_file_name": ("must be a text that is not empty", [""], [0, []]),
    "proxy_base_url": (
        "must be a base URL, as https://host/v1",
        [
            "",
            "host/v1",
            "ftp://host",
            "https://",
            "https:///v1",
            "https://h/v1?k=v",
            "https://h/#f",
            "https://a b",
            "http://h\n",
            "http://h:0/v1",
            "http://h:65536",
            "http://h:/v1",
            'http://h/"',
            "http://[::1/v1",
        ],
        [1, True, []],
    ),
    "proxy_rules": ("must be a mapping of model names to base URLs", [], ["http://h", [], 1, True]),
    "retryable_status_codes": (
        "must be HTTP status codes from 400 to 599, as 429,500, or none",
        ["", "429,", "429;500", "99", "600", "4xx", "-429", "²00", "429 500"],
        [42, True, [429, "x"], [429.0], [[429]], {}],
    ),
    "upstream_api_key": ("must be printable ASCII without spaces", ["", "ses ame", "s\u00e9same"], [12345, ["sesame"]]),
    "request_overrides": (
        'must be a JSON object of request fields other than stream, as {"logprobs": true}',
        ["", "[]", "{", "logprobs=true", '{"stream": false}'],
        [[], 1, "x", True],
    ),
    "max_attempts": ("must be a whole number above 0", ["0", "-1", "1.5", "", "9" * 7], [0, True, 1.0, []]),
    "retry_delay_seconds": ("must be a number of seconds above 0", ["0", "-1", "x"], [0, False, []]),
    "replay_file": ("must be a text that is not empty", [""], [1, []]),
    "replay_match": ("must be order or request", ["", "Order", "both"], [1, True, []]),
    "tool": ("must be a text that is not empty", [""], [1, False, ["t"], {}]),
    "tool_file": ("must be a text that is not empty", [""], [1, False, ["t"], {}]),
    "tool_cfg": ("must be a JSON object", ["", "x", "[]", "1", '{"a": NaN}'], [1, [], "x", True]),
    "tool_env": ("must be a mapping of names to texts", [], [1, [], "x", {"A": 1}, {"A B": "x"}, {"A": "\0"}]),
    "tool_workers": ("must be a whole number above 0", ["0", "-1", "1.5", "", "9" * 7], [0, True, 1.0, []]),
}


def write_config(directory, text, name="config"):
    path = directory / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return str(path)


def config_of(directory, values):
    return write_config(directory, json.dumps(values))


def resolve(flags=(), environ=(), config=None):
    return resolve_settings(ServiceSettings, dict(flags), dict(environ), config)


def refusal(*args, **options):
    with pytest.raises(UsageError) as caught:
        resolve(*args, **options)
    assert caught.value.exit_code == 2
    return str(caught.value)


# Sources ------------------------------------------------------------------------------------------------------------


def test_without_any_source_every_setting_has_its_default():
    assert resolve() == ServiceSettings()
    assert (ServiceSettings().type, ServiceSettings().port, ServiceSettings().api_key) == ("local", 8080, None)


def test_each_instance_has_a_mapping_of_its_own():
    assert ServiceSettings().proxy_rules == ServiceSettings().proxy_rules
    assert ServiceSettings().proxy_rules is not ServiceSettings().proxy_rules


def test_flags_and_variables_are_each_one_setting_s():
    for kind in ("flag", "env"):
        names = [spec.metadata[kind] for spec in SPECS.values() if spec.metadata[kind]]
        assert len(names) == len(set(names))


def test_the_tables_here_speak_of_every_setting():
    assert set(GOOD) == set(BAD) == set(SPECS)


@pytest.mark.parametrize("name", SPECS)
def test_setting_is_read_from_each_source_it_has(tmp_path, name):
    flag, env = SPECS[name].metadata["flag"], SPECS[name].metadata["env"]
    text, value, raw, configured = GOOD[name]
    if flag:
        assert getattr(resolve({name: text}), name) == value
    if env:
        assert getattr(resolve((), {env: text}), name) == value
    got = getattr(resolve(config=config_of(tmp_path, {name: raw})), name)
    assert (got, type(got)) == (configured, type(configured))


def test_command_line_wins_over_environment_over_config_file_over_default(tmp_path):
    flags, environ, config = {"port": "1"}, {"SERVICE_PORT": "2"}, config_of(tmp_path, {"port": 3})
    assert resolve(flags, environ, config).port == 1
    assert resolve({"port": None}, environ, config).port == 2
    assert resolve((), {}, config).port == 3
    assert resolve((), {}, None).port == 8080


def test_sources_are_mixed_setting_by_setting(tmp_path):
    config = config_of(tmp_path, {"port": 3, "host": "c", "log_file": "l"})
    got = resolve({"port": "1"}, {"SERVICE_HOST": "e"}, config)
    assert (got.port, got.host, got.log_file, got.type) == (1, "e", "l", "local")


def test_a_bad_value_that_is_overruled_does_not_matter(tmp_path):
    assert resolve({"port": "1"}, {"SERVICE_PORT": "bad"}, config_of(tmp_path, {"port": "bad"})).port == 1


def test_empty_variable_counts_as_not_set(tmp_path):
    assert resolve((), {"SERVICE_PORT": ""}, config_of(tmp_path, {"port": 3})).port == 3


def test_null_in_a_config_file_is_the_default(tmp_path):
    assert resolve(config=config_of(tmp_path, dict.fromkeys(SPECS))) == ServiceSettings()


@pytest.mark.parametrize("word", ["none", "None", "NONE", "unlimited"])
def test_wait_without_limit_can_be_said_over_a_limit_in_the_config_file(tmp_path, word):
    config = config_of(tmp_path, {"request_timeout": 5})
    assert resolve({"request_timeout": word}, {}, config).wait_limit == float("inf")


@pytest.mark.parametrize("words, value", [("true True 1 yes ON", True), ("false FALSE 0 no off", False)])
def test_words_of_a_flag(words, value):
    for word in words.split():
        assert resolve((), {"ROCK_MODEL_SERVICE_TRAJ_APPEND_MODE": word}).traj_append_mode is value


# Bad values ---------------------------------------------------------------------------------------------------------


def bad_cases():
    for name, (rule, texts, others) in BAD.items():
        for text in texts:
            if SPECS[name].metadata["flag"]:
                yield name, rule, "flag", text
            if SPECS[name].metadata["env"] and text:
                yield name, rule, "env", text
            yield name, rule, "config", text
        for other in others:
            yield name, rule, "config", other


@pytest.mark.parametrize("name, rule, source, value", list(bad_cases()), ids=lambda value: str(value)[:20])
def test_bad_value_is_refused_with_its_source_the_rule_and_the_value(tmp_path, name, rule, source, value):
    spec = SPECS[name].metadata
    if source == "flag":
        message, origin = refusal({name: value}), spec["flag"]
    elif source == "env":
        message, origin = refusal((), {spec["env"]: value}), spec["env"]
    else:
        config = config_of(tmp_path, {name: value})
        message, origin = refusal(config=config), "%s: %s" % (config, name)
    got = "" if spec["secret"] else ", got %r" % (value,)
    assert message == "%s: %s%s" % (origin, rule, got)


def test_proxy_type_is_refused_as_not_in_this_version():
    assert refusal({"type": "remote"}).startswith("--type: must be local, proxy or tool-node")


def test_bad_url_among_the_proxy_rules_is_refused(tmp_path):
    assert "must be a base URL" in refusal(config=config_of(tmp_path, {"proxy_rules": {"a": "http://b", "c": "d"}}))


SECRET_TEXTS = [
    'api_key: ["s3same"]',
    "api_key: {s3same: s3same}",
    "api_key: @s3same",
    "api_key: &s3same",
    "api_key: !s3same",
    "api_key: '0' s3same",
    "api_key: s3same: s3same",
    "api_key: 's3same",
    "api_key:\ts3same",
    "api_key: [s3same",
    "api_keys: s3same",
    "api_key: a\n  s3same",
    "s3same",
    '{"api_key": "s3same}',
    '{"api_key": s3same}',
    '{"api_key": ["s3same"]}',
]


@pytest.mark.parametrize("text", SECRET_TEXTS)
def test_secret_in_a_config_file_is_never_shown(tmp_path, text):
    assert "s3same" not in refusal(config=write_config(tmp_path, text))


def test_secret_made_of_digits_is_never_shown(tmp_path):
    for digits in ("0731731", "731_731", "731e31", "731731", "73:17:31"):
        message = refusal(config=write_config(tmp_path, "port: 1\napi_key: " + digits))
        assert digits not in message


# Config files -------------------------------------------------------------------------------------------------------

SAME_IN_BOTH = {
    "json": '{"port": 9000, "host": "127.0.0.1", "retryable_status_codes": [429, 502], "proxy_rules": {"a": "http://b"}}',
    "yaml": "# ours\nport: 9000\nhost: 127.0.0.1\nretryable_status_codes:\n- 429\n- 502\nproxy_rules:\n  a: http://b\n",
}


@pytest.mark.parametrize("kind", SAME_IN_BOTH)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_config_file_is_json_or_yaml_whatever_its_name(tmp_path, kind, mark, end):
    text = (
        mark
        + SAME_IN_BOTH[kind].replace(", " if kind == "json" else "\n", "," + end if kind == "json" else end).encode()
    )
    got = resolve(config=write_config(tmp_path, text, "settings.txt"))
    assert (got.port, got.host, got.retryable_status_codes) == (9000, "127.0.0.1", (429, 502))
    assert got.proxy_rules == {"a": "http://b"}


@pytest.mark.parametrize("text", [b"", b"\n\n", b"# nothing\n", b"---\n", b"{}", b"\xef\xbb\xbf", b"null"])
def test_empty_config_file_changes_nothing(tmp_path, text):
    assert resolve(config=write_config(tmp_path, text)) == ServiceSettings()


def test_config_file_that_cannot_be_read_is_named(tmp_path):
    path = str(tmp_path / "none.yaml")
    assert refusal(config=path).startswith("cannot read the config file %s: " % path)
    assert refusal(config=str(tmp_path)).startswith("cannot read the config file %s: " % tmp_path)


def test_config_file_that_is_not_utf8_is_named(tmp_path):
    path = write_config(tmp_path, b"host: \xff\xfe")
    assert refusal(config=path).startswith("cannot read the config file %s: " % path)


@pytest.mark.parametrize(
    "text, got", [("- port", "an array"), ("[]", "an array"), ("port", "a string"), ("1", "a number")]
)
def test_config_file_that_is_no_mapping_is_refused(tmp_path, text, got):
    path = write_config(tmp_path, text)
    assert refusal(config=path) == "%s: settings must be a mapping, got %s" % (path, got)


@pytest.mark.parametrize(
    "text, line", [("port: 1\nhost: &a x\n", 2), ('{"port": 1,\n"host": x}', 2), ("a: 1\r\n\r\na: 2", 3)]
)
def test_config_file_that_is_malformed_is_refused_with_its_name_and_line(tmp_path, text, line):
    path = write_config(tmp_path, text)
    message = refusal(config=path)
    assert message.startswith(path + ": ")
    assert "line %d" % line in message


@pytest.mark.parametrize("text", ['{"port": NaN}', "[" * 100000, '{"a":' * 100000])
def test_config_file_of_hostile_text_is_refused(tmp_path, text):
    path = write_config(tmp_path, text)
    assert refusal(config=path).startswith(path + ": ")


@pytest.mark.parametrize(
    "key, near", [("prot", "port"), ("Host", "host"), ("api-key", "api_key"), ("hearbeat_secs", "heartbeat_seconds")]
)
def test_unknown_setting_is_refused_with_the_nearest_one(tmp_path, key, near):
    path = config_of(tmp_path, {key: 1})
    assert refusal(config=path) == "%s: unknown setting %r; did you mean %r?" % (path, key, near)


@pytest.mark.parametrize("text", ["zzzzzz: 1", "1: 2", "~: 3"])
def test_unknown_setting_that_is_near_to_none_is_refused_with_all(tmp_path, text):
    message = refusal(config=write_config(tmp_path, text))
    assert "unknown setting" in message
    assert message.endswith("; known are " + ", ".join(SPECS))


# The command line ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", WITH_FLAG, ids=lambda spec: spec.name)
def test_each_flag_is_taken_by_start_as_its_setting(spec):
    text, value = GOOD[spec.name][:2]
    args = rock_ms.build_parser("x").parse_args(["start", spec.metadata["flag"], text])
    flags = {name: getattr(args, name, None) for name in SPECS}
    assert {name: flag for name, flag in flags.items() if flag is not None} == {spec.name: text}
    assert getattr(resolve(flags), spec.name) == value


@pytest.mark.parametrize("spec", WITH_FLAG, ids=lambda spec: spec.name)
def test_help_of_start_has_each_flag_with_its_meaning_variable_and_default(spec, capsys):
    with pytest.raises(SystemExit) as caught:
        rock_ms.build_parser("x").parse_args(["start", "--help"])
    assert caught.value.code == 0
    (text,) = [
        part for part in capsys.readouterr().out.split("\n  --") if part.startswith(spec.metadata["flag"][2:] + " ")
    ]
    shown = " ".join(text.split())
    only, meaning = spec.metadata["only"], spec.metadata["help"]
    assert (" " + meaning.replace(only + ": ", "", 1) if only else meaning) in shown
    assert not only or only + ": " not in shown  # its group says that
    assert (spec.metadata["env"] or "") in shown
    if isinstance(spec.default, (str, int)):
        assert "default %s" % spec.default in shown


# The data directory -------------------------------------------------------------------------------------------------


def test_data_dir_is_the_flag_s_then_the_variable_s(tmp_path):
    environ = {"ROCK_MODEL_SERVICE_DATA_DIR": str(tmp_path / "env")}
    assert resolve_data_dir(str(tmp_path / "flag"), environ) == str(tmp_path / "flag")
    assert resolve_data_dir(None, environ) == str(tmp_path / "env")
    with pytest.raises(UsageError, match="--data-dir is empty"):
        resolve_data_dir("", environ)


def test_data_dir_is_absolute_and_knows_the_home_directory():
    assert resolve_data_dir("here", {}) == os.path.join(os.getcwd(), "here")
    assert resolve_data_dir(None, {"ROCK_MODEL_SERVICE_DATA_DIR": "../there"}) == os.path.abspath("../there")
    assert resolve_data_dir("~/logs", {}) == os.path.join(os.path.expanduser("~"), "logs")


def test_an_empty_variable_is_no_data_dir():
    assert resolve_data_dir(None, {"ROCK_MODEL_SERVICE_DATA_DIR": ""}) == resolve_data_dir(None, {})


NEAREST = next(path for path in ("/data/logs", "/data", "/") if os.path.exists(path))
IS_FOR_ALL = bool(os.stat(NEAREST).st_mode & stat.S_IWOTH)


@pytest.mark.skipif(os.geteuid() != 0 or IS_FOR_ALL, reason="needs root, to be two users of different rights")
@pytest.mark.parametrize("user, expected", [(0, "/data/logs"), (65534, "HOME/.rock/logs")])
def test_data_dir_is_below_home_where_the_default_cannot_be_made_or_written(tmp_path, user, expected):
    code = "import os, rock_ms; os.setuid(%d); print(rock_ms.resolve_data_dir(None, {}))" % user
    options = {"cwd": os.path.dirname(os.path.abspath(rock_ms.__file__)), "env": clean_environ(HOME=str(tmp_path))}
    printed = subprocess.check_output([sys.executable, "-c", code], **options).decode()
    assert printed.strip() == expected.replace("HOME", str(tmp_path))
    assert os.listdir(str(tmp_path)) == [], "finding the directory must not make it"
