"""Requests that the service refuses, with a status and a remedy for the client."""


class Refusal(Exception):
    """Error that the client receives as JSON.

    Args:
        status: HTTP status.
        error: Sentence that says what is wrong.
        remedy: Sentence that says what to do.
        headers: Headers of the answer, such as Retry-After.
    """

    def __init__(self, status: int, error: str, remedy: str, headers: dict[str, str] | None = None):
        super().__init__(error)
        self.status, self.error, self.remedy = status, error, remedy
        self.headers = headers or {}


def overloaded(error: str) -> Refusal:
    """Return the refusal of a request for which there is no capacity at the moment."""
    return Refusal(503, error, "Try again in a second.", {"Retry-After": "1"})
