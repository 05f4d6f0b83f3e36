"""What a client is told when it does not get what it asked for."""

from collections.abc import Mapping
from typing import Any

from mamba_jax.errors import clean_line


class Refusal(Exception):
    """A request is not answered: an HTTP status, and one line that says why.

    Attributes:
        status: the HTTP status.
        headers: of the response.

    Args:
        status: the HTTP status; 400 to 499 blame the client.
        message: what is wrong, the value, and what to do; it is passed through `clean_line`.
        param: the field of the request that is wrong.
        code: a word that programs know the error by.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(clean_line(message))
        self.status, self.headers = status, dict(headers or {})
        self._param, self._code = param, code

    @property
    def body(self) -> dict[str, Any]:
        """What is sent, in the form that clients of OpenAI's servers expect."""
        kind = "rate_limit_error" if self.status == 429 else "invalid_request_error"
        return {
            "error": {
                "message": str(self),
                "type": "server_error" if self.status >= 500 else kind,
                "param": self._param,
                "code": self._code,
            }
        }
