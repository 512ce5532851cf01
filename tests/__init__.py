"""All tests. Loading what they import makes half a million objects, none of them garbage: a fifth of its time would go
into collections at the usual thresholds, which hold again when pytest has collected the tests."""

import gc

USUAL_THRESHOLDS = gc.get_threshold()
gc.set_threshold(50_000)
