"""Changes that no test can notice, since they change nothing; each with the reason."""

EQUIVALENT: dict[str, str] = {}
