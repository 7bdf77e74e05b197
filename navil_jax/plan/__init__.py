"""The planner: the compiled step of a slice, its memory and its modelled time."""
