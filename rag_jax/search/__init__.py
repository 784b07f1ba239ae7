"""Documents <-> a directory that can be searched: build, query, update."""
