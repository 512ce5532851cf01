"""Which experts of a run serve a task: the vote of its images, and other choices of a route."""
