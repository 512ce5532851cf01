"""The secret of a run, which its launcher gives to all processes, and message authentication codes (seals) made with
it."""

import hashlib
import hmac
import secrets
from dataclasses import dataclass

from moce_ds.text import encoded

SECRET = "MOCE_SECRET"
"""Environment variable of the secret. Without it, as under torchrun, seals only detect accidents."""


def new_secret() -> str:
    """A secret for one start of a run, in ASCII."""
    return secrets.token_hex(16)


@dataclass(frozen=True)
class Sealer:
    """Seals texts with a secret (HMAC-SHA256)."""

    secret: bytes

    def seal(self, text: str) -> str:
        """The seal of a text, 64 hexadecimal digits."""
        return hmac.digest(self.secret, encoded(text), hashlib.sha256).hex()

    def is_genuine(self, seal: str, text: str) -> bool:
        """Whether `seal` is the seal of `text`; takes constant time."""
        return hmac.compare_digest(encoded(seal), self.seal(text).encode())
