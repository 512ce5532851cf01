"""What a person starts. Modules that were here are in moce_ds now, which also finds them under their old names."""

import moce_ds  # noqa: F401
