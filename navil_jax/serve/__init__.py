"""Serving: OpenAI's chat completions over HTTP, and a chat page, with the engine in one thread."""
