"""Public data sets of the transfer protocol: one reader each, from the files that they ship to labelled shard sets."""
