"""Tar shards of images, the order in which they are read, and the DALI pipeline that decodes them."""
