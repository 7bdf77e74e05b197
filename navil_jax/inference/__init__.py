"""Generation: prefill, cached decoding, sampling, and a conversation about pictures."""
