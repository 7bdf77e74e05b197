"""Questions of the benchmarks: the files they are published in, as one kind of record, and the prompts made of them."""
