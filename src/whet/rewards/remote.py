"""The reward `remote_rm`: what a server says, which is sent prompt, response and label."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import Field

from whet.errors import RewardError
from whet.rewards.endpoint import EXCERPT, Endpoint, bearer, checked_url
from whet.types import Episode


class RemoteReward:
    """Posts `{"prompt", "response", "label"}` to `rm_url`; the answer is a number, or an object of numbers.

    A server that does not answer costs the episode; nothing is ever made up in its place.
    """

    def __init__(
        self,
        *,
        rm_url: Annotated[str, Field(description="As in http://localhost:8000/reward.")],
        api_key_env: Annotated[str | None, Field(description="Environment variable that holds the key.")] = None,
        request_timeout_s: Annotated[float, Field(gt=0, description="Most seconds for one request.")] = 30.0,
        retries: Annotated[int, Field(ge=0, description="Further requests after one that failed.")] = 4,
        max_concurrent: Annotated[int, Field(ge=1, description="Most requests at a time.")] = 64,
    ) -> None:
        self.max_concurrent = max_concurrent
        self._endpoint = Endpoint(
            checked_url(rm_url, "reward remote_rm: rm_url"),
            who="the reward model",
            request_timeout_s=request_timeout_s,
            retries=retries,
            headers=bearer(api_key_env, "reward remote_rm: api_key_env"),
        )

    async def __call__(self, episode: Episode) -> Any:
        """The answer. Raises RewardError when there is none to be had."""
        prompt = episode.prompt
        body = {"prompt": prompt.content, "response": episode.response, "label": prompt.label}
        response = await self._endpoint.post(body)
        try:
            return response.json()
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise RewardError(f"the reward model's answer is no JSON: {response.text.strip()[:EXCERPT]!r}") from error
