"""The judge's client against an endpoint that is slow, refuses, answers nonsense and dies; its prompt; its cache."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
from tests.evaluation.fake_endpoint import Answer, running

from vzip.errors import ConfigError, JudgeError, ManifestError, MissingPackageError
from vzip.evaluation.benchmarks.judge_prompts import Verdict, read_prompt, read_verdict
from vzip.evaluation.judge.cache import ReplyCache
from vzip.evaluation.judge.client import Judge
from vzip.evaluation.judge.settings import OFFICIAL_URL, JudgeSettings, read_key

KEY = "sk-secret-0123456789"


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture
def judge_of(tmp_path, monkeypatch):
    """Makes a judge of an endpoint, with short pauses; all share one cache."""
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.01)
    made = []

    def make(url: str, key: str | None = KEY, model: str = "judge", **options) -> Judge:
        defaults = {"num_workers": 4}
        judge = Judge(JudgeSettings(model, url), ReplyCache(tmp_path / "cache.sqlite"), key=key, **defaults | options)
        made.append(judge)
        return judge

    yield make
    for judge in made:
        judge.close()
        judge.cache.close()


class TestAsking:
    def test_the_request_and_the_reply(self, judge_of):
        with running(lambda request, number: Answer("fine")) as endpoint:
            reply = judge_of(endpoint.url).ask(chat("how is it?"))
            assert judge_of(endpoint.url, key=None, model="other").ask(chat("how is it?")).text == "fine"
        assert (reply.text, reply.problem, reply.served_model, reply.cached) == ("fine", None, "judge-0125", False)
        assert (reply.num_prompt_tokens, reply.num_reply_tokens) == (200, 10)
        assert endpoint.requests[0] == {
            "model": "judge",
            "messages": chat("how is it?"),
            "temperature": 0.0,
            "max_tokens": 64,
        }
        assert endpoint.keys == [f"Bearer {KEY}", None]

    def test_many_at_once_in_their_order(self, judge_of):
        def answer(request, number):
            return Answer(request["messages"][0]["content"].upper(), delay_s=0.02 * (number % 3))

        with running(answer) as endpoint:
            replies = judge_of(endpoint.url).ask_all([chat(f"q{i}") for i in range(12)])
        assert [reply.text for reply in replies] == [f"Q{i}" for i in range(12)]
        assert 2 <= endpoint.most_at_once <= 4

    def test_nothing_is_asked_twice(self, judge_of):
        with running(lambda request, number: Answer("yes")) as endpoint:
            judge_of(endpoint.url).ask(chat("a"))
            again = judge_of(endpoint.url).ask_all([chat("a"), chat("b"), chat("a")])
            assert len(endpoint.requests) == 2
            assert [reply.cached for reply in again] == [True, False, True]
            assert again[0].served_model == "judge-0125" and again[0].num_prompt_tokens == 0
            judge_of(endpoint.url, model="another").ask(chat("a"))
            different = dataclasses.replace(judge_of(endpoint.url).settings, temperature=0.5)
            judge = Judge(different, judge_of(endpoint.url).cache)
            judge.ask(chat("a"))
            judge.close()
        assert len(endpoint.requests) == 4, "another model, another temperature: other replies"


class TestTrouble:
    @pytest.mark.parametrize(
        "bad",
        [
            Answer(status=429, body='{"error": "slow down"}', headers={"Retry-After": "0"}),
            Answer(status=500, body="oops"),
            Answer(status=0),
            Answer(body="<html>maintenance</html>"),
            Answer(body='{"choices": []}'),
            Answer(body='{"choi', headers={"Content-Type": "application/json"}),
            Answer("too late", delay_s=0.6),
        ],
        ids=["429", "500", "dropped", "html", "no choices", "half", "slow"],
    )
    def test_what_may_pass_is_tried_again(self, judge_of, bad):
        with running(lambda request, number: bad if number < 2 else Answer("yes")) as endpoint:
            reply = judge_of(endpoint.url, timeout_s=0.3).ask(chat("a"))
        assert (reply.text, reply.problem) == ("yes", None)
        assert len(endpoint.requests) == 3

    def test_the_pause_that_the_endpoint_asks_for(self, judge_of, monkeypatch):
        limited = Answer(status=429, body="", headers={"Retry-After": "7"})
        pauses = []
        with running(lambda request, number: limited if number == 0 else Answer("yes")) as endpoint:
            judge = judge_of(endpoint.url)
            monkeypatch.setattr("openai._base_client.time", SimpleNamespace(sleep=pauses.append))
            judge.ask(chat("a"))
        assert pauses == [7.0]

    def test_attempts_end(self, judge_of):
        with (
            running(lambda request, number: Answer(status=503, body="down")) as endpoint,
            pytest.raises(JudgeError, match=r"/v1/chat/completions: HTTP 503 down"),
        ):
            judge_of(endpoint.url, num_attempts=3).ask(chat("a"))
        assert len(endpoint.requests) == 3

    def test_nobody_there(self, judge_of):
        with running(lambda request, number: Answer("yes")) as endpoint:
            url = endpoint.url
        with pytest.raises(JudgeError, match="chat/completions"):
            judge_of(url, num_attempts=2).ask(chat("a"))

    @pytest.mark.parametrize("status", [401, 403, 404])
    def test_a_refusal_ends_it_at_once_and_does_not_show_the_key(self, judge_of, status):
        told = Answer(status=status, body=f'{{"error": "wrong key {KEY}"}}')
        with running(lambda request, number: told) as endpoint, pytest.raises(JudgeError) as raised:
            judge_of(endpoint.url).ask_all([chat(f"q{i}") for i in range(50)])
        assert "Check OPENAI_API_KEY, --base-url and --model judge" in str(raised.value)
        assert KEY not in str(raised.value) and "wrong key ***" in str(raised.value)
        assert len(endpoint.requests) < 10

    def test_it_dies_half_way_and_goes_on_later(self, judge_of):
        """What has been answered is kept and not asked again."""

        def answer(request, number):
            return Answer(status=500, body="dead") if number >= 20 else Answer("yes")

        chats = [chat(f"q{i}") for i in range(30)]
        with running(answer) as endpoint:
            with pytest.raises(JudgeError, match="HTTP 500 dead"):
                judge_of(endpoint.url, num_attempts=2).ask_all(chats)
            endpoint.behaviour = lambda request, number: Answer("no")
            before = len(endpoint.requests)
            replies = judge_of(endpoint.url).ask_all(chats)
        assert sum(reply.text == "yes" for reply in replies) == 20
        assert len(endpoint.requests) - before == 10

    def test_an_interruption_loses_nothing(self, judge_of):
        def interrupt(number, reply):
            raise KeyboardInterrupt

        chats = [chat(f"q{i}") for i in range(20)]
        with running(lambda request, number: Answer("yes", delay_s=0.01)) as endpoint:
            with pytest.raises(KeyboardInterrupt):
                judge_of(endpoint.url).ask_all(chats, on_reply=interrupt)
            asked = len(endpoint.requests)
            assert 1 <= asked < 20, "what had not begun is not asked"
            assert sum(reply.cached for reply in judge_of(endpoint.url).ask_all(chats)) == asked
            assert len(endpoint.requests) == 20

    def test_an_end_is_not_held_up_by_what_is_tried_again(self, judge_of):
        def answer(request, number):
            first = request["messages"][0]["content"] == "q0"
            return Answer(status=401, body="wrong key", delay_s=0.1) if first else Answer(status=500, body="oops")

        with running(answer) as endpoint, pytest.raises(JudgeError, match="HTTP 401"):
            judge_of(endpoint.url, num_attempts=500).ask_all([chat(f"q{i}") for i in range(4)])
        assert len(endpoint.requests) < 200, "the others go on through all their attempts"

    def test_nonsense_is_asked_again_and_then_named(self, judge_of):
        def answer(request, number):
            return Answer("what?" if "odd" in request["messages"][0]["content"] else "yes")

        with running(answer) as endpoint:
            replies = judge_of(endpoint.url).ask_all([chat("odd"), chat("even")], lambda text: text == "yes")
            assert [reply.problem for reply in replies] == ["no usable reply in 3; the last: 'what?'", None]
            assert replies[0].num_prompt_tokens == 3 * 200
            assert len(endpoint.requests) == 4
            endpoint.behaviour = lambda request, number: Answer("yes")
            assert judge_of(endpoint.url).ask(chat("odd"), lambda text: text == "yes").problem is None

    def test_one_refused_question_does_not_end_the_others(self, judge_of):
        def answer(request, number):
            refused = Answer(status=400, body="content policy")
            return refused if request["messages"][0]["content"] == "q3" else Answer("yes")

        with running(answer) as endpoint:
            replies = judge_of(endpoint.url).ask_all([chat(f"q{i}") for i in range(8)])
        assert replies[3].problem == "refused: HTTP 400 content policy"
        assert all(reply.problem is None for number, reply in enumerate(replies) if number != 3)
        assert len(endpoint.requests) == 8

    def test_nothing_but_refusals_ends_it(self, judge_of):
        with (
            running(lambda request, number: Answer(status=422, body="unknown field")) as endpoint,
            pytest.raises(JudgeError, match="the first 5 replies are of no use; the last: refused: HTTP 422"),
        ):
            judge_of(endpoint.url).ask_all([chat(f"q{i}") for i in range(100)])
        assert len(endpoint.requests) < 20


class TestKey:
    def test_it_is_in_nothing_but_the_header(self, judge_of, tmp_path, monkeypatch):
        for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
            monkeypatch.setenv(name, "private")
        with running(lambda request, number: Answer(f"you sent {KEY}")) as endpoint:
            judge = judge_of(endpoint.url)
            reply = judge.ask(chat("a"))
        assert endpoint.keys == [f"Bearer {KEY}"]
        assert KEY not in repr(endpoint.headers) and "private" not in repr(endpoint.headers)
        assert reply.text == "you sent ***"
        assert KEY not in repr(judge.settings) + repr(endpoint.requests)
        assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.iterdir())

    def test_where_it_comes_from(self, monkeypatch):
        own = JudgeSettings("m", "http://localhost:1/v1")
        monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
        assert read_key(own) == read_key(JudgeSettings("m")) == KEY
        monkeypatch.delenv("OPENAI_API_KEY")
        assert read_key(own) is None
        with pytest.raises(ConfigError, match=r"wants a key: set the environment variable OPENAI_API_KEY"):
            read_key(JudgeSettings("m", OFFICIAL_URL))
        for wrong in ("sk-two words", "sk-schlüssel"):
            monkeypatch.setenv("OPENAI_API_KEY", wrong)
            with pytest.raises(ConfigError, match="characters that no key has") as raised:
                read_key(own)
            assert wrong not in str(raised.value)

    @pytest.mark.parametrize(
        "url", ["localhost", "ftp://a/v1", "https://me:pass@host/v1", "https://host/v1?key=abc", ""]
    )
    def test_addresses_that_could_carry_one(self, url):
        with pytest.raises(ConfigError, match="--base-url") as raised:
            JudgeSettings("m", url)
        assert "pass" not in str(raised.value).split("password")[0] and "abc" not in str(raised.value)


def test_a_cache_that_is_none(tmp_path):
    path = tmp_path / "cache.sqlite"
    path.write_text("something else " * 100)
    with pytest.raises(ManifestError, match=r"cache\.sqlite: not a sound cache .* --cache FILE"):
        ReplyCache(path)
    assert path.read_text().startswith("something else")


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ManifestError, match=r"not a sound cache .* --cache FILE"):
        ReplyCache(tmp_path / "file" / "cache.sqlite")
    cache = ReplyCache(tmp_path / "cache.sqlite")
    cache._database.execute("PRAGMA query_only = ON")  # as on a full disk: what is there can be read
    with pytest.raises(ManifestError, match=r"cache\.sqlite: a reply cannot be kept"):
        cache.put("key", {"text": "yes"})
    assert cache.get("key") is None
    cache.close()


class TestPrompt:
    def test_it_is_the_published_one(self):
        """Its digest was taken of the text in Video-LLaVA's script; the text itself is lmms-eval's."""
        prompt = read_prompt("video_chatgpt_v1")
        assert prompt.sha256 == "291f0c4cbacfe9980f488f3ea6a940716c12019088110a1e78fec6fd717ae1e5"
        assert (prompt.name, prompt.version) == ("video_chatgpt", 1)
        (system, user) = prompt.fill(question="what {answer}?", answer="a {pred}", prediction="{'pred': 'no'}")
        assert system["role"] == "system"
        lines = user["content"].splitlines()
        assert lines[2:5] == [
            "Question: what {answer}?",
            "Correct Answer: a {pred}",
            "Predicted Answer: {'pred': 'no'}",
        ]
        assert "keys 'pred' and 'score'" in user["content"]

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "def get_eval():\n    messages = []\n",
            "def get_eval(\n",
            "messages = [{'role': 'user', 'content': 'x'}]\n",
        ],
    )
    def test_another_text_is_no_judge_of_this_benchmark(self, text, tmp_path, monkeypatch):
        (tmp_path / "tasks" / "activitynetqa").mkdir(parents=True)
        (tmp_path / "tasks" / "activitynetqa" / "utils.py").write_text(text)
        other = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
        monkeypatch.setattr("importlib.util.find_spec", lambda name: other)
        with pytest.raises(JudgeError, match="not the text of video_chatgpt, version 1"):
            read_prompt.__wrapped__("video_chatgpt_v1")

    def test_without_lmms_eval(self, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(MissingPackageError, match="make install"):
            read_prompt.__wrapped__("video_chatgpt_v1")

    @pytest.mark.parametrize(
        ("reply", "verdict"),
        [
            ("{'pred': 'yes', 'score': 5}", Verdict(True, 5)),
            ("{'pred': 'no', 'score': 0}", Verdict(False, 0)),
            ('{"pred": "Yes.", "score": "4"}', Verdict(True, 4)),
            ("{'pred': 'yes', 'score': 4.8}", Verdict(True, 4)),
            ("```python\n{'pred': 'no', 'score': 2}\n```", Verdict(False, 2)),
            ("Sure! {'score': 3, 'pred': 'yes'}", Verdict(True, 3)),
            ("", None),
            ("yes", None),
            ("yes, 5", None),
            ("{'pred': 'yes'}", None),
            ("{'pred': 'yes', 'score': 6}", None),
            ("{'pred': 'yes', 'score': -1}", None),
            ("{'pred': 'yes', 'score': True}", None),
            ("{'pred': 'yes', 'score': 'high'}", None),
            ("{'pred': 'yes', 'score': 1e999}", None),
            ("{'pred': 'not sure', 'score': 3}", None),
            ("{'pred': True, 'score': 3}", None),
            ("{yes, no}", None),
            ("{'pred': 'yes', 'score': 5} or {'pred': 'no', 'score': 0}", None),
            ("{" + "(" * 499 + "}", None),
            ("{'pred': __import__('os').getcwd(), 'score': 3}", None),
        ],
    )
    def test_reading_a_verdict(self, reply, verdict):
        assert read_verdict(reply) == verdict
