"""A judge model behind an OpenAI-compatible endpoint: messages in, text out, cached, retried, in parallel.

The key comes from the environment and goes nowhere but into the request's header: it is no part of a setting, a record,
a cached reply or a message, and is struck out of what a server says.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any

import openai

from vzip.errors import JudgeError
from vzip.json_files import whole_text

from .cache import ReplyCache
from .settings import KEY_VARIABLE, JudgeSettings

# Refused for what they ask about, while every request before was refused too: it is the settings that are wrong.
_MAX_REFUSED_AT_FIRST = 5
_NUM_CHARACTERS_SHOWN = 300
_MAX_TOKENS_TOLD = 10**8  # of one request, beyond what any model takes

Message = dict[str, str]
Usable = Callable[[str], bool]


@dataclass(frozen=True)
class Reply:
    """One reply.

    Attributes:
        text: what the judge said; empty where the endpoint refused.
        problem: why it is of no use, or None.
        served_model: the model's exact name by the endpoint's word.
        num_prompt_tokens, num_reply_tokens: by the endpoint's word, unusable replies included.
        cached: it was asked for earlier.
        refused: asking again is of no use.
    """

    text: str
    problem: str | None = None
    served_model: str | None = None
    num_prompt_tokens: int = 0
    num_reply_tokens: int = 0
    cached: bool = False
    refused: bool = False


class _Ended(openai.OpenAIError):
    """The asking as a whole has ended; of all errors its own are the ones that the client does not try again."""


class Judge:
    """Asks one model.

    Args:
        settings: whom to ask.
        cache: where replies are kept.
        key: see ``read_key``.
        num_workers: requests under way at once.
        num_asks: how often a question is asked that gets no usable reply.
        num_attempts: how often a request is sent that fails in a way that may pass, about a minute in all; a pause that
            the endpoint asks for is kept up to two minutes.
        timeout_s: how long one request may take.
    """

    def __init__(
        self,
        settings: JudgeSettings,
        cache: ReplyCache,
        *,
        key: str | None = None,
        num_workers: int = 8,
        num_asks: int = 3,
        num_attempts: int = 12,
        timeout_s: float = 60.0,
    ) -> None:
        self.settings, self.cache = settings, cache
        self.num_workers, self.num_asks = num_workers, num_asks
        self._key = key
        # The client would take these from the environment, for whatever endpoint.
        left_out = ("OpenAI-Organization", "OpenAI-Project", *(() if key else ("Authorization",)))
        self._headers = dict.fromkeys(left_out, openai.Omit())
        self._stop = threading.Event()
        self._client = openai.OpenAI(
            base_url=settings.base_url,
            api_key=key or "none",
            max_retries=num_attempts - 1,
            timeout=timeout_s,
            http_client=openai.DefaultHttpxClient(event_hooks={"request": [self._check_on]}),
        )

    def close(self) -> None:
        """Ends the connections."""
        self._client.close()

    def known(self, messages: Sequence[Message], usable: Usable) -> Reply | None:
        """The cached reply to ``messages`` if there is a usable one."""
        entry = self.cache.get(ReplyCache.key(self._request(messages)))
        if entry is None or not usable(text := whole_text(entry["text"])):
            return None
        return Reply(text, None, self._name(entry["served_model"]), cached=True)

    def ask(self, messages: Sequence[Message], usable: Usable = bool) -> Reply:
        """The reply to a chat, from the cache where it was asked before.

        Args:
            messages: ``role`` and ``content`` of each turn.
            usable: whether a reply can be read; one that cannot be is asked for again, ``num_asks`` times in all.

        Returns:
            A reply; ``problem`` says where none could be read.

        Raises:
            JudgeError: the endpoint cannot be reached, or refuses whatever it is asked.
        """
        known = self.known(messages, usable)
        if known is not None:
            return known
        spent = [0, 0]
        reply = Reply("")
        for _ in range(self.num_asks):
            reply = self._send(messages)
            spent = [spent[0] + reply.num_prompt_tokens, spent[1] + reply.num_reply_tokens]
            if reply.refused:
                break
            if reply.problem is None and usable(reply.text):
                entry = {"text": reply.text, "served_model": reply.served_model}
                self.cache.put(ReplyCache.key(self._request(messages)), entry)
                return replace(reply, num_prompt_tokens=spent[0], num_reply_tokens=spent[1])
        problem = (
            reply.problem or f"no usable reply in {self.num_asks}; the last: {reply.text[:_NUM_CHARACTERS_SHOWN]!r}"
        )
        return replace(reply, problem=problem, num_prompt_tokens=spent[0], num_reply_tokens=spent[1])

    def ask_all(
        self,
        chats: Sequence[Sequence[Message]],
        usable: Usable = bool,
        on_reply: Callable[[int, Reply], None] | None = None,
    ) -> list[Reply]:
        """The replies to many chats, in their order; ``num_workers`` are asked at once.

        Args:
            chats, usable: as for ``ask``.
            on_reply: called with a chat's number and its reply, in the order in which they come. What it raises ends
                the whole.

        Raises:
            JudgeError: as ``ask``. Replies that have come are in the cache: call again to go on.
        """
        replies: dict[int, Reply] = {}
        num_good = 0
        self._stop.clear()
        with ThreadPoolExecutor(self.num_workers) as pool:
            numbers: dict[Future[Reply], int] = {
                pool.submit(self.ask, messages, usable): number for number, messages in enumerate(chats)
            }
            try:
                for future in as_completed(numbers):
                    reply = replies[numbers[future]] = future.result()
                    num_good += reply.problem is None
                    if num_good == 0 and len(replies) >= _MAX_REFUSED_AT_FIRST:
                        raise JudgeError(f"the first {len(replies)} replies are of no use; the last: {reply.problem}.")
                    if on_reply is not None:
                        on_reply(numbers[future], reply)
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [replies[number] for number in range(len(chats))]

    def _request(self, messages: Sequence[Message]) -> dict[str, Any]:
        settings = self.settings
        return {
            "base_url": settings.base_url,
            "model": settings.model,
            "messages": [{key: whole_text(text) for key, text in message.items()} for message in messages],
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens,
        }

    def _send(self, messages: Sequence[Message]) -> Reply:
        body = self._request(messages)
        url = f"{body.pop('base_url').rstrip('/')}/chat/completions"
        try:
            content = self._client.chat.completions.create(**body, extra_headers=self._headers)
        except openai.APIStatusError as error:
            status = error.status_code
            said = f"HTTP {status} {self._shown(error.response.text)}"
            if status in (401, 403, 404):
                check = f"Check {KEY_VARIABLE}, --base-url and --model {body['model']}."
                raise JudgeError(f"{url} refuses ({said}). {check}") from error
            if status in (408, 409, 429) or status >= 500:
                pause = self._shown(error.response.headers.get("retry-after", ""))
                asked = f"; it asks for a pause of {pause} (Retry-After), longer ones than two minutes are not kept"
                raise JudgeError(f"{url}: {said}{asked if pause else ''}") from error
            return Reply("", f"refused: {said}", refused=True)
        except openai.OpenAIError as error:
            raise JudgeError(f"{url}: {self._shown(str(error.__cause__ or error))}") from error
        except (ValueError, RecursionError) as error:
            return Reply("", f"not a chat completion: {self._shown(str(error))}")
        # The client reads JSON as it comes, whatever its types are, and other text as a string.
        usage = getattr(content, "usage", None)
        sent, received = (_count(getattr(usage, name, None)) for name in ("prompt_tokens", "completion_tokens"))
        try:
            text = content.choices[0].message.content
        except (LookupError, TypeError, AttributeError):
            text = content
        if text is not None and (text is content or not isinstance(text, str)):
            return Reply("", f"not a chat completion: {self._shown(str(text))}", None, sent, received)
        return Reply(
            self._struck(whole_text(text or "")), None, self._name(getattr(content, "model", None)), sent, received
        )

    def _check_on(self, request: object) -> None:
        if self._stop.is_set():
            raise _Ended

    def _shown(self, text: str) -> str:
        return self._struck(" ".join(text.split()))[:_NUM_CHARACTERS_SHOWN]

    def _name(self, served_model: object) -> str | None:
        """The model's name as the endpoint gives it, whatever that is."""
        return None if served_model is None else self._shown(whole_text(str(served_model)))

    def _struck(self, text: str) -> str:
        """The text without the key: servers repeat what they were given."""
        return text.replace(self._key, "***") if self._key else text


def _count(tokens: object) -> int:
    """A number of tokens by the endpoint's word; 0, which stands for not told, where that is no such number."""
    if isinstance(tokens, bool) or not isinstance(tokens, int | float):
        return 0
    return int(tokens) if 0 <= tokens < _MAX_TOKENS_TOLD else 0
