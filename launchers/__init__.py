"""Scripts that a person starts. Modules that were here have moved to moce_ds and are found under their old names."""

import moce_ds  # noqa: F401
