"""Generation: prefill and cached decoding, sampling, and an assistant that answers."""
