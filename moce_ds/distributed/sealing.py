"""The secret of a run, which its launcher gives to all processes, and seals that only who knows it can make."""

import hashlib
import hmac
import secrets
from dataclasses import dataclass

from moce_ds.text import encoded

SECRET = "MOCE_SECRET"
"""The environment variable of the secret. Without one, as under torchrun, seals protect from accidents alone."""


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
        """Whether that is the seal of that text; takes as long for a wrong one as for the right one."""
        return hmac.compare_digest(encoded(seal), self.seal(text).encode())
